"""`bwd_dx_lora_a` called by itself, against fp64, under the tiles that GPUs will run."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lora_kernels.kernels.bwd_dx_lora_a import bwd_dx_lora_a
from lora_kernels.kernels.interpreter import repaired
from lora_kernels.planning.tiles import Family, Width, tile_of
from lora_kernels.reference.philox import dropout_threshold, keep_mask
from lora_kernels.testing import budget_rows, poisoned_allocation
from tests.linear_cases import DTYPES, LAYOUTS, assert_same_bits, laid_out

P, SEED = 0.4, 2**40 + 3
CASES = [(dtype, r) for dtype in DTYPES for r in (1, 8, 16, 64, 200) if "fp16" not in dtype or r == 16]
# Rows and columns with tails, several row tiles in a split, and a last split that is shorter; in fp32 tiles are small.
SIZES = {"fp32": (90, 72)}


def operands(m: int, k: int, r: int, dtype: str) -> dict[str, Tensor]:
    x, adapters = DTYPES[dtype]
    generator = torch.Generator().manual_seed(m * k + r)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    return {"x": normal(m, k).to(x), "dyb": normal(m, r).to(adapters), "lora_A": normal(r, k).to(adapters)}


def run(
    given: dict[str, Tensor], *, splits=3, family: Family = "hopper", p=P, needs_d_lora_A=True, check_overflow=False
):
    x, dyb, lora_A = given["x"], given["dyb"], given["lora_A"]
    wide, mixed = x.dtype == torch.float32, x.dtype != dyb.dtype
    width: Width = "32" if wide else "mixed" if mixed else "16"
    with repaired(check_overflow=check_overflow):
        dx, d_lora_A = bwd_dx_lora_a(
            x=x if needs_d_lora_A else None, dyb=dyb, lora_A=lora_A, seed=torch.tensor([SEED]),
            threshold=dropout_threshold(p), dx_dtype=x.dtype, splits=splits,
            precision="tf32x3" if mixed else "ieee",
            tile=tile_of(family, width, "bwd_dx_lora_a_dropout", rank=dyb.shape[1]),
        )  # fmt: skip
    assert (d_lora_A is not None) == needs_d_lora_A
    return {"dx": dx} | ({} if d_lora_A is None else {"d_lora_A": d_lora_A})


def expected(given: dict[str, Tensor], to: torch.dtype | None = None) -> dict[str, Tensor]:
    """In fp64, or as eager PyTorch does it: in the adapters' dtype, dx rounded to x's."""
    x, dyb, lora_A = (t if to is None else t.to(to) for t in (given["x"], given["dyb"], given["lora_A"]))
    keep = keep_mask(torch.tensor([SEED]), *x.shape, P)
    return {
        "dx": torch.where(keep, dyb @ lora_A, 0).to(x.dtype),
        "d_lora_A": dyb.T @ torch.where(keep, x, 0).to(dyb.dtype),
    }


def assert_within_budget(actual: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    truth, eager = expected(given, torch.float64), expected(given)
    rows = budget_rows(actual, eager, {name: truth[name] for name in actual})
    assert all(row.ok for row in rows), rows


@pytest.mark.parametrize(("dtype", "r"), CASES)
def test_budget(dtype, r):
    given = operands(*SIZES.get(dtype, (203, 90)), r, dtype)
    actual = run(given, splits=2, check_overflow=True)
    assert_within_budget(actual, given)
    with poisoned_allocation():
        assert_same_bits(run(given, splits=2), actual)
        assert_same_bits(run(given, splits=2, needs_d_lora_A=False), {"dx": actual["dx"]})


@pytest.mark.parametrize("family", ["blackwell", "ampere", "ada", "cdna3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
def test_budget_of_every_familys_tiles(dtype, family):
    given = operands(70, 72, 70, dtype)
    assert_within_budget(run(given, splits=1, family=family), given)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 70, 3), (65, 1, 20), (300, 8, 5)], ids=str)
@pytest.mark.parametrize("splits", [1, 1000])
def test_edges(size, splits):
    given = operands(*size, "fp32")
    actual, truth = run(given, splits=splits), expected(given, torch.float64)
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [5, 70])
def test_layouts(r):
    given = operands(70, 72, r, "bf16")
    dense = run(given)
    for name in ("x", "lora_A"):
        for layout in LAYOUTS[1:]:
            awkward = given | {name: laid_out(given[name], layout)}
            same = given | {name: awkward[name].contiguous()}
            assert_same_bits(run(awkward), dense if layout != "expanded" else run(same))


@pytest.mark.parametrize("seed_p", [2**-16, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("r", [16, 48])
def test_the_mask_is_the_references_in_both(seed_p, r):
    # Ones everywhere: dx0 is r where kept; each row of dyb has a one, so that dA counts the kept rows of each column.
    m, k = 70, 90
    given = {"x": torch.ones(m, k), "dyb": torch.ones(m, r), "lora_A": torch.ones(r, k)}
    keep = keep_mask(torch.tensor([SEED]), m, k, seed_p)
    dx = run(given, p=seed_p)["dx"]
    assert torch.equal(dx, r * keep.float())
    given["dyb"] = torch.eye(m)[:, :r].contiguous()
    assert torch.equal(run(given, p=seed_p)["d_lora_A"], keep[:r].float())


def test_a_dropped_nan_stays_out_and_the_others_propagate():
    given = operands(40, 72, 5, "bf16")
    keep = keep_mask(torch.tensor([SEED]), 40, 72, P)
    kept, dropped = keep[3].nonzero()[0], (~keep[4]).nonzero()[0]
    given["x"][3, kept], given["x"][4, dropped] = float("nan"), float("inf")
    given["lora_A"][2, 9], given["dyb"][7, 1] = float("inf"), float("nan")
    truth = expected(given, torch.float64)
    for name, value in run(given).items():
        assert torch.equal(value.isfinite(), truth[name].isfinite()), name
