"""Launches beside the current stream's: rank-sized kernels on the multiprocessors that a large product leaves.

    with forked(dy, when=True) as beside:   what is launched from here on waits for what was launched before
        product                             on the current stream
        with beside:
            rank-sized kernels              on a second one, at the same time
    ...                                     waits for both

8192 x 4096 tiles as 1024 of 128 x 256, eight waves of 128 programs: four of an H200's 132 multiprocessors are idle
throughout, and read x for dA in that time.

Allocations stay the current stream's. Memory that is freed inside of a fork could be given to the other side of it,
where the freed tensor is still read, so nothing may be freed there: `replay` keeps a fork's tensors to its end, and
callers allocate no temporary between the fork and the last allocation inside of it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.kernels.launch import observer

_seconds: dict[tuple[int, int], "torch.cuda.Stream"] = {}
"""By device and stream: a second stream that two others shared would order them, and capture both."""


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
            second = _seconds[key] = torch.cuda.Stream(device)
        second.wait_stream(current)
        return Fork(current, second)

    def join(self) -> None:
        """What is launched from here on waits for both."""
        self.current.wait_stream(self.second)


def has_streams(t: Tensor) -> bool:
    """Whether kernels over t are launched on streams."""
    return t.is_cuda


@contextmanager
def forked(t: Tensor, *, when: bool) -> Iterator[AbstractContextManager[None]]:
    """A fork on t's GPU: its second stream takes the launches within what it gives. Else there is one order."""
    if not (when and has_streams(t)):
        yield nullcontext()
        return
    fork = Fork.of(t.device)
    if observer.forked is not None:
        observer.forked()
    try:
        yield _sent_to(fork.second)
    finally:
        fork.join()


@contextmanager
def _sent_to(stream: "torch.cuda.Stream") -> Iterator[None]:
    observer.beside = stream
    try:
        yield
    finally:
        observer.beside = None
