"""What a truncating accumulator makes of fp32 adapters in three bf16 parts: chained through all rows, and step by step.

A model of Hopper's tensor cores, whose sums of 16 products are exact and cut to 24 bits toward zero. An H200 gave dA
over 2048 rows a split an error of 6.9e-6 where the three parts were chained (docs/design/numerics.md).
"""

import numpy as np
import pytest

ROWS, STEP, PRODUCTS = 2048, 64, 16
COLUMNS, RANK = 64, 16


def truncated(values):
    """fp64 cut to fp32's 24 bits of significand, toward zero."""
    fraction, exponent = np.frexp(values)
    return np.ldexp(np.trunc(fraction * 2.0**24) / 2.0**24, exponent)


def leading_bits(values):
    """As `kernels.device.leading_bits`."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def chain(acc, x, part):
    for row in range(0, len(x), PRODUCTS):
        rows = slice(row, row + PRODUCTS)
        acc = truncated(acc + x[rows].astype(np.float64).T @ part[rows].astype(np.float64))
    return acc


@pytest.fixture(scope="module")
def operands():
    generator = np.random.default_rng(0)
    x = leading_bits(generator.standard_normal((ROWS, COLUMNS)).astype(np.float32))
    dyb = generator.standard_normal((ROWS, RANK)).astype(np.float32)
    first = leading_bits(dyb)
    second = leading_bits(dyb - first)
    parts = (dyb - first - second, second, first)
    assert all(np.array_equal(leading_bits(part), part) for part in parts)
    assert np.array_equal(sum(part.astype(np.float64) for part in parts), dyb.astype(np.float64))
    return x, parts, x.astype(np.float64).T @ dyb.astype(np.float64)


def error(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


def test_a_chain_over_all_rows_errs_as_the_gpu_did(operands):
    x, parts, truth = operands
    acc = np.zeros_like(truth)
    for row in range(0, ROWS, STEP):
        rows = slice(row, row + STEP)
        for part in parts:
            acc = chain(acc, x[rows], part[rows])
    assert 3e-6 < error(acc, truth) < 2e-5


def test_steps_summed_by_themselves_err_less_than_eager(operands):
    x, parts, truth = operands
    acc = np.zeros_like(truth, dtype=np.float32)
    for row in range(0, ROWS, STEP):
        rows, step = slice(row, row + STEP), np.zeros_like(truth)
        for part in parts:
            step = chain(step, x[rows], part[rows])
        acc += step.astype(np.float32)
    one_by_one = np.zeros_like(truth, dtype=np.float32)
    for row in range(ROWS):
        one_by_one += x[row][:, None] * sum(part[row] for part in parts)[None]
    assert error(acc, truth) < error(one_by_one, truth) / 2
