"""Dropout as the `torch` backend applies it: the specification's masks, and on a CPU without ever holding one.

`reference.philox.keep_mask` makes ten new arrays a round, and on a CPU those allocations are most of its time. Here
NumPy's `out=` keeps 2^14 counters at a time in L2: twice as fast (`bench.choices`). The rounds run on one thread,
since each of their short steps takes the interpreter's lock; masks are applied by all.
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
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Dropper:
    """out = mask * source for blocks of rows of an [M, K] input, in buffers that the blocks share.

    Args:
        seed: [1] or [3] int64 on the blocks' device, as in `philox.keep_mask`.
        p: probability to drop, in [0, 1).
        rows: the most rows of a block.
        columns: K.
        dtype: of sources and outs, fp32 or fp64.
    """

    def __init__(self, seed: Tensor, p: float, *, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._seed, self._p, self._columns = seed, p, columns
        self._ones = torch.empty((rows, columns), dtype=BITS[dtype], device=seed.device)
        self._keep = _KeepMask(seed, p, rows, columns) if seed.device.type == "cpu" else None

    def __call__(self, blocks: Sequence[tuple[Tensor, Tensor]], *, first_row: int) -> None:
        """For (source, out) pairs of [m, K] that share the mask of rows first_row ...: it is evaluated once.

        `out` may be `source`. The mask multiplies the bits, by 1 or 0: a product of values would keep the NaN and Inf
        of dropped elements.
        """
        rows = blocks[0][0].shape[0]
        if self._keep is not None:
            keep = self._keep(first_row, rows)
        else:
            keep = philox.keep_mask(self._seed, rows, self._columns, self._p, first_row=first_row)
        ones = self._ones[:rows].copy_(keep)
        for source, out in blocks:
            torch.mul(source.view(ones.dtype), ones, out=out.view(ones.dtype))


class _KeepMask:
    """`philox.keep_mask` of blocks of rows on a CPU, [m, K] bool; the result lives until the next call."""

    def __init__(self, seed: Tensor, p: float, rows: int, columns: int) -> None:
        key, self._row, first_column = [int(value) for value in seed] if seed.numel() > 1 else (int(seed), 0, 0)
        self._threshold, self._keys = np.uint16(philox.dropout_threshold(p)), _round_keys(key)
        self._columns, self._groups = columns, -(-columns // philox.COLUMNS_PER_COUNTER)
        first_group = first_column // philox.COLUMNS_PER_COUNTER
        self._group = (np.arange(first_group, first_group + self._groups).astype(np.uint64) & LOW_32)[None, :]
        # Every intermediate stays in L2 this way.
        self._step = min(max(1, COUNTERS_AT_A_TIME // self._groups), rows)
        self._buffers = np.empty((5, self._step, self._groups), np.uint64)
        # A counter's four words, little-endian, are its eight 16-bit pieces in column order.
        self._words = np.empty((self._step, self._groups, 4), "<u4")
        self._keep = np.empty((rows, self._groups * philox.COLUMNS_PER_COUNTER), np.bool_)

    def __call__(self, first_row: int, rows: int) -> Tensor:
        for start in range(0, rows, self._step):
            count = min(self._step, rows - start)
            words = self._words[:count]
            row = self._row + first_row + start
            philox_words = _philox_in_place(row, self._group, self._keys, self._buffers[:, :count])
            for index, word in enumerate(philox_words):
                words[:, :, index] = word  # the cast drops the upper half
            pieces = words.view("<u2").reshape(count, -1)
            np.greater_equal(pieces, self._threshold, out=self._keep[start : start + count])
        return torch.from_numpy(self._keep[:rows, : self._columns])


def _philox_in_place(
    first_row: int, group: Words, keys: list[tuple[Any, Any]], buffers: npt.NDArray[Any]
) -> tuple[Words, ...]:
    """Philox4x32-10 of the counters (column group, row, 0, 0) in five buffers; the low 32 bits of each word count."""
    c0, c1, c2, c3, high = buffers
    row: Words = (np.arange(first_row, first_row + len(c0)).astype(np.uint64) & LOW_32)[:, None]
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
