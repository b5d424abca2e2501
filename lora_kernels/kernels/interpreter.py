"""A scoped repair of Triton's interpreter, so that kernels run under it compute what a GPU computes.

Under ``TRITON_INTERPRET=1`` Triton runs kernels on NumPy arrays. NumPy has no bfloat16, so a bf16 tile is
kept as the uint16 of its bits, and most of the interpreter (Triton 3.6 to 3.9) then forgets that: products
multiply the bit patterns, sums add them, casts truncate. :func:`repaired` mends what this package's kernels
meet — 16-bit products, arithmetic, comparisons, casts, constants, reductions — and leaves alone what they do
not use: atomics, fp8, block-scaled products, inline assembly. Launchers enter it around a launch; outside it
Triton is untouched.

Rules of the repair, the same as the hardware's: products of 16-bit tiles are exact in fp32 and accumulate in
fp32; elementwise bf16 is computed in fp32 and rounded once; every rounding is to nearest, ties to even.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

_Array = npt.NDArray[Any]

# The decorator of every kernel chose between compiler and interpreter when Triton was imported. Triton's own
# library shows which; the environment variable may have been changed since, and then no longer tells.
_INTERPRETING = not isinstance(tl.cdiv, triton.runtime.JITFunction)

# Interpreted launches must not overlap: Triton keeps the running program's index in one global object.
_lock = threading.RLock()
_depth = 0


def is_interpreting() -> bool:
    """Whether kernels here are interpreted: TRITON_INTERPRET=1 was set before Triton's first import."""
    return _INTERPRETING


@contextlib.contextmanager
def repaired(*, check_overflow: bool = False) -> Iterator[None]:
    """Mend Triton's interpreter inside the block; do nothing where kernels are compiled.

    Re-entrant. One thread at a time may be inside.

    Args:
        check_overflow: also raise where integer arithmetic of up to 32 bits wraps around, as an offset past
            2**31 would, and honour ``tl.device_assert``. Slower. The outermost block decides.
    """
    global _depth  # noqa: PLW0603 - how often the repair was entered is a property of the process
    if not _INTERPRETING:
        yield
        return
    with _lock, contextlib.ExitStack() as undo:
        if _depth == 0:
            for owner, name, value in _repairs(check_overflow):
                _set(undo, owner, name, value)
            # Infinity minus infinity or an fp16 overflow is a value on a GPU, not a RuntimeWarning.
            undo.enter_context(np.errstate(all="ignore"))
        _depth += 1
        undo.callback(_leave)
        yield


def _leave() -> None:
    global _depth  # noqa: PLW0603 - see repaired
    _depth -= 1


def _set(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set owner.name, and have it put back (or removed again) when undo closes."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


# -- bf16 as bits --------------------------------------------------------------------------------------------


def _is_bf16(handle: Any) -> bool:
    # Both, because the interpreter labels the boolean result of a comparison with the type of its operands.
    return bool(handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16)


def _widen(handle: Any) -> _Array:
    """The handle's values as fp32 (bf16 and fp16 exactly)."""
    data: _Array = handle.data
    if _is_bf16(handle):
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32, copy=False)


