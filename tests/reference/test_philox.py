"""The dropout masks' generator against the published vectors, and the masks against what they promise."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lora_kernels.reference.philox import dropout_scale, dropout_threshold, keep_mask, philox_4x32

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = {
    "zeros": (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
SEEDS = (0, 1, -1, 12345, -(2**63), 2**63 - 1, 0x299F31D0_A4093822)


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64)


def python_words(seed: int, group: int, row: int) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers, as the paper writes it."""
    low = 0xFFFFFFFF
    c, k = [group & low, row & low, 0, 0], [seed & low, (seed >> 32) & low]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def python_keep(seed: int, row: int, column: int, p: float) -> bool:
    word = python_words(seed, column // 8, row)[column % 8 // 2]
    return (word >> 16 * (column % 2)) & 0xFFFF >= min(round(p * 65536), 65535)


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
def test_known_answers(case):
    counter, key, expected = KNOWN_ANSWERS[case]
    words = philox_4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert [word.item() for word in words] == list(expected)


def test_random_counters_and_keys_against_unbounded_integers():
    generator = np.random.default_rng(0)
    for seed, group, row in generator.integers(0, 2**32, (50, 3)).tolist():
        zero = torch.zeros(1, dtype=torch.int64)
        key = (torch.tensor([seed]), torch.tensor([seed ^ 0x5555]))
        words = philox_4x32((torch.tensor([group]), torch.tensor([row]), zero, zero), key)
        assert [w.item() for w in words] == python_words(seed | (seed ^ 0x5555) << 32, group, row)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_is_the_documented_function_of_seed_row_and_column(seed, p):
    mask = keep_mask(seed_of(seed), 5, 21, p)
    assert mask.tolist() == [[python_keep(seed, row, column, p) for column in range(21)] for row in range(5)]


@pytest.mark.parametrize("first_row", [2**31 - 2, 2**31, 2**32 - 3])
def test_rows_past_two_to_the_31(first_row):
    mask = keep_mask(seed_of(7), 3, 9, 0.5, first_row=first_row)
    assert mask.tolist() == [[python_keep(7, first_row + row, column, 0.5) for column in range(9)] for row in range(3)]


def test_columns_far_out():
    first = 2**31 - 8
    mask = keep_mask(seed_of(7), 2, 20, 0.5, first_column=first)
    assert mask.tolist() == [[python_keep(7, row, first + column, 0.5) for column in range(20)] for row in range(2)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (7, 9), (64, 37), (13, 256)])
def test_mask_does_not_depend_on_blocking(shape):
    rows, columns = shape
    whole = keep_mask(seed_of(3), rows, columns, 0.3)
    for step_m, step_n in ((1, 8), (5, 16), (64, 24)):
        for m in range(0, rows, step_m):
            for n in range(0, columns, step_n):
                height, width = min(step_m, rows - m), min(step_n, columns - n)
                block = keep_mask(seed_of(3), height, width, 0.3, first_row=m, first_column=n)
                assert torch.equal(block, whole[m : m + height, n : n + width])


def test_empty_masks():
    assert keep_mask(seed_of(3), 0, 16, 0.5).shape == (0, 16)


@pytest.mark.parametrize("p", [2**-16, 0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", [0, -1])
def test_keep_rate_is_binomial(p, seed):
    n = 1 << 20
    kept = keep_mask(seed_of(seed), 1 << 9, 1 << 11, p).sum().item()
    # Five standard deviations: one in 1.7 million for a fair generator, and a fixed number for a fixed seed.
    assert abs(kept - n * (1 - p)) <= 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("lane", range(8))
def test_each_of_the_eight_pieces_is_fair(lane):
    n, p = 1 << 16, 0.25
    kept = keep_mask(seed_of(11), 1 << 8, 1 << 11, p)[:, lane::8].sum().item()
    assert abs(kept - n * (1 - p)) <= 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize(
    "other", ["row", "column", "word", "half", "seed", "high half of the seed", "sign of the seed"]
)
def test_masks_are_pairwise_independent(other):
    n, p = 1 << 18, 0.5
    mask = keep_mask(seed_of(5), 513, 1024, p)
    first = mask[:-1, :512]
    second = {
        "row": lambda: mask[1:, :512],
        "column": lambda: mask[:-1, 8:520],
        "word": lambda: mask[:-1, 2:514],
        "half": lambda: mask[:-1, 1:513],
        "seed": lambda: keep_mask(seed_of(6), 512, 512, p),
        "high half of the seed": lambda: keep_mask(seed_of(5 + (1 << 32)), 512, 512, p),
        "sign of the seed": lambda: keep_mask(seed_of(-5), 512, 512, p),
    }[other]()
    agreements = (first == second).sum().item()
    assert abs(agreements - n / 2) <= 5 * math.sqrt(n / 4)


def test_drop_is_unbiased_over_seeds():
    p, runs = 0.3, 400
    total = sum(keep_mask(seed_of(s), 8, 64, p).double() for s in range(runs)) * dropout_scale(p)
    # Each entry is a scaled binomial; six deviations for the largest of 512.
    assert ((total / runs - 1).abs() <= 6 * math.sqrt(p / (1 - p) / runs)).all()


@pytest.mark.parametrize(
    ("p", "threshold"),
    [(0.0, 0), (1e-9, 0), (2**-16, 1), (0.1, 6554), (0.5, 32768), (1 - 2**-16, 65535), (1 - 1e-9, 65535)],
)
def test_threshold_and_scale(p, threshold):
    assert dropout_threshold(p) == threshold
    # The scale belongs to the p that is applied, so that the expectation is exact.
    assert dropout_scale(p) * (65536 - threshold) / 65536 == 1.0


def test_p_is_monotone_and_nested():
    # A larger p drops a superset: the level, not the draw, depends on p.
    masks = [keep_mask(seed_of(9), 16, 64, p) for p in (0.0, 0.1, 0.4, 0.8, 1 - 1e-9)]
    assert masks[0].all()
    for less, more in pairwise(masks):
        assert not (more & ~less).any()


def test_p_next_to_one_keeps_one_level_in_65536():
    n = 1 << 20
    kept = keep_mask(seed_of(1), 1 << 10, 1 << 10, 1 - 1e-9).sum().item()
    assert 0 < kept <= n / 65536 + 5 * math.sqrt(n / 65536)


def test_seed_is_left_alone():
    seed = seed_of(-7)
    keep_mask(seed, 4, 4, 0.5)
    assert seed.item() == -7
