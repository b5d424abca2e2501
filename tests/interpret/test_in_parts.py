"""fp32 operands of an expand in parts of bf16: their product is that of the fp32 ones, Inf and NaN included."""

import pytest
import torch

from lora_kernels.kernels.in_parts import in_parts
from lora_kernels.kernels.interpreter import repaired


def parts_of(s, e, *, by_columns):
    with repaired():
        s_parts, e_parts = in_parts(s=s, e=e, by_columns=by_columns)
    assert s_parts.dtype == e_parts.dtype == torch.bfloat16
    assert (s_parts.shape, e_parts.shape) == ((len(s), 3 * s.shape[1]), (3 * s.shape[1], e.shape[1]))
    assert (e_parts.T if by_columns else e_parts).is_contiguous()
    return s_parts.double(), e_parts.double()


@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize(("m", "r", "n"), [(1, 1, 1), (37, 5, 70), (300, 16, 33), (3, 70, 200)])
def test_the_product_is_that_of_fp32_but_for_the_smallest_of_four(m, r, n, by_columns):
    s, e = torch.randn(m, r), torch.randn(n, r).T if by_columns else torch.randn(r, n)
    s_parts, e_parts = parts_of(s, e, by_columns=by_columns)
    # A second part is 2^-8 of its operand at most, and rounded to 2^-8 of itself. That twice, and the product left out.
    limit = 3 * 2.0**-16 * (s.double().abs() @ e.double().abs())
    assert ((s_parts @ e_parts - s.double() @ e.double()).abs() <= limit).all()


def test_rows_with_a_stride():
    s, wide = torch.randn(8, 4), torch.randn(4, 20)
    for e in (wide[:, ::2], wide[:, 3:13], torch.randn(10, 9)[:, ::2].T[:4]):
        assert ((torch.matmul(*parts_of(s, e, by_columns=False)) - s.double() @ e.double()).abs() < 1e-3).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["s", "e"])
def test_inf_and_nan_stay_what_they_are(value, which):
    s, e = torch.randn(4, 3), torch.randn(3, 5)
    (s if which == "s" else e)[1, 2] = value
    found, expected = torch.matmul(*parts_of(s, e, by_columns=False)), s.double() @ e.double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3, equal_nan=True)
