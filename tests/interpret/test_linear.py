"""Every kernel of the LoRA linear through Triton's interpreter, against fp64, under the tiles that GPUs will run."""

import mmap
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from lora_kernels import UnsupportedError, lora_linear
from lora_kernels.kernels.interpreter import repaired
from lora_kernels.kernels.shrink import shrink
from lora_kernels.ops import Needs
from lora_kernels.planning import Plan, Problem, make_plan
from lora_kernels.planning.plan import paired
from lora_kernels.planning.problem import Strategy
from lora_kernels.planning.tiles import Tile
from lora_kernels.reference.philox import dropout_scale, dropout_threshold, keep_mask
from lora_kernels.testing import LinearInputs, make_linear_inputs, poisoned_allocation, run_linear, run_linear_plan
from tests.linear_cases import (
    DTYPES,
    LAYOUTS,
    PARAMETERS,
    SUBSETS,
    assert_in_range,
    assert_rounded_once_each,
    assert_same_bits,
    assert_within_budget,
    far_from_one,
    laid_out,
    over_fp16s_range,
    pooled,
    with_layouts,
)

STRATEGIES = ("one_pass", "pointers", "descriptors", "library")
FAMILIES = {"blackwell": "sm_100", "hopper": "sm_90", "ampere": "sm_80", "ada": "sm_89", "cdna3": "gfx942"}
EVERYTHING, NOTHING = Needs(*[True] * 5), Needs(*[False] * 5)


def plan_for(inputs: LinearInputs, strategy: str = "pointers", *, arch: str = "sm_90", sm_count: int = 4) -> Plan:
    """What the planner gives a GPU of that architecture, with the strategy forced."""
    (n, k), r = inputs.weight.shape, inputs.lora_A.shape[0]
    problem = Problem(
        inputs.x.numel() // k, n, k, r, inputs.x.dtype, inputs.lora_A.dtype, inputs.dropout_p > 0,
        arch=arch, device_type="cpu", sm_count=sm_count, interpreted=True,
    )  # fmt: skip
    plan = make_plan(problem, "triton", triton_available=True)
    if strategy == "library":
        return paired(problem, plan, "library")
    name: Strategy = "one_pass" if strategy == "one_pass" else "shrink_fused"
    return replace(paired(problem, plan, name), use_tma=strategy == "descriptors")


def run_under(plan: Plan | None, inputs: LinearInputs, needs: Needs = EVERYTHING, *, check_overflow=False, **options):
    """What run_linear returns, from the triton backend's own forward and backward under a given plan.

    check_overflow: a 32-bit offset that overflows is an error, not a wrapped address; takes twice as long.
    """
    plan = plan_for(inputs, **options) if plan is None else plan
    with repaired(check_overflow=check_overflow):
        return run_linear_plan(inputs, plan, needs)


def inputs_of(size, dtype, r=8, *, index=0, **options) -> LinearInputs:
    x, adapters = DTYPES[dtype]
    return make_linear_inputs(*size, r, dtype=x, adapter_dtype=adapters, seed=index, **options)


def problems(size, dtype, r=8, **options) -> list[LinearInputs]:
    x, adapters = DTYPES[dtype]
    return pooled(make_linear_inputs, *size, r, dtype=x, adapter_dtype=adapters, **options)[:20]  # slow: no more


def serves(strategy: str, dtype: str, r: int = 16) -> bool:
    """Whether a tile is shipped for it: one_pass holds the whole rank, descriptors are for 16-bit x."""
    kernel = {
        "one_pass": "one_pass", "pointers": "gemm_expand", "descriptors": "gemm_expand_tma", "library": "shrink",
    }[strategy]  # fmt: skip
    return kernel in dict(plan_for(inputs_of((1, 1, 1), dtype, r)).tiles)


SERVED = [(strategy, dtype) for strategy in STRATEGIES for dtype in DTYPES if serves(strategy, dtype)]


# Several tiles and a tail in every direction, and primes.
SIZES = {"one_pass": (70, 88, 168)} | dict.fromkeys(STRATEGIES[1:], (150, 200, 168))


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("size", ["tiles", "primes"])
@pytest.mark.parametrize(("strategy", "dtype"), SERVED)
def test_budget(strategy, dtype, size, p):
    # A row of 51 elements has no descriptor: that plan falls back to pointers by itself.
    problem = inputs_of(SIZES[strategy] if size == "tiles" else (37, 51, 45), dtype, 16, dropout_p=p)
    assert_within_budget(problem, partial(run_under, None, strategy=strategy, check_overflow=size == "primes"))


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize(("strategy", "dtype"), [c for c in SERVED if c[1].endswith("mixed") and c[0] != "library"])
def test_y_and_dx_are_rounded_once(strategy, dtype, p):
    problem = inputs_of((37, 51, 45), dtype, 16, dropout_p=p)
    # Both fp32 operands of the expand are split into two bf16 each, and the smallest of the products left out.
    found = run_under(None, problem, strategy=strategy)
    assert_rounded_once_each(problem, {name: found[name] for name in ("y", "d_x")}, of_products=2**-16)


