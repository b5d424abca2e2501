"""Device functions that several kernels share: the dropout mask, the rank-sized product, the order of tiles.

    keep(row, col) = u16(seed, row, col) >= threshold

The bits are those of reference/philox.py: Philox4x32-10 with key `seed` and counter (col // 8, row, 0, 0), whose four
words serve eight columns at 16 bits each. One call for eight elements costs a quarter of `tl.rand`'s one call per
element, and the result depends on neither tile shape nor strides.
"""

import triton
import triton.language as tl


@triton.jit
def load_seed(seed_ptr, HAS_OFFSET: tl.constexpr):
    """(key, row, group of columns) that the mask of a launch begins with: (0, 0) unless x is a shard."""
    if HAS_OFFSET:
        return tl.load(seed_ptr), tl.load(seed_ptr + 1).to(tl.int32), (tl.load(seed_ptr + 2) // 8).to(tl.int32)
    return tl.load(seed_ptr), 0, 0


@triton.jit
def keep_tile(seed, offs_row, first_col, threshold, BLOCK_COLS: tl.constexpr):
    """[len(offs_row), BLOCK_COLS] int1 mask of the columns from first_col, a multiple of 8; seed is `load_seed`'s."""
    key, first_row, first_group = seed
    # Counter words stay in their smallest shape; broadcasting fills the tile only from the third round on.
    group = (first_group + first_col // 8 + tl.arange(0, BLOCK_COLS // 8))[None, :]  # [1, BLOCK_COLS / 8]
    row = (first_row + offs_row.to(tl.int32))[:, None]  # [BLOCK_ROWS, 1]
    word_0, word_1, word_2, word_3 = tl.philox(key, group, row, group * 0, row * 0)
    level = tl.cast(threshold, tl.uint32)
    # Compare before interleaving: the tiles that change layout are then int1. The last axis of a join is the fastest,
    # so the nesting (word's high bit, word's low bit, half) reads as col % 8.
    low = tl.join(
        tl.join((word_0 & 0xFFFF) >= level, (word_2 & 0xFFFF) >= level),
        tl.join((word_1 & 0xFFFF) >= level, (word_3 & 0xFFFF) >= level),
    )
    high = tl.join(
        tl.join((word_0 >> 16) >= level, (word_2 >> 16) >= level),
        tl.join((word_1 >> 16) >= level, (word_3 >> 16) >= level),
    )
    return tl.reshape(tl.join(low, high), (offs_row.shape[0], BLOCK_COLS))


@triton.jit
def kahan_add(acc, lost, term):
    """(acc + term, what that addition lost): the error of a chain of additions stays at one rounding.

    Where Inf has come in, Inf - Inf says nothing was lost, so that Inf stays Inf as in a plain sum.
    """
    corrected = term - lost
    total = acc + corrected
    lost = (total - acc) - corrected
    return total, tl.where(lost == lost, lost, 0.0)  # noqa: PLR0124 - NaN is what differs from itself


@triton.jit
def leading_bits(t, LOST: tl.constexpr, ROUNDED: tl.constexpr = False):
    """fp32 t without the last LOST bits of its 24, cut toward zero, or ROUNDED where it is finite; Inf and NaN stay."""
    bits = t.to(tl.int32, bitcast=True)
    if ROUNDED:
        bits += 1 << (LOST - 1)
    cut = (bits & -(1 << LOST)).to(tl.float32, bitcast=True)
    return tl.where(t == t, cut, t)  # noqa: PLR0124 - NaN is what differs from itself


@triton.jit
def lesser_part(part, first):
    """part, or 2^-40 of the first where nothing is left: Inf meets no zero then, and Inf stays Inf."""
    return tl.where(part == 0.0, first * 9.094947017729282e-13, part)


@triton.jit
def low_rank_dot(lhs, rhs, acc, PRECISION: tl.constexpr):
    """acc + lhs rhs, where rhs may be fp32 beside a 16-bit lhs: fp32 adapters never pass through 16 bits.

    The fp32 operand is cut in parts of one sign, whose sum it is, so that every product is exact in fp32. Beside bf16
    three parts of bf16: 3 x 8 bits are all of its significand, and the large operand stays as it lies in memory. Beside
    fp16, which is exact in tf32, two of tf32: 11 bits, and the 13 that are left rounded to as many, 2^-22 of the value.
    tf32x3 would cut lhs, too, whose second part is zero: a third product of nothing.

    Each step is summed by itself and then added: an H200's wgmma truncates its accumulator, and dA [16, 4096] from 8192
    rows, chained through all of them, erred by 7e-6.
    """
    if lhs.dtype == tl.bfloat16 and rhs.dtype == tl.float32:
        first = leading_bits(rhs, 16)
        rest = tl.where(tl.abs(rhs) < float("inf"), rhs - first, 0.0)
        second = leading_bits(rest, 16)
        step = tl.dot(lhs, lesser_part(rest - second, first).to(tl.bfloat16))
        step = tl.dot(lhs, lesser_part(second, first).to(tl.bfloat16), step)
        return acc + tl.dot(lhs, first.to(tl.bfloat16), step)
    if lhs.dtype == tl.float16 and rhs.dtype == tl.float32 and PRECISION != "ieee":
        wide = lhs.to(tl.float32)
        first = leading_bits(rhs, 13)
        rest = tl.where(tl.abs(rhs) < float("inf"), rhs - first, 0.0)
        second = leading_bits(rest, 13, ROUNDED=True)  # the matrix unit would cut it, always to the same side
        step = tl.dot(wide, lesser_part(second, first), input_precision="tf32")
        return acc + tl.dot(wide, first, step, input_precision="tf32")
    if lhs.dtype != rhs.dtype:
        lhs = lhs.to(tl.float32)
        rhs = rhs.to(tl.float32)
    return tl.dot(lhs, rhs, acc, input_precision=PRECISION)


@triton.jit
def masked_dot(lhs, rhs, acc, PRECISION: tl.constexpr):
    """acc + lhs rhs for an lhs that was just masked, and so may be wgmma's operand in registers: done when it returns.

    Triton 3.6 and 3.7 leave such products running into the next step, whose mask they then let write the registers that
    are still being read (tests/compile/hazards.py). Here the sum of the step is an operand of the next instruction. As
    a multiplication by one, since Triton makes a product onto acc of a plain sum.
    """
    return tl.fma(low_rank_dot(lhs, rhs, tl.zeros_like(acc), PRECISION), tl.full(acc.shape, 1.0, tl.float32), acc)


@triton.jit
def finite_part(t):
    """t in fp32 with zeros for Inf and NaN, which then meet only the product that they belong to: Inf * 0 is NaN."""
    wide = t.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), wide, 0.0)


