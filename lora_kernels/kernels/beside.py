"""Launches beside the current stream's: rank-sized kernels on the multiprocessors that a large product leaves.

    with forked(when=True) as beside:   what is launched from here on waits for what was launched before
        product                         on the current stream
        with beside:
            rank-sized kernels          on a second one, at the same time
    end of the call                     what comes next waits for both

8192 x 4096 tiles as 1024 of 128 x 256, eight waves of 128 programs: four of an H200's 132 multiprocessors are idle
throughout, and read x for dA in that time.

Only a call that is repeated from its recipe (`kernels.replay`) does it; as it is written, everything is on the current
stream, in the order of the text. A recipe knows all of its allocations: they are made before the fork, on the current
stream, so that their memory is nobody else's by then, and held until after the join, so that nobody is given memory
that the other stream still uses. Whatever is raised in between, there is a join.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch

from lora_kernels.kernels.launch import observer

_seconds: dict[tuple[int, int], "torch.cuda.Stream"] = {}
"""By device and stream. PyTorch hands out 32 streams of a device in turn: a second one may be somebody else's, which
orders more than it must, but never the first itself."""


class Fork(NamedTuple):
    """A second stream beside the current one."""

    current: "torch.cuda.Stream"
    second: "torch.cuda.Stream"

    @staticmethod
    def of(device: torch.device) -> "Fork":
        """The second stream waits for everything launched so far."""
        current = torch.cuda.current_stream(device)
        key = (current.device_index, current.cuda_stream)
        second = _seconds.get(key)
        if second is None:
            second = torch.cuda.Stream(device)
            while second.cuda_stream == current.cuda_stream:
                second = torch.cuda.Stream(device)
            _seconds[key] = second
        second.wait_stream(current)
        return Fork(current, second)

    def join(self) -> None:
        """What is launched from here on waits for both."""
        self.current.wait_stream(self.second)


@contextmanager
def forked(*, when: bool) -> Iterator[AbstractContextManager[None]]:
    """Where a call forks, to its end; what it gives names the launches of the second stream. Without `when`, none."""
    if when and observer.forked is not None:
        observer.forked()
    yield _named_beside() if when else nullcontext()


@contextmanager
def _named_beside() -> Iterator[None]:
    observer.beside = True
    try:
        yield
    finally:
        observer.beside = False
