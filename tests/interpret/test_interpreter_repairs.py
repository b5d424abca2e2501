"""Triton's interpreter, fault by fault: right inside `repaired()`, and what it was repaired for outside.

Expected values are torch's own (its bf16 is exact and rounds to nearest even), or small integers, whose
products and sums are exact in every type concerned: equality throughout, no tolerances.
"""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.kernels.interpreter import is_interpreting, repaired

HALVES = (torch.float16, torch.bfloat16)
PHILOX_KEY_STEP = 0x9E3779B9, 0xBB67AE85
PHILOX_MULTIPLIER = 0xD2511F53, 0xCD9E8D57


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in dtype and in every bit, the sign of zero included; any NaN equals any NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if expected.is_floating_point():
        number = ~expected.isnan()
        assert torch.equal(actual.signbit()[number], expected.signbit()[number])


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def every_half(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 values of a 16-bit type: subnormals, infinities and NaNs among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def around_every_bf16() -> torch.Tensor:
    """Fp32 values at, next to and halfway between all bf16 values, and 2**18 random ones."""
    high = torch.arange(2**16)[:, None] << 16
    bits = (high + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    noise = torch.randint(0, 2**32, (2**18,), generator=torch.Generator().manual_seed(1))
    bits = torch.cat([bits, noise])
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)


# -- kernels -------------------------------------------------------------------------------------------------


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, ROUNDING: tl.constexpr, BLOCK_N: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=offs < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + rows * BLOCK + columns)
    b = tl.load(b_ptr + rows * BLOCK + columns)
    acc = tl.full((BLOCK, BLOCK), 1.0, dtype=y_ptr.dtype.element_ty)
    acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION, out_dtype=y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows * BLOCK + columns, acc)


@triton.jit
def arithmetic_kernel(x_ptr, z_ptr, y_ptr, OP: tl.constexpr, BLOCK_N: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + offs)
    z = tl.load(z_ptr + offs)
    if OP == "add":
        y = x + z
    elif OP == "sub":
        y = x - z
    elif OP == "mul":
        y = x * z
    elif OP == "div":
        y = (x / z).to(x.dtype)
    elif OP == "half":
        y = x * 0.5
    elif OP == "neg":
        y = -x
    elif OP == "abs":
        y = tl.abs(x)
    elif OP == "fma":
        y = tl.fma(x, z, x)
    elif OP == "max":
        y = tl.maximum(x, z)
    elif OP == "where":
        y = tl.where((x < z) & (offs >= 0), x, z)
    elif OP == "less":
        y = (x < z).to(x.dtype)
    elif OP == "nonzero":
        y = x.to(tl.int1).to(x.dtype)
    else:
        y = tl.full((BLOCK_N,), 0.3, x.dtype)
    tl.store(y_ptr + offs, y)


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, max_ptr, total_ptr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, ROWS)
    x = tl.load(x_ptr + rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    tl.store(sum_ptr + rows, tl.sum(x, axis=1))
    tl.store(max_ptr + rows, tl.max(x, axis=1))
    tl.store(total_ptr, tl.sum(x))


@triton.jit
def copy_rows_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n - 1, other=-1.0), mask=offs < n)


@triton.jit
def philox_kernel(seed_ptr, y_ptr, row, BLOCK: tl.constexpr):
    group = tl.arange(0, BLOCK).to(tl.uint32)
    rows = group * 0 + tl.cast(row, tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), group, rows, group * 0, group * 0)
    # 64-bit words in memory order 0 1 2 3: the innermost join is the slowest of the two.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(4 * BLOCK)
    tl.store(y_ptr + tl.arange(0, 4 * BLOCK), words.to(tl.int64))


