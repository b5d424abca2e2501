"""Launches without the JIT's bookkeeping: the binary is found by a key of our own, and called.

`kernel[grid](...)` binds, types and specialises every argument at every call. Which binary serves is decided by less:
dtype and 16-byte alignment of each tensor, block shape of each descriptor, the integers that the kernel specialises on,
the constexprs, the options and the device. Integers count with their exact value, which is finer than Triton's classes
(1, multiple of 16, 64-bit) and cheaper than finding them. Where tensors and integers stand among the arguments is found
once for each sequence of types, so that the rest is picked out without asking each argument what it is.

What Triton's settings (`triton.knobs`) were when a binary was first made is what its later launches get.
"""

import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from lora_kernels.kernels.interpreter import is_interpreting

ALIGNMENT = 16
INT32 = 1 << 31
HIP = torch.version.hip is not None
MOST_BINARIES = 8192
"""Entries, not binaries: a stream of ever new sizes ends in an emptied table, and no binary is made twice for it."""


class _Observer(threading.local):
    """Who is told of this thread's launches and forks: a recorder (`replay`), or nobody."""

    launched: Callable[["Launch"], None] | None = None
    forked: Callable[[], None] | None = None
    beside: bool = False
    """Whether launches are the second stream's of a fork (`kernels.beside`), once they are repeated."""


observer = _Observer()
_compiled: dict[tuple[Any, ...], Any] = {}
_picks: dict[tuple[Any, ...], "_Pick"] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    num_stages: int = 3,
    launch_pdl: bool = False,
    **constexprs: Any,
) -> None:
    """kernel[grid](*args, **constexprs), with the options for a launch between them.

    Args:
        kernel: a `@triton.jit` function whose parameters are args, then constexprs.
        grid: one to three sizes.
        args: tensors, host descriptors, integers, floats and None, in the kernel's order.
        num_warps: of the kernel's tile.
        num_stages: of the kernel's tile.
        launch_pdl: whether it may start before the kernel ahead of it has ended (sm_90 and later).
        constexprs: the constexpr parameters, by name, in the kernel's order.
    """
    if is_interpreting():
        kernel[grid](*args, **constexprs)
        return
    # Kernels live as long as their module, so that an id names one, without hashing the kernel.
    kinds = (id(kernel), *map(type, args))
    pick = _picks.get(kinds)
    if pick is None:
        names = tuple(kernel.arg_names[len(args) :])
        assert names == tuple(constexprs), f"constexprs of {kernel} must be {names}, in this order"
        pick = _picks[kinds] = _Pick.of(kernel, args)
    device = torch.cuda.current_device()
    values = tuple(constexprs.values())
    key = (kinds, device, values, num_warps, num_stages, launch_pdl, *pick.traits(args))
    compiled = _compiled.get(key)
    launched = Launch(compiled, (*grid, 1, 1)[:3], (*args, *values), observer.beside)
    if compiled is None:
        if len(_compiled) >= MOST_BINARIES:
            _compiled.clear()
        pdl = {"launch_pdl": True} if launch_pdl else {}  # AMD's compiler does not know the option
        compiled = kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages, **pdl)
        _compiled[key] = compiled
    elif is_profiled():
        compiled[launched.grid](*launched.args)
    else:
        launched.run(driver.active.get_current_stream(device), launched.args)
    if observer.launched is not None:
        observer.launched(launched._replace(compiled=compiled))


class Launch(NamedTuple):
    """What was launched: the binary, three sizes of its grid, the arguments with the constexprs behind them.

    beside: for the second stream of a fork.
    """

    compiled: Any
    grid: tuple[int, ...]
    args: Sequence[Any]
    beside: bool

    def run(self, stream: int, args: Sequence[Any]) -> None:
        """The same launch with these arguments in the places of its own."""
        kernel = self.compiled
        kernel.run(*self.grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *args)


def is_profiled() -> bool:
    """Whether a profiler wants to hear of each launch from Triton."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook  # either may be set to None
    return bool((before and before.calls) or (after and after.calls))


def ceil_div(size: int, block: int) -> int:
    """Blocks that cover `size`. Not `triton.cdiv`, which kernels use, too: 15 times as long (`bench.choices`)."""
    return -(-size // block)


def split_in_blocks(size: int, splits: int, block: int) -> tuple[int, int]:
    """(elements of each split but the last, a multiple of `block`; how many splits that makes, at most `splits`)."""
    each = ceil_div(ceil_div(size, splits), block) * block
    return each, ceil_div(size, each)


def has_offset(seed: Tensor | None) -> bool:
    """Whether the seed says where in a larger input x begins: [key, row, column] instead of [key]."""
    return seed is not None and seed.numel() > 1


class _Pick(NamedTuple):
    """Where, among arguments of one sequence of types, those stand that decide which binary serves."""

    tensors: tuple[int, ...]
    descriptors: tuple[int, ...]
    exact: Callable[[tuple[Any, ...]], Any] | None
    """Integers that the kernel specialises on."""
    wide: tuple[int, ...]
    """Integers of which only the width counts."""

    @staticmethod
    def of(kernel: Any, args: tuple[Any, ...]) -> "_Pick":
        described = [type(arg).__name__ == "TensorDescriptor" for arg in args]  # Triton's or Gluon's
        specialised = [not parameter.do_not_specialize for parameter in kernel.params[: len(args)]]
        exact = [i for i, arg in enumerate(args) if type(arg) is int and specialised[i]]
        return _Pick(
            tensors=tuple(i for i, arg in enumerate(args) if isinstance(arg, Tensor)),
            descriptors=tuple(i for i, is_one in enumerate(described) if is_one),
            exact=itemgetter(*exact) if exact else None,
            wide=tuple(i for i, arg in enumerate(args) if type(arg) is int and not specialised[i]),
        )

    def traits(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What of the arguments decides, besides their types."""
        tensors = [args[i] for i in self.tensors]
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        return (
            self.exact and self.exact(args),
            *[-INT32 <= args[i] < INT32 for i in self.wide],
            *[tensor.dtype for tensor in tensors],
            # Nearly always all are aligned.
            addresses % ALIGNMENT == 0 or tuple([tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors]),
            # A descriptor's layout follows from these, here.
            *[(args[i].base.dtype, *args[i].block_shape) for i in self.descriptors],
            # AMD's backend also compiles for what 32-bit offsets reach.
            *([tensor.untyped_storage().nbytes() < INT32 for tensor in tensors] if HIP else ()),
        )