@over_fp16s_range()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp16_stays_in_range(strategy, stored, scaling, p):
    problem = far_from_one(inputs_of((70, 88, 168), "fp16", 8, scaling=scaling, dropout_p=p), stored)
    assert_in_range(problem, stored, run_under(None, problem, strategy=strategy))


@pytest.mark.parametrize(("strategy", "dtype"), [case for case in SERVED if case[1].endswith("mixed")])
def test_budget_with_a_bias_in_fp32(strategy, dtype):
    problem = inputs_of(SIZES[strategy], dtype, 16, bias_dtype=torch.float32)
    found = run_under(None, problem, strategy=strategy)
    assert found["d_bias"].dtype == torch.float32
    assert_within_budget(problem, lambda _: found)


@pytest.mark.parametrize(
    "size", [(1, 40, 72), (33, 1, 40), (40, 33, 1), (1, 1, 1), (17, 16, 15), (64, 128, 64)], ids=str
)
@pytest.mark.parametrize("strategy", STRATEGIES[:2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed"])
def test_budget_of_edges(dtype, strategy, size):
    assert_within_budget(
        problems(size, dtype, 25, dropout_p=0.25, bias=False), partial(run_under, None, strategy=strategy)
    )


MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on
RANKS = [(s, d, r) for s in STRATEGIES for d in ("fp32", "bf16", "bf16-mixed") for r in (1, 5, 16, 64, 70, 256, 512)]


@pytest.mark.parametrize(("strategy", "dtype", "r"), [case for case in RANKS if serves(*case)])
def test_budget_over_ranks(strategy, dtype, r):
    assert_within_budget(inputs_of((40, 104, 72), dtype, r, dropout_p=0.1), partial(run_under, None, strategy=strategy))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("m", [20, 150])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16-mixed"])
def test_budget_of_every_familys_tiles(dtype, m, family):
    arch = FAMILIES[family]
    inputs = inputs_of((m, 136, 136), dtype, 16, dropout_p=0.5)
    strategy = "one_pass" if m == 20 else "pointers"
    assert_within_budget(inputs, partial(run_under, None, strategy=strategy, arch=arch))
    if "gemm_expand_tma" in dict(plan_for(inputs, arch=arch).tiles):
        for p in (0.0, 0.5):
            assert_within_budget(
                replace(inputs, dropout_p=p), partial(run_under, None, strategy="descriptors", arch=arch)
            )


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
def test_splits_of_both_reductions(dtype, p):
    inputs = inputs_of((150, 24, 300), dtype, 8, dropout_p=p)
    plans = [plan_for(inputs, sm_count=count) for count in (1, 12, 1000)]
    kinds = ("xa_splits", "dyb_splits", "d_lora_A_splits", "d_lora_B_splits")
    # dB has two programs on its one multiprocessor where M is tiles enough for both: in fp32.
    assert [getattr(plans[0], kind) for kind in kinds] == [1, 1, 1, 2 if dtype == "fp32" else 1]
    assert plans[-1].xa_splits > 2 < plans[-1].d_lora_A_splits
    for plan in plans[1:]:
        assert_within_budget(inputs, partial(run_under, plan))
    uneven = replace(plans[1], **dict.fromkeys(kinds, 2))
    assert_within_budget(inputs, partial(run_under, uneven))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_of_one_pass(dtype, p):
    block_k = plan_for(inputs_of((1, 1, 1), dtype, 12), "one_pass").tile("one_pass").block_k
    # Three blocks of K, the last cut by K: two splits are uneven. Rows and columns have tails.
    inputs = inputs_of((21, 40, 2 * block_k + 12), dtype, 12, dropout_p=p)
    plan = plan_for(inputs, "one_pass")
    for splits in (2, 64):
        run = partial(run_under, replace(plan, one_pass_splits=splits), needs=NOTHING)
        assert_within_budget(inputs, run)
        expected = run(inputs)
        with poisoned_allocation():
            assert_same_bits(run(inputs), expected)


def test_splits_of_one_pass_keep_layouts_nan_and_far_addresses():
    inputs = inputs_of((5, 40, 136), "bf16", 3, dropout_p=0.5, bias=False, index=3)
    plan = replace(plan_for(inputs, "one_pass"), one_pass_splits=2)
    awkward = with_layouts(inputs, x="strided", weight="transposed", lora_A="transposed", lora_B="offset")
    expected = run_under(plan, inputs, NOTHING)
    assert_same_bits(run_under(plan, awkward, NOTHING), expected)
    for tensor in ("x", "weight", "lora_A", "lora_B"):
        spread = replace(inputs, **{tensor: far(getattr(inputs, tensor), 1)})
        assert_same_bits(run_under(plan, spread, NOTHING, check_overflow=True), expected)
    keep = keep_mask(torch.tensor([3]), 5, 136, 0.5)
    inputs.x[0, 1], inputs.x[1, 131], inputs.weight[7, 130] = float("inf"), float("nan"), float("-inf")
    inputs.x[2, (~keep[2]).nonzero()[0]] = float("nan")
    finite = run_under(plan, inputs, NOTHING)["y"].isfinite()
    assert torch.equal(finite, run_linear(inputs, "reference", requires_grad=())["y"].isfinite())
    assert finite[3:, :7].all()


@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize(("dtype", "r"), [("fp32", 5), ("bf16", 100), ("bf16-mixed", 33)])
def test_one_and_two_reads_of_dy(dtype, r, reads):
    inputs = inputs_of((70, 150, 40), dtype, r, dropout_p=0.5)
    plan = replace(plan_for(inputs, sm_count=16), dy_reads=reads)
    full = run_under(plan, inputs)
    assert_within_budget(inputs, partial(run_under, plan))
    for needs in (Needs(True, False, False, False, True), Needs(False, False, False, True, False)):
        part = run_under(plan, inputs, needs)
        kept = [name for name in part if name != "d_bias"]
        assert_same_bits({n: part[n] for n in kept}, {n: full[n] for n in kept})


@pytest.mark.parametrize("tensor", ["x", "weight", "lora_A", "lora_B", "bias", "dy"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layouts(strategy, tensor):
    # Where a descriptor cannot describe the layout, the launcher takes pointers; either way the numbers are the same.
    for layout in LAYOUTS[1:]:
        inputs = with_layouts(inputs_of((40, 48, 56), "bf16", 8, dropout_p=0.25), **{tensor: layout})
        run = partial(run_under, plan_for(inputs, strategy))
        dense = replace(inputs, **{tensor: getattr(inputs, tensor).contiguous()})
        assert_same_bits(run(inputs), run(dense))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_layouts_at_once(strategy):
    inputs = inputs_of((40, 48, 56), "bf16-mixed", 8, dropout_p=0.25)
    awkward = with_layouts(
        inputs, x="strided", weight="transposed", lora_A="transposed", lora_B="offset", bias="strided", dy="expanded"
    )
    assert_within_budget(awkward, partial(run_under, None, strategy=strategy))


@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed"])
def test_every_subset_of_gradients(dtype):
    inputs = inputs_of((20, 24, 32), dtype, 4, dropout_p=0.5)
    plan = plan_for(inputs)
    full = run_under(plan, inputs)
    for subset in SUBSETS:
        part = run_under(plan, inputs, Needs(*(name in subset for name in PARAMETERS)))
        assert set(part) == {"y", *(f"d_{name}" for name in subset)}
        # The bias is summed beside the adapters' gradients, or by itself: two orders of the same sum.
        alone = not {"x", "lora_A", "lora_B"} & set(subset)
        assert_same_bits(
            *({k: v for k, v in d.items() if k in part and not (alone and k == "d_bias")} for d in (part, full))
        )
        if alone and "bias" in subset:
            # The budget holds for the other order as well.
            assert_within_budget(inputs, lambda i, part=part: {"d_bias": part["d_bias"]})


@pytest.mark.parametrize(("strategy", "dtype"), SERVED)
def test_unwritten_memory_does_not_show_and_bits_repeat(strategy, dtype):
    for size in ((37, 56, 40), (70, 51, 45)):
        inputs = inputs_of(size, dtype, 5, dropout_p=0.5)
        plan = plan_for(inputs, strategy, sm_count=64)
        expected = run_under(plan, inputs)
        with poisoned_allocation():
            assert_same_bits(run_under(plan, inputs), expected)


@pytest.mark.parametrize("dtype", ["fp16-mixed", "bf16-mixed"])
def test_fp32_adapter_gradients_never_pass_through_16_bits(dtype):
    inputs = inputs_of((64, 48, 40), dtype, 8, dropout_p=0.5)
    results = run_under(None, inputs)
    for name in ("d_lora_A", "d_lora_B"):
        assert results[name].dtype == torch.float32
        assert (results[name].to(inputs.x.dtype).float() == results[name]).float().mean() < 0.02


def shrunk_mask(rows: int, columns: int, p: float, seed: int, tile: Tile, splits: int = 1) -> torch.Tensor:
    """The mask that `shrink` applies, one column for each one-hot row of A."""
    xa = shrink(
        x=torch.ones(1, 1).expand(rows, columns), lora_A=torch.eye(columns), seed=torch.tensor([seed]),
        threshold=dropout_threshold(p), scale=1.0, splits=splits, precision="ieee", tile=tile,
    )  # fmt: skip
    assert torch.equal(xa, xa.bool().float())
    return xa.bool()


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 7, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 1 - 1e-9])
def test_masks_are_the_references_bit_for_bit(p, seed):
    tile = Tile(block_m=16, block_k=32, block_r=16)
    with repaired():
        for rows, columns, splits in ((19, 37, 1), (3, 100, 3)):
            expected = keep_mask(torch.tensor([seed]), rows, columns, p)
            assert torch.equal(shrunk_mask(rows, columns, p, seed, tile, splits), expected)


def test_masks_of_far_rows():
    # x is one element, expanded: the row's index is large, its memory is not.
    rows, columns, tile = (1 << 17) + 5, 8, Tile(block_m=4096, block_k=16, block_r=16)
    with repaired():
        mask = shrunk_mask(rows, columns, 0.5, 77, tile)
    assert torch.equal(mask, keep_mask(torch.tensor([77]), rows, columns, 0.5))


@pytest.mark.parametrize("offset", [None, (2**31 - 7, 24)], ids=["whole", "shard"])
@pytest.mark.parametrize(("strategy", "dtype"), [case for case in SERVED if serves(*case, 40)])
def test_one_mask_in_forward_and_every_gradient(strategy, dtype, offset):
    # Base zero, x = 1, A = B = 1: y, dA and dB show the mask where dy = 1; dx shows it where dy is all ones.
    size, p, seed = 40, 0.5, 2**33 + 1
    x, adapters = DTYPES[dtype]
    eye = torch.eye(size)
    ones = torch.ones(size, size, dtype=x)
    inputs = LinearInputs(
        x=ones, weight=0 * ones, lora_A=eye.to(adapters), lora_B=eye.to(adapters), bias=None, dy=eye.to(x),
        dropout_p=p, dropout_seed=seed, dropout_offset=offset,
    )  # fmt: skip
    plan = plan_for(inputs, strategy, sm_count=32)
    diagonal, full = run_under(plan, inputs), run_under(plan, replace(inputs, dy=ones))
    expected = 2.0 * keep_mask(torch.tensor([seed, *(offset or ())]), size, size, p).float()
    assert dropout_scale(p) == 2.0
    for name, value in (
        ("y", diagonal["y"]),
        ("dA", diagonal["d_lora_A"]),
        ("dB", diagonal["d_lora_B"]),
        ("dx", full["d_x"]),
    ):
        assert torch.equal(value.float(), expected), name


def test_a_dropped_nan_stays_out_and_the_others_propagate():
    inputs = inputs_of((40, 48, 56), "bf16", 8, dropout_p=0.5, index=3)
    keep = keep_mask(torch.tensor([3]), 40, 56, 0.5)
    inputs.x[5, 7], inputs.x[6, 9], inputs.dy[8, 3] = float("nan"), float("inf"), float("-inf")
    assert keep[5, 7] != keep[6, 9]  # one of them is dropped
    expected = run_linear(inputs, "reference")
    for strategy in STRATEGIES:
        for name, value in run_under(plan_for(inputs, strategy, sm_count=8), inputs).items():
            assert torch.equal(value.isfinite(), expected[name].isfinite()), (strategy, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(6,), (2, 3), (0,), ()], ids=str)
def test_public_call(dtype, leading):
    m = torch.Size(leading).numel()
    flat = inputs_of((m, 40, 24), dtype, 4, dropout_p=0.5)
    inputs = replace(flat, x=flat.x.view(*leading, 24), dy=flat.dy.view(*leading, 40))
    assert run_linear(inputs, "triton")["d_x"].shape == (*leading, 24)
    if m:
        assert_within_budget([replace(inputs, dropout_seed=s) for s in range(3)], partial(run_linear, backend="triton"))


def test_public_call_with_partial_gradients_and_no_seed():
    inputs = inputs_of((12, 40, 24), "fp32", 4)
    lora_A = inputs.lora_A.clone().requires_grad_()
    arguments = inputs.x, inputs.weight, lora_A, inputs.lora_B
    torch.manual_seed(0)
    first, second = (lora_linear(*arguments, dropout_p=0.5, backend="triton") for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(lora_linear(*arguments, dropout_p=0.5, backend="triton"), first)
    first.sum().backward()
    assert lora_A.grad.any()


def test_fp64_is_refused_and_auto_leaves_the_interpreter_alone():
    with pytest.raises(UnsupportedError, match="fp64"):
        lora_linear(*(torch.ones(2, 2, dtype=torch.float64) for _ in range(4)), backend="triton")
    y = lora_linear(*(torch.ones(2, 2) for _ in range(4)))
    assert torch.equal(y, lora_linear(*(torch.ones(2, 2) for _ in range(4)), backend="torch"))


def test_same_seed_same_mask_as_the_other_backends():
    inputs = inputs_of((20, 40, 24), "fp32", 4, dropout_p=0.9)
    ones = {name: torch.ones_like(getattr(inputs, name)) for name in ("x", "lora_A", "lora_B", "dy")}
    inputs = replace(inputs, **ones, weight=torch.zeros_like(inputs.weight))
    keep = keep_mask(torch.tensor([inputs.dropout_seed]), 20, 24, 0.9)
    for backend in ("torch", "triton", "reference"):
        assert torch.equal(run_linear(inputs, backend)["d_x"] != 0, keep), backend


def far(t: torch.Tensor, dim: int) -> torch.Tensor:
    """t with its last row or column 2^31 elements from its first; the pages between are addresses and never made."""
    strides = [1 << 6, 1 << 6]
    strides[dim] = (1 << 31) // (t.shape[dim] - 1) + (1 << 7)
    strides[1 - dim] = 1
    size = sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True)) + 1
    pages = mmap.mmap(-1, size * t.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(pages, dtype=t.dtype, count=size).as_strided(t.shape, strides).copy_(t)


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("tensor", ["x", "weight", "lora_A", "lora_B", "dy"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_offsets_past_two_to_the_31(strategy, tensor, dim):
    inputs = inputs_of((18, 24, 16), "bf16", 4, dropout_p=0.5)
    spread = replace(inputs, **{tensor: far(getattr(inputs, tensor), dim)})
    assert getattr(spread, tensor).stride(dim) * (getattr(inputs, tensor).shape[dim] - 1) > 1 << 31
    run = partial(run_under, plan_for(inputs, strategy), check_overflow=True)
    assert_same_bits(run(spread), run(inputs))


# From 2, so that 50 problems have 100 roundings in every tensor, and without expanded rows, which repeat the same
# roundings: both have tests of their own. Ones are among the edges.
dimension = st.integers(2, 70)


@settings(deadline=None, derandomize=True, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.tuples(dimension, dimension, dimension),
    r=st.integers(2, 40),
    dtype=st.sampled_from(sorted(DTYPES)),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    bias=st.booleans(),
    scaling=st.sampled_from([-2.0, 0.125, 1.0]),
    layouts=st.fixed_dictionaries(
        {n: st.sampled_from(LAYOUTS[:-1]) for n in ("x", "weight", "lora_A", "lora_B", "dy")}
    ),
    strategy=st.sampled_from(STRATEGIES),
    arch=st.sampled_from(sorted(FAMILIES.values())),
    sm_count=st.sampled_from([1, 7, 132]),
)
def test_budget_everywhere(size, r, dtype, p, bias, scaling, layouts, strategy, arch, sm_count):
    several = [with_layouts(i, **layouts) for i in problems(size, dtype, r, bias=bias, scaling=scaling, dropout_p=p)]
    plan = plan_for(several[0], strategy, arch=arch, sm_count=sm_count)
    if strategy == "descriptors" and "gemm_expand_tma" not in dict(plan.tiles):
        plan = replace(plan, use_tma=False)
    if strategy == "one_pass" and "one_pass" not in dict(plan.tiles):
        plan = replace(plan, strategy="shrink_fused")
    assert_within_budget(several, partial(run_under, plan))


def test_laid_out_bias_is_read_by_its_stride():
    inputs = inputs_of((4, 8, 8), "fp32", 2)
    strided = replace(inputs, bias=laid_out(inputs.bias, "strided"))
    assert_same_bits(run_under(plan_for(inputs), strided), run_under(plan_for(inputs), inputs))
