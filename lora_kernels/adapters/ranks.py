"""What all ranks of a sharded model do together, and how an error on one of them reaches the others."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lora_kernels.nn.sharding import is_dtensor


def mesh_of(tensors: Iterable[Tensor]) -> Any:
    """The DeviceMesh, the largest, that DTensors among them lie on; None if there are none."""
    meshes: list[Any] = [tensor.device_mesh for tensor in tensors if is_dtensor(tensor)]  # type: ignore[attr-defined]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def writes(mesh: Any) -> bool:
    """Whether this rank is the one that writes files; without a mesh, every process is on its own."""
    return mesh is None or not any(mesh.get_coordinate())


@contextmanager
def unanimous(mesh: Any) -> Iterator[None]:
    """What is raised inside on one rank is raised on all, once all have come to the end: none waits for another."""
    if mesh is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        _told(mesh, error)
        raise
    if (other := _told(mesh, None)) is not None:
        raise other


def _told(mesh: Any, error: BaseException | None) -> Exception | None:
    """The first error that a rank brings."""
    from torch import distributed

    found = None if error is None else _portable(error)
    for dimension in range(mesh.ndim):
        group = mesh.get_group(dimension)
        answers: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(answers, found, group=group)
        found = next((answer for answer in answers if answer is not None), None)
    return found


def _portable(error: BaseException) -> Exception:
    """The error itself where another process can be given it; an interruption is another matter there."""
    if isinstance(error, Exception):
        try:
            if type(pickle.loads(pickle.dumps(error))) is type(error):
                return error
        except Exception:
            pass
    return RuntimeError(f"on another rank: {type(error).__name__}: {error}")