@triton.jit
def bits_kernel(x_ptr, z_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    z = tl.load(z_ptr + offs)
    low = x.to(tl.uint32)
    tl.store(y_ptr + offs, tl.umulhi(low, z.to(tl.uint32)).to(tl.int64))
    tl.store(y_ptr + BLOCK + offs, (low >> 16).to(tl.int64))
    tl.store(y_ptr + 2 * BLOCK + offs, ((low ^ z.to(tl.uint32)) & 0xFFFF).to(tl.int64))
    tl.store(y_ptr + 3 * BLOCK + offs, (x.to(tl.uint64) >> 32).to(tl.int64))
    tl.store(y_ptr + 4 * BLOCK + offs, (low * z.to(tl.uint32)).to(tl.int64))


@triton.jit
def tile_copy_kernel(x_desc, y_desc, row, column):
    tile = x_desc.load([row, column])
    y_desc.store([row, column], tile)


@triton.jit
def tile_read_kernel(x_desc, y_ptr, row, column, BLOCK: tl.constexpr):
    tile = x_desc.load([row, column])
    tl.store(y_ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], tile)


@triton.jit
def stored_scale(x, scale):
    return x * tl.cast(scale, tl.float32)


@triton.jit
def device_function_kernel(x_ptr, y_ptr, scale, n, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(tl.cdiv(n, BLOCK)):
        acc += stored_scale(tl.load(x_ptr + tl.arange(0, BLOCK)).to(tl.float32), scale)
    tl.store(y_ptr + tl.arange(0, BLOCK), acc)


@triton.jit
def offset_kernel(x_ptr, y_ptr, stride, WIDE: tl.constexpr):
    row = tl.program_id(0) + 2
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y_ptr, row * stride)


# -- cases: each asserts -------------------------------------------------------------------------------------


def cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(triton.cdiv(x.numel(), 2**16),)](x, y, x.numel(), rounding, 2**16)
    return y


