"""The dropout mask as the `torch` backend makes it: the specification's bits, and on a CPU in place.

`reference.philox.keep_mask` makes ten new arrays a round, and on a CPU those allocations are most of its time. With
NumPy's `out=`, on arrays that stay in L2, a mask of 1024 x 2048 takes half of it, and half of what F.dropout takes
(8, 17 and 18 ms of one core of a Xeon with AVX-512), and unlike both it uses every core.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, *, first_row: int = 0) -> Tensor:
    """`reference.philox.keep_mask`, bit for bit: [rows, columns] bool on seed's device."""
    if seed.device.type != "cpu":
        return philox.keep_mask(seed, rows, columns, p, first_row=first_row)
    groups = -(-columns // philox.COLUMNS_PER_COUNTER)
    keep = torch.empty(rows, groups * philox.COLUMNS_PER_COUNTER, dtype=torch.bool)
    threshold, keys = np.uint16(philox.dropout_threshold(p)), _round_keys(int(seed))
    # NumPy lets go of the interpreter's lock, so threads help; fewer rows than this are not worth starting them.
    share = max(-(-rows // torch.get_num_threads()), COUNTERS_AT_A_TIME // groups, 1)
    shares = [(first_row + start, keep[start : start + share].numpy()) for start in range(0, rows, share)]
    if len(shares) == 1:
        _fill(first_row, shares[0][1], keys, threshold)
    else:
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(lambda share: _fill(share[0], share[1], keys, threshold), shares))
    return keep[:, :columns]


def _fill(first_row: int, keep: npt.NDArray[np.bool_], keys: list[tuple[Any, Any]], threshold: np.uint16) -> None:
    """Writes the mask of the rows from first_row into keep [rows, a multiple of 8]."""
    rows, columns = keep.shape
    groups = columns // philox.COLUMNS_PER_COUNTER
    step = max(1, COUNTERS_AT_A_TIME // groups)
    buffers = np.empty((6, min(step, rows), groups), np.uint64)
    # A counter's four words, little-endian, are its eight 16-bit pieces in column order.
    pieces = np.empty((min(step, rows), columns), "<u2")
    for start in range(0, rows, step):
        block = keep[start : start + step]
        count = len(block)
        words = pieces[:count].view("<u4").reshape(count, groups, 4)
        for index, word in enumerate(_philox_in_place(first_row + start, keys, buffers[:, :count])):
            words[:, :, index] = word  # the cast drops the upper half
        np.greater_equal(pieces[:count], threshold, out=block)


def _philox_in_place(first_row: int, keys: list[tuple[Any, Any]], buffers: npt.NDArray[Any]) -> tuple[Words, ...]:
    """Philox4x32-10 of the counters (column group, row, 0, 0) in six buffers; the low 32 bits of each word count."""
    c0, c2, *products = buffers
    rows, groups = c0.shape
    c0[:] = np.arange(groups, dtype=np.uint64)[None, :]
    c2[:] = 0
    c1: Words = np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None]
    c3 = np.zeros((1, 1), np.uint64)
    for index, (k0, k1) in enumerate(keys):
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
