"""Every kernel of the LoRA branch through Triton's interpreter, against fp64, under the tiles that GPUs will run."""

import mmap
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn import functional as F

from lora_kernels import UnsupportedError, lora_branch, lora_linear
from lora_kernels.kernels.expand import expand
from lora_kernels.kernels.interpreter import repaired
from lora_kernels.ops import BranchNeeds
from lora_kernels.planning import BranchPlan, Problem, make_branch_plan
from lora_kernels.planning.tiles import Tile
from lora_kernels.reference.philox import dropout_scale, keep_mask
from lora_kernels.testing import BranchInputs, poisoned_allocation, run_branch, run_branch_plan
from tests.branch_cases import DTYPES, SUBSETS, TENSORS, inputs_of, problems
from tests.linear_cases import (
    LAYOUTS,
    assert_in_range,
    assert_same_bits,
    assert_within_budget,
    far_from_one,
    over_fp16s_range,
    with_layouts,
)

FAMILIES = {"blackwell": "sm_100", "hopper": "sm_90", "ampere": "sm_80", "ada": "sm_89", "cdna3": "gfx942"}
SPLITS = ("xa_splits", "dyb_splits", "d_lora_A_splits", "d_lora_B_splits", "dx_lora_A_splits")


def plan_for(inputs: BranchInputs, *, arch: str = "sm_90", sm_count: int = 4) -> BranchPlan:
    """What the planner gives a GPU of that architecture."""
    (n, r), k = inputs.lora_B.shape, inputs.lora_A.shape[1]
    problem = Problem(
        inputs.x.numel() // k, n, k, r, inputs.x.dtype, inputs.lora_A.dtype, inputs.dropout_p > 0,
        arch=arch, device_type="cpu", sm_count=sm_count, interpreted=True,
    )  # fmt: skip
    plan = make_branch_plan(problem, inputs.base_out.dtype, "triton", triton_available=True)
    assert (plan.backend, plan.strategy, str(plan.backward)) == ("triton", "shrink_expand", "triton/shrink_expand")
    return plan


def with_choices(plan: BranchPlan, **choices) -> BranchPlan:
    """The plan with other splits or reads on both sides."""
    return replace(plan, x_side=replace(plan.x_side, **choices), out_side=replace(plan.out_side, **choices))


def run(
    inputs: BranchInputs, plan: BranchPlan | None = None, needs: BranchNeeds | None = None, *, check_overflow=False
):
    """What run_branch returns, less base_out's gradient, under a given plan.

    check_overflow: a 32-bit offset that overflows is an error, not a wrapped address; takes twice as long.
    """
    with repaired(check_overflow=check_overflow):
        return run_branch_plan(inputs, plan_for(inputs) if plan is None else plan, needs)