def _to_bf16(values: _Array) -> _Array:
    """fp32 to the bits of the nearest bf16, ties to even; NaN stays NaN, overflow becomes infinity."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    # A carry out of the mantissa raises the exponent by itself: to a normal, to the next power of two, to Inf.
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    nan = np.isnan(values)
    if nan.any():  # a payload in the low half would be rounded away, leaving an infinity: set the quiet bit
        rounded = np.where(nan, (bits >> 16) | 0x40, rounded)
    return rounded.astype(np.uint16)


# -- the repairs ---------------------------------------------------------------------------------------------


@functools.cache
def _interpreter() -> Any:
    # Imported on first use: it is of no use, and not free, where kernels are compiled.
    from triton.runtime import interpreter

    return interpreter


def _repairs(check_overflow: bool) -> list[tuple[Any, str, Any]]:
    """What to replace while the repair is on: (owner, attribute, replacement)."""
    module = _interpreter()
    builder = module.interpreter_builder
    # Triton computes every integer sum, difference and product a second time in int64 to compare the two, and
    # then drops the comparison unless `debug` is set.
    options = dataclasses.replace(
        builder.options,
        sanitize_overflow=check_overflow,
        debug=check_overflow,
        # Compilers know these two as well; here every precision of an fp32 product means fp32.
        allowed_dot_input_precisions=("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6"),
    )
    return [(builder, "options", options), *_module_repairs(), *_method_repairs()]


@functools.cache
def _method_repairs() -> list[tuple[Any, str, Any]]:
    module = _interpreter()
    cls, handle = module.InterpreterBuilder, module.TensorHandle
    replaced = ("create_dot", "binary_op", "unary_op", "create_fma", "cast_impl", "create_fp_to_fp")
    original = {name: getattr(cls, name) for name in replaced}

    # tl.dot multiplied the uint16 of bf16 tiles (errors of 1e10). With out_dtype=fp16 it also summed in fp16,
    # where tensor cores round once per product tile. input_precision only concerns fp32, which is exact to
    # fp32 here.
    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if a.dtype.scalar not in (tl.bfloat16, tl.float16):
            return original["create_dot"](self, a, b, d, *precision)
        out = np.matmul(_widen(a), _widen(b))
        out += d.data
        return handle(out.astype(d.data.dtype, copy=False), d.dtype.scalar)

    # + - * / % min max and the comparisons worked on uint16: 1.0 + 1.0 was infinity, -1.0 > 1.0.
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., _Array]) -> Any:
        if not _is_bf16(lhs):
            return original["binary_op"](self, lhs, rhs, op)
        out = op(_widen(lhs), _widen(rhs))
        if out.dtype == np.bool_:
            return handle(out, tl.int1)
        return handle(_to_bf16(out), tl.bfloat16)

    def unary_op(self: Any, arg: Any, op: Callable[..., _Array]) -> Any:
        if not _is_bf16(arg):
            return original["unary_op"](self, arg, op)
        return handle(_to_bf16(op(_widen(arg))), tl.bfloat16)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return original["create_fma"](self, x, y, z)
        return handle(_to_bf16(_widen(x) * _widen(y) + _widen(z)), tl.bfloat16)

    # fp32 -> bf16 truncated, and lost NaNs whose payload is in the low half; integers and fp64 -> bf16, and
    # bf16 -> anything but fp32, took the bits for the number.
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        dst = dst_type.scalar
        if dst == tl.bfloat16:
            return src if _is_bf16(src) else handle(_to_bf16(_widen(src)), dst)
        if _is_bf16(src):
            return handle(_widen(src).astype(module._get_np_dtype(dst), copy=False), dst)
        return original["cast_impl"](self, src, dst_type)

    # The path of fp_downcast_rounding="rtz", the only way to ask for truncation.
    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        if dst_type.scalar != tl.bfloat16 or src.data.dtype != np.float32:
            return original["create_fp_to_fp"](self, src, dst_type, rounding)
        if rounding != module._ir.ROUNDING_MODE.RTZ:
            return cast_impl(self, src, dst_type)
        bits = src.data.view(np.uint32) >> 16
        return handle(np.where(np.isnan(src.data), bits | 0x40, bits).astype(np.uint16), tl.bfloat16)

    # There was no way to make a bf16 constant (before 3.9): `x * 0.5` and tl.full(..., tl.bfloat16) raised.
    def get_bf16(self: Any, value: float) -> Any:
        return handle(_to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)

    # max(NaN, 1) is 1 unless propagate_nan is asked for; np.maximum gives NaN (before 3.8).
    def create_maxnumf(self: Any, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self: Any, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    # tl.sum over bf16 added the bits. As fp32 with one rounding at the end; a GPU rounds each step of its
    # tree, so kernels that want a defined sum cast first (ours do).
    reduce_or_scan = module.ReduceScanOpInterface
    apply_original = reduce_or_scan.apply

    def apply(self: Any, tiles: Any) -> Any:
        if not isinstance(tiles, tuple):
            return self.apply((tiles,))[0]
        narrow = [tile.dtype == tl.bfloat16 for tile in tiles]
        if not any(narrow):
            return apply_original(self, tiles)
        wide = (self.to_tensor(_widen(t.handle), tl.float32) if t.dtype == tl.bfloat16 else t for t in tiles)
        out = apply_original(self, tuple(wide))
        return tuple(round_tile(t) if n else t for t, n in zip(out, narrow, strict=True))

    def round_tile(tile: Any) -> Any:
        ty = tl.block_type(tl.bfloat16, tile.type.get_block_shapes()) if tile.type.is_block() else tl.bfloat16
        return tl.tensor(handle(_to_bf16(tile.handle.data), tl.bfloat16), ty)

    # NumPy adds the rows of a tile one after the other, which loses more than a GPU's tree. Tiles are powers of two, so
    # halving them is that tree.
    reduce_ops = module.ReduceOps
    sum_original = reduce_ops.sum

    def tree_sum(self: Any, tile: Any) -> Any:
        data = tile.handle.data
        if data.dtype != np.float32 or self.axis is None:
            return sum_original(self, tile)
        rows = np.moveaxis(data, self.axis, 0)
        while len(rows) > 1:
            rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
        total = np.moveaxis(rows, 0, self.axis) if self.keep_dims else rows[0]
        return self.to_tensor(total, tile.dtype)

    methods = (create_dot, binary_op, unary_op, create_fma, cast_impl, create_fp_to_fp, get_bf16)
    return [
        *((cls, method.__name__, method) for method in (*methods, create_maxnumf, create_minnumf)),
        (reduce_or_scan, "apply", apply),
        (reduce_ops, "sum", tree_sum),
    ]


@functools.cache
def _module_repairs() -> list[tuple[Any, str, Any]]:
    module = _interpreter()
    patch_tensor, patch_lang = module._patch_lang_tensor, module._patch_lang
    np_dtype, known = module._get_np_dtype, {}

    # `range(0, K, BLOCK_K)` takes its bounds through __index__; 3.6 calls int() on an array of one element,
    # which NumPy 2.4 refuses.
    def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    # Every call of a device function, tl.zeros and tl.cdiv too, walked over the whole of triton.language
    # again to replace what the launch had replaced already.
    def _patch_lang(fn: Any) -> Any:
        langs = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if langs and not any(tl.core.is_builtin(lang.load) for lang in langs):
            return module._LangPatchScope()
        return patch_lang(fn)

    # Asked for several times in each operation, and built a table of 22 hashed entries each time.
    def _get_np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = np_dtype(scalar)
        return known[scalar.name]

    return [(module, f.__name__, f) for f in (_patch_lang_tensor, _patch_lang, _get_np_dtype)]
