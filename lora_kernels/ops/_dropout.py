"""Dropout as the `torch` backend applies it: the specification's masks, and on a CPU without ever holding one.

`reference.philox.keep_mask` makes ten new arrays a round, and on a CPU those allocations are most of its time. Here
NumPy's `out=` keeps 2^14 counters at a time in L2, where they also meet the elements they decide about. On one thread:
two Python threads of 10 us steps hand the interpreter's lock to and fro and take 1.8 times as long (1024 x 768).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_kernels.reference import philox

Words = npt.NDArray[np.uint64]
COUNTERS_AT_A_TIME = 1 << 14
ROUNDS = 10
ROUND_A, ROUND_B = np.uint64(philox.ROUND_A), np.uint64(philox.ROUND_B)
LOW_32, HALF = np.uint64(philox.LOW_32), np.uint64(32)
# A mask is applied to the bits, as all ones or all zeros: a product would keep the NaN and Inf of dropped elements.
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def zero_dropped_(blocks: Sequence[Tensor], seed: Tensor, p: float, *, first_row: int) -> None:
    """Zeroes the dropped elements of rows [first_row, first_row + m) of an [M, K] input, in place.

    Args:
        blocks: contiguous [m, K] tensors in one dtype, fp32 or fp64, that share the mask; it is evaluated once.
        seed: [1] int64.
        p: probability to drop, in [0, 1).
        first_row: index of the blocks' first row.
    """
    rows, columns = blocks[0].shape
    bits = [block.view(BITS[block.dtype]) for block in blocks]
    if seed.device.type != "cpu":
        mask = philox.keep_mask(seed, rows, columns, p, first_row=first_row).to(bits[0].dtype).neg_()
        for tensor in bits:
            tensor.bitwise_and_(mask)
        return
    arrays: list[npt.NDArray[Any]] = [block.numpy() for block in bits]
    threshold, keys = np.uint16(philox.dropout_threshold(p)), _round_keys(int(seed))
    groups = -(-columns // philox.COLUMNS_PER_COUNTER)
    # Every intermediate stays in L2 this way.
    step = min(max(1, COUNTERS_AT_A_TIME // groups), rows)
    buffers = np.empty((6, step, groups), np.uint64)
    # A counter's four words, little-endian, are its eight 16-bit pieces in column order.
    pieces = np.empty((step, groups * philox.COLUMNS_PER_COUNTER), "<u2")
    keep = np.empty(pieces.shape, np.bool_)
    ones: npt.NDArray[Any] = np.empty(pieces.shape, arrays[0].dtype)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        words = pieces[:count].view("<u4").reshape(count, groups, 4)
        for index, word in enumerate(_philox_in_place(first_row + start, keys, buffers[:, :count])):
            words[:, :, index] = word  # the cast drops the upper half
        np.greater_equal(pieces[:count], threshold, out=keep[:count])
        np.negative(keep[:count].view(np.int8), out=ones[:count])
        for array in arrays:
            block = array[start : start + count]
            np.bitwise_and(block, ones[:count, :columns], out=block)


def _philox_in_place(first_row: int, keys: list[tuple[Any, Any]], buffers: npt.NDArray[Any]) -> tuple[Words, ...]:
    """Philox4x32-10 of the counters (column group, row, 0, 0) in six buffers; the low 32 bits of each word count."""
    c0, c2, *products = buffers
    rows, groups = c0.shape
    # Two rounds long the words depend on the row or on the group, and c2 alone on both at the end of the second.
    group = np.arange(groups, dtype=np.uint64)[None, :]
    row: Words = np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None]
    (row_key, group_key), (k0, k1) = keys[:2]
    group_product = group * ROUND_A
    row = (row ^ row_key) * ROUND_A
    group = ((group_product >> HALF) ^ group_key) * ROUND_B
    c0[:] = (group >> HALF) ^ k0
    c1, c3 = group, row
    np.bitwise_xor((row >> HALF) ^ k1, group_product & LOW_32, out=c2)
    for index, (k0, k1) in enumerate(keys[2:]):
        # The last round's products are this one's c1 and c3: two pairs take turns.
        product_a, product_b = products[:2] if index % 2 else products[2:]
        np.multiply(c0, ROUND_A, out=product_a)
        np.multiply(c2, ROUND_B, out=product_b)
        for c, product, word, key in ((c0, product_b, c1, k0), (c2, product_a, c3, k1)):
            np.right_shift(product, HALF, out=c)
            np.bitwise_xor(c, word, out=c)
            np.bitwise_xor(c, key, out=c)
            np.bitwise_and(c, LOW_32, out=c)
        c1, c3 = product_b, product_a
    return c0, c1, c2, c3


def _round_keys(seed: int) -> list[tuple[Any, Any]]:
    """The ten keys of a 64-bit seed: its halves, raised by the Weyl constants."""
    low, high = seed & philox.LOW_32, (seed >> 32) & philox.LOW_32
    return [
        (np.uint64((low + i * philox.KEY_A) & philox.LOW_32), np.uint64((high + i * philox.KEY_B) & philox.LOW_32))
        for i in range(ROUNDS)
    ]
