"""Dropout masks as a function of (seed, row, column): Philox4x32-10 in integer torch arithmetic.

A mask is never stored. Every backend recomputes

    keep(row, col) = u16(seed, row, col) >= threshold(p)

where u16 is one of the eight 16-bit pieces that the counter (col // 8, row, 0, 0) yields under the 64-bit key `seed`:
word (col % 8) // 2, low half for even columns, high half for odd ones. Rows are tokens after flattening x to [M, K].
Where x is a shard of a larger input, rows and columns count in that one: a seed tensor of three elements, [key, first
row, first column], says where x begins, and the shards' masks together are the whole input's. The Triton kernels
evaluate the same function in uint32 registers; tests compare the two bit for bit.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (section 4, Philox-4x32-10).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
LOW_32 = 0xFFFFFFFF
COLUMNS_PER_COUNTER = 8
LEVELS = 1 << 16
# What bounds the memory: each counter holds several int64 at once, 1 MiB and 64 MiB together. Smaller pieces cost a CPU
# nothing (`bench.choices`); a GPU must be filled.
COUNTERS_AT_A_TIME = {"cpu": 1 << 14, "cuda": 1 << 20}


def dropout_threshold(p: float) -> int:
    """The number of 16-bit values that drop an element: p to the nearest 1/65536, always below 65536."""
    return min(round(p * LEVELS), LEVELS - 1)


def dropout_scale(p: float) -> float:
    """1 / (1 - p) for the p that is really applied, so that the expectation of drop(x) is exactly x."""
    return LEVELS / (LEVELS - dropout_threshold(p))


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten Philox rounds over broadcastable int64 tensors that hold uint32 values.

    A product of two uint32 values wraps in int64, but its bits are right: a shift and a mask read the high word back.
    The low words keep their upper half until the end, since they only meet xors whose result is masked.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_a, product_b = c0 * ROUND_A, c2 * ROUND_B
        c0, c1 = ((product_b >> 32) ^ c1 ^ k0) & LOW_32, product_b
        c2, c3 = ((product_a >> 32) ^ c3 ^ k1) & LOW_32, product_a
        k0, k1 = (k0 + KEY_A) & LOW_32, (k1 + KEY_B) & LOW_32
    return c0, c1 & LOW_32, c2, c3 & LOW_32


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, *, first_row: int = 0, first_column: int = 0) -> Tensor:
    """The dropout mask of a [rows, columns] block of an [M, K] input.

    Args:
        seed: int64, [1] or [3]: a key of 64 bits, and the row and column (a multiple of 8) at which [M, K] begins.
        rows: rows of the block.
        columns: columns of the block.
        p: probability to drop, in [0, 1).
        first_row: the block's first row in [M, K], for masks made block by block.
        first_column: its first column, a multiple of 8.

    Returns:
        [rows, columns] bool on seed's device; True keeps the element.

    Source:
        SC 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox-4x32-10.
    """
    first_group = first_column // COLUMNS_PER_COUNTER
    groups = -(-columns // COLUMNS_PER_COUNTER)
    group = torch.arange(first_group, first_group + groups, dtype=torch.int64, device=seed.device)[None, :]
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=seed.device)[:, None]
    zero = torch.zeros(1, 1, dtype=torch.int64, device=seed.device)
    key = (seed[:1] & LOW_32, (seed[:1] >> 32) & LOW_32)
    if seed.numel() > 1:
        row, group = (row + seed[1]) & LOW_32, (group + seed[2] // COLUMNS_PER_COUNTER) & LOW_32

    threshold = dropout_threshold(p)
    keep = torch.empty(rows, groups, COLUMNS_PER_COUNTER, dtype=torch.bool, device=seed.device)
    step = max(1, COUNTERS_AT_A_TIME.get(seed.device.type, COUNTERS_AT_A_TIME["cuda"]) // groups)
    for block_row, block_keep in zip(row.split(step), keep.split(step), strict=True):
        for index, word in enumerate(philox_4x32((group, block_row, zero, zero), key)):
            torch.ge(word & 0xFFFF, threshold, out=block_keep[:, :, 2 * index])
            torch.ge(word, threshold << 16, out=block_keep[:, :, 2 * index + 1])
    return keep.view(rows, groups * COLUMNS_PER_COUNTER)[:, :columns]