def arithmetic(op: str, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    arithmetic_kernel[(1,)](x, z, y, op, x.numel())
    return y


def pairs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    values = every_half(dtype)
    return values, values[torch.randperm(2**16, generator=torch.Generator().manual_seed(2))]


def fp32_to_bf16() -> None:
    x = around_every_bf16()
    same(cast(x, torch.bfloat16), x.to(torch.bfloat16))


def fp32_to_bf16_toward_zero() -> None:
    x = around_every_bf16()
    truncated = (x.view(torch.int32) & -(2**16)).view(torch.float32).to(torch.bfloat16)
    same(cast(x, torch.bfloat16, "rtz"), torch.where(x.isnan(), torch.nan, truncated))


def int32_to_bf16() -> None:
    x = torch.arange(-(2**10), 2**10, dtype=torch.int32)
    same(cast(x, torch.bfloat16), x.to(torch.bfloat16))


def bf16_to_int32() -> None:
    x = torch.arange(-(2**8), 2**8).to(torch.bfloat16)
    same(cast(x, torch.int32), x.to(torch.int32))


def fp16_to_bf16() -> None:
    x = every_half(torch.float16)
    same(cast(x, torch.bfloat16), x.to(torch.bfloat16))


def dot(dtype: torch.dtype, out: torch.dtype, precision: str | None) -> None:
    a, b, y = (
        integers(16, 16, dtype=dtype),
        integers(16, 16, dtype=dtype, seed=1),
        torch.empty(16, 16, dtype=out),
    )
    dot_kernel[(1,)](a, b, y, precision, 16)
    same(y, (a.double() @ b.double().T + 1).to(out))


def dot_bf16() -> None:
    dot(torch.bfloat16, torch.float32, None)


def dot_fp16_rounds_once() -> None:
    # 2048 + 1 + 1 is 2048 when summed in fp16, 2050 when summed in fp32.
    a, b, y = torch.zeros(16, 16).half(), torch.ones(16, 16).half(), torch.empty(16, 16).half()
    a[:, 0], a[:, 1] = 2048, 1
    dot_kernel[(1,)](a, b, y, None, 16)
    same(y, torch.full_like(y, 2050))


def dot_bf16x3() -> None:
    dot(torch.float32, torch.float32, "bf16x3")


def bf16_arithmetic() -> None:
    x, z = pairs(torch.bfloat16)
    same(arithmetic("add", x, z), x + z)
    same(arithmetic("sub", x, z), x - z)
    same(arithmetic("mul", x, z), x * z)
    same(arithmetic("div", x, z), x / z)
    same(arithmetic("neg", x, z)[x != 0], -x[x != 0])  # before 3.8 minus is 0 - x, and -(0.0) is 0.0: on a GPU too
    same(arithmetic("fma", x, z), (x.float() * z.float() + x.float()).bfloat16())


def bf16_comparisons() -> None:
    x, z = pairs(torch.bfloat16)
    same(arithmetic("less", x, z), (x < z).bfloat16())
    same(arithmetic("where", x, z), torch.where(x < z, x, z))
    same(arithmetic("nonzero", x, z), (x != 0).bfloat16())


def bf16_maximum() -> None:
    x, z = pairs(torch.bfloat16)
    number = (x != 0) | (z != 0)  # the sign of max(-0.0, 0.0) is anyone's
    expected = torch.where(x.isnan(), z, torch.where(z.isnan(), x, torch.maximum(x, z)))
    same(arithmetic("max", x, z)[number], expected[number])


def bf16_constants() -> None:
    x, z = pairs(torch.bfloat16)
    same(arithmetic("half", x, z), x * 0.5)
    same(arithmetic("full", x, z), torch.full_like(x, 0.3))


def bf16_reductions() -> None:
    x = integers(4, 8, dtype=torch.bfloat16)
    rows, largest, total = (torch.empty(n, dtype=torch.bfloat16) for n in (4, 4, 1))
    reduce_kernel[(1,)](x, rows, largest, total, 4, 8)
    same(rows, x.sum(1))
    same(largest, x.amax(1))
    same(total[0], x.sum())


def overflow_is_silent() -> None:
    x = torch.tensor([3e38, 7e4, torch.inf, torch.nan]).repeat(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(cast(x, torch.float16), x.half())
        same(arithmetic("sub", x, x), x - x)


def runtime_loop_bounds() -> None:
    x, y = integers(10), torch.empty(10)
    copy_rows_kernel[(1,)](x, y, 10, 4)
    same(y, torch.cat([x[:9], torch.tensor([-1.0])]))


def fp16_casts() -> None:
    x = around_every_bf16()
    same(cast(x, torch.float16), x.half())
    same(cast(every_half(torch.float16), torch.float32), every_half(torch.float16).float())


def bf16_widens() -> None:
    x = every_half(torch.bfloat16)
    same(cast(x, torch.float32), x.float())
    same(cast(x, torch.float16), x.half())
    same(arithmetic("abs", x, x), x.abs())


def fp16_arithmetic() -> None:
    x, z = pairs(torch.float16)
    same(arithmetic("add", x, z), x + z)
    same(arithmetic("mul", x, z), x * z)
    same(arithmetic("div", x, z), x / z)
    same(arithmetic("half", x, z), x * 0.5)


def dot_precisions() -> None:
    for precision in ("ieee", "tf32", "tf32x3"):
        for dtype in (torch.float32, *HALVES):
            dot(dtype, torch.float32, precision)


def philox_words() -> None:
    seed, row, y = 0x3FEDCBA987654321, 2**31 + 5, torch.empty(16, dtype=torch.int64)
    philox_kernel[(1,)](torch.tensor([seed]), y, row, 4)
    expected = []
    for group in range(4):
        c, k = [group, row, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = PHILOX_MULTIPLIER[0] * c[0], PHILOX_MULTIPLIER[1] * c[2]
            c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(key + step) & 0xFFFFFFFF for key, step in zip(k, PHILOX_KEY_STEP, strict=True)]
        expected += c
    same(y, torch.tensor(expected))


def unsigned_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    x, z = (torch.randint(0, 2**62, (64,), generator=generator) for _ in range(2))
    y = torch.empty(5, 64, dtype=torch.int64)
    bits_kernel[(1,)](x, z, y, 64)
    low = [(a & 0xFFFFFFFF, b & 0xFFFFFFFF) for a, b in zip(x.tolist(), z.tolist(), strict=True)]
    expected = [
        [a * b >> 32 for a, b in low],
        [a >> 16 for a, _ in low],
        [(a ^ b) & 0xFFFF for a, b in low],
        [a >> 32 for a in x.tolist()],
        [a * b & 0xFFFFFFFF for a, b in low],
    ]
    same(y, torch.tensor(expected))


def descriptors_pad_and_clip() -> None:
    for dtype in (torch.float32, *HALVES):
        x, y = integers(20, 24, dtype=dtype), torch.full((20, 24), 99, dtype=dtype)
        tile = torch.full((16, 16), 99, dtype=dtype)
        x_desc, y_desc = (TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, y))
        tile_copy_kernel[(1,)](x_desc, y_desc, 16, 16)
        tile_read_kernel[(1,)](x_desc, tile, 16, 16, 16)
        expected, padded = torch.full_like(y, 99), torch.zeros_like(tile)
        expected[16:, 16:] = padded[:4, :8] = x[16:, 16:]
        same(y, expected)
        same(tile, padded)


def device_functions() -> None:
    x, y = integers(8, dtype=torch.bfloat16), torch.empty(8)
    device_function_kernel[(1,)](x, y, 0.25, 9, 8)
    same(y, x.float() * 0.5)


FAULTS: tuple[Callable[[], None], ...] = (
    fp32_to_bf16,
    fp32_to_bf16_toward_zero,
    int32_to_bf16,
    fp16_to_bf16,
    dot_bf16,
    dot_fp16_rounds_once,
    dot_bf16x3,
    bf16_arithmetic,
    bf16_comparisons,
    bf16_maximum,
    bf16_constants,
    bf16_reductions,
    overflow_is_silent,
    runtime_loop_bounds,
)
# Right as Triton has it, and relied upon: a repair must not break it, nor a later Triton.
RELIED_UPON: tuple[Callable[[], None], ...] = (
    bf16_to_int32,
    fp16_casts,
    bf16_widens,
    fp16_arithmetic,
    dot_precisions,
    philox_words,
    unsigned_bits,
    descriptors_pad_and_clip,
    device_functions,
)


@pytest.mark.parametrize("case", [*FAULTS, *RELIED_UPON], ids=lambda case: case.__name__)
def test_repaired_interpreter_is_right(case: Callable[[], None]) -> None:
    with repaired():
        case()


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.__name__)
def test_fault_exists_without_the_repair(case: Callable[[], None]) -> None:
    try:
        with np.errstate(all="ignore") if case is not overflow_is_silent else np.errstate():
            case()
    except Exception:
        return
    pytest.skip(f"Triton {triton.__version__} with NumPy {np.__version__} is right by itself")


def test_interpreting_is_seen() -> None:
    assert is_interpreting()


def test_repair_is_undone_however_it_ends() -> None:
    owners = (
        interpreter,
        interpreter.InterpreterBuilder,
        interpreter.interpreter_builder,
        interpreter.ReduceScanOpInterface,
    )

    def state() -> list[dict[str, object]]:
        return [dict(vars(owner)) for owner in owners]

    before, errors = state(), np.geterr()
    with repaired():
        inside = state()
        with repaired():
            assert state() == inside
        assert state() == inside
        assert inside != before
    assert state() == before
    with pytest.raises(KeyError), repaired():
        raise KeyError
    assert state() == before
    assert np.geterr() == errors


def test_integer_overflow_is_found_on_request() -> None:
    y = torch.empty(1, dtype=torch.int64)
    with repaired(check_overflow=True):
        offset_kernel[(1,)](y, y, 2**30, WIDE=True)
        same(y, torch.tensor([2**31]))
        with pytest.raises(Exception, match="overflow"):
            offset_kernel[(1,)](y, y, 2**30, WIDE=False)
    with repaired():
        offset_kernel[(1,)](y, y, 2**30, WIDE=False)
        same(y, torch.tensor([-(2**31)]))
