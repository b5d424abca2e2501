"""Where tensors lie in memory: those that a test makes start some bytes off the allocator's alignment.

A library's GEMM may add in another order for operands at another address. A fresh tensor is aligned to 64 bytes, one
read from a file is not, so that a test which takes the two for equal to the bit fails on some processors only. Within
`placed` every tensor that Python code makes lies where it is told to, so that such a test fails here as well.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ALIGNMENT = 64  # bytes; torch's allocator's on a CPU
# Bytes past it. In turn: so two tensors of equal numbers, one after the other, never lie alike.
PLACEMENTS: dict[str, tuple[int, ...]] = {"aligned": (0,), "4": (4,), "8": (8,), "16": (16,), "in-turn": (0, 4, 8, 16)}

_FACTORIES = ("empty", "rand", "randn", "tensor")  # zeros and ones add up alike in any order
_METHODS = ("bfloat16", "clone", "contiguous", "double", "float", "half", "to")


def moved(t: Tensor, offset: int) -> Tensor:
    """t's numbers in memory of their own, `offset` bytes past an aligned address; strides are t's."""
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    memory = torch.frombuffer(bytearray(span * t.element_size() + 2 * ALIGNMENT), dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT + offset
    # By the buffer protocol, since a view of torch's begins at whole elements only: 4 bytes are half an fp64.
    buffer = memoryview(memory.numpy())[start : start + span * t.element_size()]
    return torch.frombuffer(buffer, dtype=t.dtype).as_strided(t.shape, t.stride()).copy_(t.detach())


@contextmanager
def placed(placement: str) -> Iterator[None]:
    """Within it, torch's factories and copies place their results as PLACEMENTS says.

    Left where they are: what is not floating point, not on the CPU, empty, or made where a mode watches the ops or a
    compiler traces them.
    """
    offsets = itertools.cycle(PLACEMENTS[placement])
    with torch.device("cpu"):  # torch lists its factories at the first such block, and those below are not they
        torch.empty(0)

    def placing(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            t = make(*args, **kwargs)
            if torch.compiler.is_compiling() or is_in_torch_dispatch_mode(True):
                return t
            is_new = type(t) is Tensor and not is_functorch_wrapped_tensor(t) and not any(t is arg for arg in args)
            if is_new and t.device.type == "cpu" and t.is_floating_point() and t.numel() and not t._is_view():
                t.data = moved(t, next(offsets))
            return t

        return made

    factories = {name: placing(getattr(torch, name)) for name in _FACTORIES}
    methods = {name: placing(getattr(Tensor, name)) for name in _METHODS}
    with mock.patch.multiple(torch, **factories), mock.patch.multiple(Tensor, **methods):
        yield