@triton.jit
def expand_dot(s, e, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + s e onto a tile of a 16-bit (WIDE: s and e are fp32 beside it) or fp32 output.

    WIDE splits each fp32 value into two bf16, 16 bits of significand in fp32's range, and chains three products on one
    accumulator: 2^-17 of the term, far under y's own rounding. Triton's tf32x3 keeps a second accumulator of the tile's
    size, which at 128 x 256 spills 544 B a thread on sm_90; this spills none.
    """
    if WIDE:
        s_high, e_high = s.to(tl.bfloat16), e.to(tl.bfloat16)
        s_finite, e_finite = finite_part(s_high), finite_part(e_high)
        acc = tl.dot((finite_part(s) - s_finite).to(tl.bfloat16), e_finite.to(tl.bfloat16), acc)
        acc = tl.dot(s_finite.to(tl.bfloat16), (finite_part(e) - e_finite).to(tl.bfloat16), acc)
        return tl.dot(s_high, e_high, acc)
    return tl.dot(s, e, acc, input_precision=PRECISION)


@triton.jit
def without_gain(acc, gain, s_dtype: tl.constexpr):
    """acc, onto which gain * (s e) is to be added by `with_gain(acc + s e)`: an fp16 s has a power of two taken out.

    Scaling the accumulator is exact, and takes no second one.
    """
    return acc * tl.div_rn(1.0, gain) if s_dtype == tl.float16 else acc


@triton.jit
def with_gain(acc, gain, s_dtype: tl.constexpr):
    """Puts the power of two back."""
    return acc * gain if s_dtype == tl.float16 else acc


@triton.jit
def grouped_tile(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) that walks GROUP_M rows of tiles per column, so that concurrent programs share operands in L2."""
    per_group = GROUP_M * num_n
    first_m = (pid // per_group) * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (pid % per_group) % rows, (pid % per_group) // rows


@triton.jit
def expand_into(
    acc, s_ptr, e_ptr, seed, threshold, gain,
    M, N, R, offs_m, offs_n, first_n,
    stride_s_m, stride_e_r, stride_e_n,
    HAS_DROPOUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + gain mask * (s e), the rank in steps of BLOCK_R; s [M, R] has unit stride along R."""
    low_rank = tl.zeros_like(acc) if HAS_DROPOUT else without_gain(acc, gain, s_ptr.dtype.element_ty)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        # [BLOCK_M, BLOCK_R]
        s = tl.load(
            s_ptr + offs_m.to(tl.int64)[:, None] * stride_s_m + offs_r[None, :],
            mask=(offs_m[:, None] < M) & (offs_r[None, :] < R),
            other=0.0,
        )
        # [BLOCK_R, BLOCK_N]
        e = tl.load(
            e_ptr + offs_r.to(tl.int64)[:, None] * stride_e_r + offs_n.to(tl.int64)[None, :] * stride_e_n,
            mask=(offs_r[:, None] < R) & (offs_n[None, :] < N),
            other=0.0,
        )
        low_rank = expand_dot(s, e, low_rank, WIDE, PRECISION)
    low_rank = with_gain(low_rank, gain, s_ptr.dtype.element_ty)
    if HAS_DROPOUT:
        keep = keep_tile(seed, offs_m, first_n, threshold, BLOCK_N)
        return acc + tl.where(keep, low_rank, 0.0)
    return low_rank
