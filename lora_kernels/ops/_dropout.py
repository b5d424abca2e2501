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


def zero_dropped(blocks: Sequence[tuple[Tensor, Tensor]], seed: Tensor, p: float, *, first_row: int) -> None:
    """out = mask * source for rows [first_row, first_row + m) of an [M, K] input.

    Args:
        blocks: (source, out) pairs of [m, K] tensors in one dtype, fp32 or fp64, that share the mask: it is evaluated
            once. `out` may be `source`.
        seed: [1] int64.
        p: probability to drop, in [0, 1).
        first_row: index of the blocks' first row.
    """
    rows, columns = blocks[0][0].shape
    bits = [(source.view(BITS[source.dtype]), out.view(BITS[out.dtype])) for source, out in blocks]
    if seed.device.type != "cpu":
        mask = philox.keep_mask(seed, rows, columns, p, first_row=first_row).to(bits[0][0].dtype).neg_()
        for source, out in bits:
            torch.bitwise_and(source, mask, out=out)
        return
    arrays: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = [(source.numpy(), out.numpy()) for source, out in bits]
    threshold, keys = np.uint16(philox.dropout_threshold(p)), _round_keys(int(seed))
    groups = -(-columns // philox.COLUMNS_PER_COUNTER)
    # Every intermediate stays in L2 this way.
    step = min(max(1, COUNTERS_AT_A_TIME // groups), rows)
    buffers = np.empty((5, step, groups), np.uint64)
    # A counter's four words, little-endian, are its eight 16-bit pieces in column order.
    pieces = np.empty((step, groups * philox.COLUMNS_PER_COUNTER), "<u2")
    keep = np.empty(pieces.shape, np.bool_)
    ones: npt.NDArray[Any] = np.empty(pieces.shape, arrays[0][0].dtype)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        words = pieces[:count].view("<u4").reshape(count, groups, 4)
        for index, word in enumerate(_philox_in_place(first_row + start, keys, buffers[:, :count])):
            words[:, :, index] = word  # the cast drops the upper half
        np.greater_equal(pieces[:count], threshold, out=keep[:count])
        np.negative(keep[:count].view(np.int8), out=ones[:count])
        for source, out in arrays:
            np.bitwise_and(source[start : start + count], ones[:count, :columns], out=out[start : start + count])


def _philox_in_place(first_row: int, keys: list[tuple[Any, Any]], buffers: npt.NDArray[Any]) -> tuple[Words, ...]:
    """Philox4x32-10 of the counters (column group, row, 0, 0) in five buffers; the low 32 bits of each word count."""
    c0, c1, c2, c3, high = buffers
    rows, groups = c0.shape
    group = np.arange(groups, dtype=np.uint64)[None, :]
    row: Words = np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None]
    # Of the words that three rounds yield, most depend on the row or on the group alone, and are vectors here: in full
    # are one word of round 2 and two of round 3.
    (row_key, group_key), (group_key_2, row_key_2), (k0, k1) = keys[:3]
    group_a = group * ROUND_A
    row_a = (row ^ row_key) * ROUND_A
    group_b = ((group_a >> HALF) ^ group_key) * ROUND_B
    group_a2 = ((group_b >> HALF) ^ group_key_2) * ROUND_A
    np.bitwise_xor((row_a >> HALF) ^ row_key_2, group_a & LOW_32, out=c1)
    np.multiply(c1, ROUND_B, out=c1)
    np.right_shift(c1, HALF, out=c0)
    np.bitwise_xor(c0, (group_b & LOW_32) ^ k0, out=c0)
    np.bitwise_xor((group_a2 >> HALF) ^ k1, row_a & LOW_32, out=c2)
    c3[:] = group_a2
    for k0, k1 in keys[3:]:
        # A product takes its factor's place: its high half joins the word beside it, and it is that word's successor.
        np.multiply(c0, ROUND_A, out=c0)
        np.multiply(c2, ROUND_B, out=c2)
        for product, word, key in ((c2, c1, k0), (c0, c3, k1)):
            np.right_shift(product, HALF, out=high)
            np.bitwise_xor(word, high, out=word)
            np.bitwise_xor(word, key, out=word)
            np.bitwise_and(word, LOW_32, out=word)
        c0, c1, c2, c3 = c1, c2, c3, c0
    return c0, c1, c2, c3


def _round_keys(seed: int) -> list[tuple[Any, Any]]:
    """The ten keys of a 64-bit seed: its halves, raised by the Weyl constants."""
    low, high = seed & philox.LOW_32, (seed >> 32) & philox.LOW_32
    return [
        (np.uint64((low + i * philox.KEY_A) & philox.LOW_32), np.uint64((high + i * philox.KEY_B) & philox.LOW_32))
        for i in range(ROUNDS)
    ]
