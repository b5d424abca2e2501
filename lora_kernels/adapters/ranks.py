"""What all ranks of a sharded model do together, and how an error on one of them reaches the others.

All of them are those of the default process group, whatever the mesh that the adapter lies on: where each pair of ranks
has a copy of it, all of them still write to one directory.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed, nn

from lora_kernels.nn.sharding import is_dtensor


def in_parts(model: nn.Module) -> bool:
    """Whether a parameter of the model is a DTensor, which other ranks hold parts or copies of."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


def writes(sharded: bool, directory: Path) -> bool:
    """Whether this rank writes a directory's files: the first of those that name it; pipeline stages may differ.

    Where nothing is sharded, every process is on its own.
    """
    if not sharded:
        return True
    mine = str(directory.absolute())
    everyones: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyones, mine)
    return everyones.index(mine) == distributed.get_rank()


@contextmanager
def unanimous(sharded: bool) -> Iterator[None]:
    """What is raised inside on one rank is raised on all, once all have come to the end: none waits for another."""
    if not sharded:
        yield
        return
    try:
        yield
    except BaseException as error:
        _told(error)
        raise
    if (other := _told(None)) is not None:
        raise other


def _told(error: BaseException | None) -> Exception | None:
    """The first error that a rank brings."""
    answers: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(answers, None if error is None else _portable(error))
    return next((answer for answer in answers if answer is not None), None)


def _portable(error: BaseException) -> Exception:
    """The error itself where another process can be given it; an interruption is another matter there."""
    if isinstance(error, Exception):
        try:
            if type(pickle.loads(pickle.dumps(error))) is type(error):
                return error
        except Exception:
            pass
    return RuntimeError(f"on another rank: {type(error).__name__}: {error}")