# Several tiles and a tail in every direction, and primes.
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("size", [(150, 200, 168), (37, 51, 45)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_budget(dtypes, size, p):
    assert_within_budget(inputs_of(size, dtypes, 16, dropout_p=p), partial(run, check_overflow=size[0] == 37))


@pytest.mark.parametrize(
    "size", [(1, 40, 72), (33, 1, 40), (40, 33, 1), (1, 1, 1), (17, 16, 15), (64, 128, 64)], ids=str
)
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16-mixed", "bf16-over-fp32"])
def test_budget_of_edges(dtypes, p, size):
    assert_within_budget(problems(size, dtypes, 25, dropout_p=p)[:20], run)


@over_fp16s_range()
@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_fp16_stays_in_range(out, stored, scaling, p):
    dtypes = (torch.float16, torch.float16, out)
    problem = far_from_one(inputs_of((70, 88, 168), dtypes, 8, scaling=scaling, dropout_p=p), stored)
    assert_in_range(problem, stored, run(problem))


@pytest.mark.parametrize("r", [1, 5, 16, 64, 70, 256, 512])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-mixed", "bf16-over-fp32"])
def test_budget_over_ranks(dtypes, p, r):
    assert_within_budget(inputs_of((40, 104, 72), dtypes, r, dropout_p=p), run)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp16-mixed", "bf16-over-fp32", "bf16-over-fp16"])
def test_budget_of_every_familys_tiles(dtypes, p, family):
    i = inputs_of((150, 136, 136), dtypes, 24, dropout_p=p)
    assert_within_budget(i, partial(run, plan=plan_for(i, arch=FAMILIES[family])))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-mixed-over-fp32"])
def test_splits_of_every_reduction(dtypes, p):
    i = inputs_of((150, 24, 300), dtypes, 8, dropout_p=p)
    one, few, many = (plan_for(i, sm_count=count) for count in (1, 12, 1000))
    # dB has two programs on its one multiprocessor where M is tiles enough for both: in fp32.
    alone = [kind for kind in SPLITS if kind != "d_lora_B_splits"]
    assert {getattr(one.x_side, kind) for kind in alone} == {1}
    assert one.out_side.d_lora_B_splits == (2 if dtypes.endswith("fp32") else 1)
    assert many.x_side.xa_splits > 2 < many.out_side.d_lora_B_splits
    for plan in (few, many, with_choices(few, **dict.fromkeys(SPLITS, 2))):
        assert_within_budget(i, partial(run, plan=plan))


@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize(("dtypes", "r"), [("fp32", 5), ("bf16", 100), ("bf16-mixed", 33), ("bf16-over-fp16", 33)])
def test_one_and_two_reads_of_dy(dtypes, r, reads):
    i = inputs_of((70, 150, 40), dtypes, r, dropout_p=0.5)
    plan = with_choices(plan_for(i, sm_count=16), dy_reads=reads)
    full = run(i, plan)
    assert_within_budget(i, lambda _: full)
    for needs in (BranchNeeds(True, False, False), BranchNeeds(False, False, True)):
        part = run(i, plan, needs)
        assert_same_bits(part, {name: full[name] for name in part})


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("tensor", [*TENSORS, "dy"])
def test_layouts(tensor, p):
    for layout in LAYOUTS[1:]:
        awkward = with_layouts(inputs_of((40, 48, 56), "bf16", dropout_p=p), **{tensor: layout})
        dense = replace(awkward, **{tensor: getattr(awkward, tensor).contiguous()})
        assert_same_bits(run(awkward), run(dense))


def test_all_layouts_at_once():
    awkward = with_layouts(
        inputs_of((40, 48, 56), "bf16-mixed", dropout_p=0.25),
        base_out="transposed", x="strided", lora_A="transposed", lora_B="offset", dy="expanded",
    )  # fmt: skip
    assert_within_budget(awkward, run)


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16-mixed", "fp32-over-bf16"])
def test_every_subset_of_gradients(dtypes, p):
    i = inputs_of((20, 24, 32), dtypes, 4, dropout_p=p)
    plan = plan_for(i)
    full = run(i, plan)
    for subset in SUBSETS:
        part = run(i, plan, BranchNeeds(*(name in subset for name in TENSORS[1:])))
        kept = {"y", *(f"d_{name}" for name in subset if name != "base_out")}
        # dA comes from one kernel with dx under dropout, and from another alone: two orders of the same sum.
        alone = p > 0 and "lora_A" in subset and "x" not in subset
        assert set(part) == kept
        compared = kept - ({"d_lora_A"} if alone else set())
        assert_same_bits({n: part[n] for n in compared}, {n: full[n] for n in compared})
        if alone:
            assert_within_budget(i, lambda _, part=part: {"d_lora_A": part["d_lora_A"]})


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_unwritten_memory_does_not_show_and_bits_repeat(dtypes, p):
    for size in ((37, 56, 40), (70, 51, 45)):
        i = inputs_of(size, dtypes, 5, dropout_p=p)
        plan = plan_for(i, sm_count=64)
        expected = run(i, plan)
        with poisoned_allocation():
            assert_same_bits(run(i, plan), expected)


@pytest.mark.parametrize("dtypes", ["fp16-mixed", "bf16-mixed", "bf16-mixed-over-fp16", "bf16-mixed-over-fp32"])
def test_fp32_adapter_gradients_never_pass_through_16_bits(dtypes):
    i = inputs_of((64, 48, 40), dtypes, dropout_p=0.5)
    results = run(i)
    for name in ("d_lora_A", "d_lora_B"):
        assert results[name].dtype == torch.float32
        assert (results[name].to(i.x.dtype).float() == results[name]).float().mean() < 0.02


def test_an_fp32_base_never_passes_through_16_bits():
    i = inputs_of((64, 48, 40), "bf16-over-fp32")
    assert torch.equal(run(replace(i, lora_B=torch.zeros_like(i.lora_B)))["y"], i.base_out)


@pytest.mark.parametrize("offset", [None, (2**31 - 7, 24)], ids=["whole", "shard"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_one_mask_in_forward_and_every_gradient(dtypes, offset):
    # base_out zero, x = 1, A = B = 1: y, dA and dB show the mask where dy = 1; dx shows it where dy is all ones.
    size, p, seed = 40, 0.5, 2**33 + 1
    x, adapters, out = DTYPES[dtypes]
    eye, ones = torch.eye(size), torch.ones(size, size)
    i = BranchInputs(
        base_out=torch.zeros(size, size, dtype=out), x=ones.to(x), lora_A=eye.to(adapters), lora_B=eye.to(adapters),
        dy=eye.to(out), dropout_p=p, dropout_seed=seed, dropout_offset=offset,
    )  # fmt: skip
    plan = plan_for(i, sm_count=32)
    diagonal, full = run(i, plan), run(replace(i, dy=ones.to(out)), plan)
    alone = run(i, plan, BranchNeeds(False, True, False))
    expected = 2.0 * keep_mask(torch.tensor([seed, *(offset or ())]), size, size, p).float()
    assert dropout_scale(p) == 2.0
    shown = {
        "y": diagonal["y"], "dA": diagonal["d_lora_A"], "dA alone": alone["d_lora_A"], "dB": diagonal["d_lora_B"],
        "dx": full["d_x"],
    }  # fmt: skip
    for name, value in shown.items():
        assert torch.equal(value.float(), expected), name


def test_a_dropped_nan_stays_out_and_the_others_propagate():
    for dtypes in ("bf16", "bf16-mixed", "bf16-over-fp32"):
        i = inputs_of((40, 48, 56), dtypes, dropout_p=0.5, seed=3)
        keep = keep_mask(torch.tensor([3]), 40, 56, 0.5)
        i.x[5, 7], i.x[6, 9], i.dy[8, 3] = float("nan"), float("inf"), float("-inf")
        i.base_out[9, 4], i.base_out[10, 5] = float("inf"), float("nan")
        assert keep[5, 7] != keep[6, 9]  # one of them is dropped
        expected = run_branch(i, "reference")
        for name, value in run(i, plan_for(i, sm_count=8)).items():
            assert torch.equal(value.isfinite(), expected[name].isfinite()), (dtypes, name)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("leading", [(6,), (2, 3), (0,), ()], ids=str)
def test_public_call(dtypes, leading):
    m = torch.Size(leading).numel()
    flat = inputs_of((m, 40, 24), dtypes, 4, dropout_p=0.5)
    of = {"x": 24, "dy": 40, "base_out": 40}
    i = replace(flat, **{name: getattr(flat, name).view(*leading, size) for name, size in of.items()})
    assert run_branch(i, "triton")["d_x"].shape == (*leading, 24)
    if m:
        assert_within_budget([replace(i, dropout_seed=s) for s in range(3)], partial(run_branch, backend="triton"))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_over_f_linear_it_has_lora_linears_adapter_gradients(p):
    i = inputs_of((37, 51, 45), "fp32", 5, dropout_p=p)
    weight = torch.randn(51, 45)
    options = {"scaling": 2.0, "dropout_p": p, "dropout_seed": 9, "backend": "triton"}
    results = []
    for whole in (True, False):
        x, lora_A, lora_B = (t.clone().requires_grad_() for t in (i.x, i.lora_A, i.lora_B))
        if whole:
            y = lora_linear(x, weight, lora_A, lora_B, **options)
        else:
            y = lora_branch(F.linear(x, weight), x, lora_A, lora_B, **options)
        results.append([y.detach(), *torch.autograd.grad(y, (lora_A, lora_B, x), i.dy)])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-6 * one.norm()


def test_fp64_is_refused_on_either_side():
    wide, t = torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2)
    for tensors in ((wide, wide, wide, wide), (wide, t, t, t)):
        with pytest.raises(UnsupportedError, match=r"fp64.*Use backend='auto'"):
            lora_branch(*tensors, backend="triton")
        assert torch.equal(lora_branch(*tensors), lora_branch(*tensors, backend="torch"))


def test_same_seed_same_mask_as_the_other_backends():
    i = inputs_of((20, 40, 24), "fp32", 4, dropout_p=0.9)
    i = replace(i, **{name: torch.ones_like(getattr(i, name)) for name in ("x", "lora_A", "lora_B", "dy")})
    keep = keep_mask(torch.tensor([i.dropout_seed]), 20, 24, 0.9)
    for backend in ("torch", "triton", "reference"):
        assert torch.equal(run_branch(i, backend)["d_x"] != 0, keep), backend


# -- the expand kernel by itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("r", [1, 16, 40])
@pytest.mark.parametrize("size", [(1, 1), (16, 32), (17, 33), (70, 3), (3, 70)], ids=str)
def test_expand_writes_every_element_once(size, r, has_base):
    # Small integers: every sum is exact, in any order.
    m, n = size
    generator = torch.Generator().manual_seed(m * n + r)
    base, s, e = (torch.randint(-4, 5, shape, generator=generator).float() for shape in ((m, n), (m, r), (r, n)))
    with repaired(check_overflow=True), poisoned_allocation():
        out = expand(
            base=base if has_base else None, s=s, e=e, out_dtype=torch.float32, precision="ieee",
            tile=Tile(block_m=16, block_n=32, block_r=16),
        )  # fmt: skip
    assert torch.equal(out, s @ e + (base if has_base else 0))


MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on


def far(t: torch.Tensor, dim: int) -> torch.Tensor:
    """t with its last row or column 2^31 elements from its first; the pages between are addresses and never made."""
    strides = [1 << 6, 1 << 6]
    strides[dim] = (1 << 31) // (t.shape[dim] - 1) + (1 << 7)
    strides[1 - dim] = 1
    size = sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True)) + 1
    pages = mmap.mmap(-1, size * t.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(pages, dtype=t.dtype, count=size).as_strided(t.shape, strides).copy_(t)


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("tensor", [*TENSORS, "dy"])
def test_offsets_past_two_to_the_31(tensor, dim, p):
    i = inputs_of((18, 24, 16), "bf16", 4, dropout_p=p)
    spread = replace(i, **{tensor: far(getattr(i, tensor), dim)})
    assert getattr(spread, tensor).stride(dim) * (getattr(i, tensor).shape[dim] - 1) > 1 << 31
    assert_same_bits(run(spread, check_overflow=True), run(i, check_overflow=True))


# From 2, so that 50 problems have 100 roundings in every tensor, and without expanded rows, which repeat the same
# roundings: both have tests of their own. Ones are among the edges.
dimension = st.integers(2, 70)


@settings(deadline=None, derandomize=True, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.tuples(dimension, dimension, dimension),
    r=st.integers(2, 40),
    dtypes=st.sampled_from(sorted(DTYPES)),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    scaling=st.sampled_from([-2.0, 0.125, 1.0]),
    layouts=st.fixed_dictionaries({n: st.sampled_from(LAYOUTS[:-1]) for n in (*TENSORS, "dy")}),
    arch=st.sampled_from(sorted(FAMILIES.values())),
    sm_count=st.sampled_from([1, 7, 132]),
)
def test_budget_everywhere(size, r, dtypes, p, scaling, layouts, arch, sm_count):
    several = [with_layouts(i, **layouts) for i in problems(size, dtypes, r, scaling=scaling, dropout_p=p)[:20]]
    assert_within_budget(several, partial(run, plan=plan_for(several[0], arch=arch, sm_count=sm_count)))
