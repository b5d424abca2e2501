"""Launches without the JIT's bookkeeping: the binary is found by a key of our own, and called.

`kernel[grid](...)` binds, types and specialises every argument at every call, which takes longer than many a kernel
runs. Which binary serves is decided by less: dtype and 16-byte alignment of each tensor, block shape of each
descriptor, the integers that the kernel specialises on, the constexprs, the options and the device. Integers count with
their exact value, which is finer than Triton's classes (1, multiple of 16, 64-bit) and cheaper than finding them.

What Triton's settings (`triton.knobs`) were when a binary was first made is what its later launches get.
"""

from typing import Any

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

_compiled: dict[tuple[Any, ...], Any] = {}
_specialised: dict[int, tuple[bool, ...]] = {}


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
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    if launch_pdl:  # AMD's compiler does not know the option
        options["launch_pdl"] = True
    if is_interpreting():
        kernel[grid](*args, **constexprs, **options)
        return
    identity = id(kernel)  # kernels live as long as their module; hashing one takes Triton half a microsecond
    specialised = _specialised.get(identity)
    if specialised is None:
        names = tuple(kernel.arg_names[len(args) :])
        assert names == tuple(constexprs), f"constexprs of {kernel} must be {names}, in this order"
        specialised = _specialised[identity] = tuple(not p.do_not_specialize for p in kernel.params[: len(args)])
    device = torch.cuda.current_device()
    values = tuple(constexprs.values())
    key = (identity, device, *map(_trait, args, specialised), values, num_warps, num_stages, launch_pdl)
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= MOST_BINARIES:
            _compiled.clear()
        _compiled[key] = kernel[grid](*args, **constexprs, **options)
        return
    x, y, z = (*grid, 1, 1)[:3]
    if not (knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls):
        stream = driver.active.get_current_stream(device)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *values)
    else:  # a profiler listens
        compiled[x, y, z](*args, *values)


def has_offset(seed: Tensor | None) -> bool:
    """Whether the seed says where in a larger input x begins: [key, row, column] instead of [key]."""
    return seed is not None and seed.numel() > 1


def _trait(arg: Any, specialised: bool) -> Any:
    """What of an argument decides which binary serves."""
    kind = type(arg)
    if kind is int:
        return arg if specialised else -INT32 <= arg < INT32
    if kind.__name__ == "TensorDescriptor":  # Triton's or Gluon's, whose layout here follows from these
        return (kind, arg.base.dtype, *arg.block_shape)
    if isinstance(arg, Tensor):
        aligned = arg.data_ptr() % ALIGNMENT == 0
        # AMD's backend also compiles for what 32-bit offsets reach.
        return (arg.dtype, aligned, arg.untyped_storage().nbytes() < INT32) if HIP else (arg.dtype, aligned)
    return kind
