"""The `torch` backend of the branch against the specification in fp64: every dtype, shape, layout and plan."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn import functional as F

from lora_kernels import UnsupportedError, lora_branch, lora_linear
from lora_kernels.ops import BranchNeeds, low_rank_torch
from lora_kernels.planning import BranchPlan, Way
from lora_kernels.testing import make_linear_inputs, order_errors, poisoned_allocation, run_branch, run_branch_plan
from tests.branch_cases import DTYPES, SAME, SUBSETS, TENSORS, inputs_of, problems
from tests.equality import whole
from tests.linear_cases import (
    LAYOUTS,
    assert_in_range,
    assert_same_bits,
    assert_within_budget,
    far_from_one,
    laid_out,
    over_fp16s_range,
    truth_of,
    with_layouts,
)

FP64 = (torch.float64,) * 3
ALL_DTYPES = {**DTYPES, "fp64": FP64, "fp64-mixed-over-fp32": (torch.float64, torch.float32, torch.float32)}
# Where one tensor is fp64 and another is not, "twice eager's error" is a question of which of eager's roundings count.
HELD = {**DTYPES, "fp64": FP64}
PLANS = {
    strategy: BranchPlan("torch", strategy, "a test asks for it", Way("torch", strategy))
    for strategy in ("library", "upcast")
}
# Even, odd and prime, tall and wide, one, and a tail after each row block; M, N, K.
SIZES = [(64, 48, 32), (37, 51, 45), (131, 7, 97), (3, 129, 1), (5, 1, 64), (1, 96, 80), (2, 3, 3)]
BLOCK = 1 << 15  # elements, where a test is of blocks: theirs have 2^20, which take a second each
RANKS = (1, 8, 16, 64, 256, 512)

on_torch = partial(run_branch, backend="torch")


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtypes", HELD)
def test_budget_over_sizes(dtypes, size, p):
    assert_within_budget(problems(size, HELD[dtypes], dropout_p=p), on_torch)


@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_budget_under_both_plans(dtypes, size, p, strategy):
    # This machine's CPU gets one of the two for each dtype; other CPUs get the other.
    assert_within_budget(problems(size, dtypes, dropout_p=p), partial(run_branch_plan, plan=PLANS[strategy]))


@over_fp16s_range()
@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strategy", PLANS)
def test_fp16_stays_in_range(strategy, out, stored, scaling, p):
    dtypes = (torch.float16, torch.float16, out)
    problem = far_from_one(inputs_of((64, 48, 32), dtypes, scaling=scaling, dropout_p=p), stored)
    assert_in_range(problem, stored, run_branch_plan(problem, PLANS[strategy]))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtypes", HELD)
def test_a_power_of_two_as_a_tensor_scales_to_the_bit(dtypes, backend):
    # Wherever it is multiplied in, it rounds nothing.
    inputs = whole(inputs_of((37, 51, 45), HELD[dtypes], dropout_p=0.5, scaling=2.0))
    as_tensor = replace(inputs, scaling=torch.tensor(2.0))
    assert_same_bits(run_branch(as_tensor, backend), run_branch(inputs, backend))


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-mixed", "bf16-over-fp32", "fp32-over-bf16", "fp64"])
def test_budget_over_ranks(dtypes, p, r):
    assert_within_budget(problems((50, 40, 72), HELD[dtypes], r, dropout_p=p), on_torch)


# More than one block of rows, with a tail.
@pytest.mark.parametrize("size", [(BLOCK // 515 + 77, 24, 515), (BLOCK // 515 + 77, 515, 24)], ids=["K", "N"])
@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-mixed", "bf16-over-fp32"])
def test_budget_across_blocks(monkeypatch, dtypes, strategy, size):
    monkeypatch.setitem(low_rank_torch.BLOCK_ELEMENTS, "cpu", BLOCK)
    assert_within_budget(inputs_of(size, dtypes, 4, dropout_p=0.5), partial(run_branch_plan, plan=PLANS[strategy]))


@pytest.mark.parametrize("dtypes", ALL_DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (2, 1, 3), (1, 2, 3, 1)], ids=str)
def test_leading_dimensions(leading, dtypes):
    m = torch.Size(leading).numel()
    flat = whole(inputs_of((m, 40, 24), ALL_DTYPES[dtypes], 4, dropout_p=0.5))
    of = {"x": 24, "dy": 40, "base_out": 40}
    shaped = replace(flat, **{name: getattr(flat, name).view(*leading, size) for name, size in of.items()})
    actual, expected = on_torch(shaped), on_torch(flat)
    for name in ("y", "d_base_out"):
        assert actual[name].shape == (*leading, 40)
    assert actual["d_x"].shape == (*leading, 24)
    assert_same_bits({k: v.reshape(expected[k].shape) for k, v in actual.items()}, expected)


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@pytest.mark.parametrize("leading", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtypes", ALL_DTYPES)
def test_no_tokens(dtypes, leading, backend):
    i = inputs_of((0, 6, 4), ALL_DTYPES[dtypes], 2, dropout_p=0.5)
    i = replace(i, x=i.x.view(*leading, 4), dy=i.dy.view(*leading, 6), base_out=i.base_out.view(*leading, 6))
    results = run_branch(i, backend)
    assert results["y"].shape == (*leading, 6)
    for name in TENSORS:
        gradient, tensor = results[f"d_{name}"], getattr(i, name)
        assert gradient.shape == tensor.shape
        assert gradient.dtype == tensor.dtype
        assert not gradient.any()


@pytest.mark.parametrize("tensor", [*TENSORS, "dy"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-mixed", "bf16-over-fp32"])
def test_layouts_do_not_change_results(dtypes, layout, tensor):
    awkward = with_layouts(inputs_of((40, 56, 48), dtypes, dropout_p=0.25), **{tensor: layout})
    assert_within_budget(awkward, on_torch)
    results = on_torch(awkward)
    assert results["y"].is_contiguous()
    for name, gradient in results.items():
        if name != "y":
            assert gradient.shape == getattr(awkward, name.removeprefix("d_")).shape


def test_tensors_that_no_view_flattens():
    i = inputs_of((20, 40, 24), "fp32", 4)
    x, base_out = torch.randn(5, 4, 24).transpose(0, 1), torch.randn(5, 4, 40).transpose(0, 1)
    shaped = whole(replace(i, x=x, base_out=base_out, dy=torch.randn(5, 4, 40).transpose(0, 1)))
    assert shaped.x.stride() == x.stride()
    flat = replace(shaped, **{n: getattr(shaped, n).reshape(20, -1) for n in ("x", "base_out", "dy")})
    results = on_torch(shaped)
    assert results["y"].shape == (4, 5, 40)
    assert_same_bits({k: v.flatten() for k, v in results.items()}, {k: v.flatten() for k, v in on_torch(flat).items()})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_base_outs_gradient_is_dy(dtypes, backend):
    i = inputs_of((20, 24, 32), dtypes, 4, dropout_p=0.5)
    base_out = i.base_out.clone().requires_grad_()
    y = lora_branch(base_out, i.x, i.lora_A, i.lora_B, dropout_p=0.5, backend=backend)
    (gradient,) = torch.autograd.grad(y, base_out, i.dy)
    assert torch.equal(gradient, i.dy)
    assert backend == "reference" or gradient.data_ptr() == i.dy.data_ptr()  # itself, not a copy


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_expanded_dy_of_a_sum(dtypes, reduce):
    i = whole(inputs_of((32, 64, 48), dtypes))
    leaves = {name: getattr(i, name).clone().requires_grad_() for name in TENSORS}
    y = lora_branch(*leaves.values(), scaling=2.0, backend="torch")
    getattr(y, reduce)().backward()
    one = torch.ones((), dtype=y.dtype) / (y.numel() if reduce == "mean" else 1)
    expected = on_torch(replace(i, dy=one.to(y.dtype).expand(32, 64)))
    assert_same_bits({f"d_{name}": leaf.grad for name, leaf in leaves.items()} | {"y": y.detach()}, expected)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_every_subset_of_gradients(dtypes, strategy, p):
    i = whole(inputs_of((20, 24, 32), dtypes, 4, dropout_p=p))
    full = run_branch_plan(i, PLANS[strategy])
    for subset in SUBSETS:
        part = run_branch_plan(i, PLANS[strategy], BranchNeeds(*(name in subset for name in TENSORS[1:])))
        assert_same_bits(part, {name: full[name] for name in ("y", *(f"d_{s}" for s in subset if s != "base_out"))})


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_unwritten_memory_does_not_show(dtypes, strategy, p):
    i = whole(inputs_of((37, 51, 45), dtypes, 5, dropout_p=p))
    expected, public = run_branch_plan(i, PLANS[strategy]), on_torch(i)
    with poisoned_allocation():
        assert_same_bits(run_branch_plan(i, PLANS[strategy]), expected)
        assert_same_bits(on_torch(i), public)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", ALL_DTYPES)
def test_same_call_same_bits(dtypes, p):
    i = whole(inputs_of((300, 130, 515), ALL_DTYPES[dtypes], dropout_p=p))
    first = on_torch(i)
    for _ in range(3):
        assert_same_bits(on_torch(i), first)


@pytest.mark.parametrize("dtypes", ["fp16-mixed", "bf16-mixed", "bf16-mixed-over-fp16", "bf16-mixed-over-fp32"])
@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_fp32_adapter_gradients_never_pass_through_16_bits(dtypes, strategy, p):
    i = inputs_of((64, 48, 40), dtypes, dropout_p=p)
    results = run_branch_plan(i, PLANS[strategy])
    for name in ("d_lora_A", "d_lora_B"):
        assert results[name].dtype == torch.float32
        # Of 2^13 fp32 numbers, one is representable in fp16 (11 bits of significand), fewer in bf16.
        assert (results[name].to(i.x.dtype).float() == results[name]).float().mean() < 0.02


@pytest.mark.parametrize("strategy", PLANS)
def test_an_fp32_base_never_passes_through_16_bits(strategy):
    i = inputs_of((64, 48, 40), "bf16-over-fp32")
    zero = replace(i, lora_B=torch.zeros_like(i.lora_B))
    assert torch.equal(run_branch_plan(zero, PLANS[strategy])["y"], i.base_out)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base_out", "x", "lora_A", "lora_B", "dy"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-mixed", "bf16-over-fp32"])
def test_nan_and_inf_propagate(dtypes, where, value):
    i = inputs_of((20, 24, 32), dtypes, 4, dropout_p=0.5, seed=3)
    getattr(i, where).view(-1)[37 % getattr(i, where).numel()] = value
    actual, expected = on_torch(i), run_branch(i, "reference")
    for name, gradient in expected.items():
        assert torch.equal(actual[name].isfinite(), gradient.isfinite()), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_inputs_are_left_alone_and_y_is_new(dtypes, backend):
    i = inputs_of((20, 24, 32), dtypes, dropout_p=0.5)
    names = (*TENSORS, "dy")
    before = {name: getattr(i, name).clone() for name in names}
    run_branch(i, backend)
    assert_same_bits({name: getattr(i, name) for name in names}, before)
    for m in (20, 0):  # an empty output must not be its base, either
        base_out = i.base_out[:m]
        y = lora_branch(base_out, i.x[:m], i.lora_A, i.lora_B, scaling=0.0, backend=backend)
        assert y is not base_out
        assert backend == "reference" or not y._is_view()
        assert m == 0 or y.data_ptr() != base_out.data_ptr()


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtypes", [*SAME, "fp64"])
def test_over_f_linear_it_is_lora_linear(dtypes, p):
    x, adapters, _ = HELD[dtypes]
    i = make_linear_inputs(40, 56, 48, 8, dtype=x, adapter_dtype=adapters, dropout_p=p, seed=5)
    order = order_errors(truth_of(i), i)
    results = []
    for in_one in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (i.x, i.weight, i.lora_A, i.lora_B, i.bias)]
        a, weight, lora_A, lora_B, bias = leaves
        options = {"scaling": 2.0, "dropout_p": p, "dropout_seed": 5, "backend": "torch"}
        if in_one:
            y = lora_linear(a, weight, lora_A, lora_B, bias, **options)
        else:
            y = lora_branch(F.linear(a, weight, bias), a, lora_A, lora_B, **options)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, i.dy)])
    names = ("y", "x", "weight", "lora_A", "lora_B", "bias")
    for name, one, other in zip(names, *results, strict=True):
        # y and dx are sums of two rounded terms in either order: a rounding of each, and of the sum. dA and dB are the
        # same products of the same tensors, rounded once.
        roundings = 0.5 if name in ("lora_A", "lora_B") else 4
        bound = roundings * torch.finfo(one.dtype).eps + 2 * order[name if name == "y" else f"d_{name}"]
        assert (one - other).norm() <= bound * one.norm(), name


def test_without_grad_nothing_is_recorded():
    i = inputs_of((2, 3, 4), "fp32", 1)
    with torch.no_grad():
        leaves = [getattr(i, name).requires_grad_() for name in TENSORS]
        assert lora_branch(*leaves).grad_fn is None
    with torch.inference_mode():
        assert lora_branch(*leaves).is_inference()


def test_a_zero_adapter_is_the_base():
    i = inputs_of((33, 65, 129), FP64)
    y = lora_branch(i.base_out, i.x, i.lora_A, torch.zeros_like(i.lora_B), scaling=3.0, dropout_p=0.5)
    assert torch.equal(y, i.base_out)


def test_scaling_may_be_any_real():
    i = inputs_of((3, 5, 4), FP64, 2)
    for scaling in (0, -1, 3, 0.125, 1e-8, 1e6):
        y = lora_branch(i.base_out, i.x, i.lora_A, i.lora_B, scaling=scaling)
        term = scaling * (i.x @ i.lora_A.T @ i.lora_B.T)
        assert (y - i.base_out - term).norm() <= 64 * 2**-53 * (i.base_out.norm() + term.norm() + abs(scaling))


def test_explicit_triton_on_the_cpu_is_refused_with_the_reason():
    i = inputs_of((2, 3, 4), "fp32", 1)
    with pytest.raises(
        UnsupportedError, match=r"backend='triton'.*(CPU.*TRITON_INTERPRET|not installed).*backend='auto'"
    ):
        run_branch(i, "triton")


# From 2, so that 50 problems have 100 roundings in every tensor, and without expanded rows, which repeat the same
# roundings: both have tests of their own. Ones are among SIZES.
dimension = st.one_of(st.integers(2, 9), st.sampled_from([16, 31, 64, 65]))


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.tuples(dimension, dimension, dimension),
    r=st.integers(2, 40),
    dtypes=st.sampled_from(sorted(HELD)),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.75]),
    scaling=st.sampled_from([-2.0, 0.125, 1.0, 16.0]),
    layouts=st.fixed_dictionaries({name: st.sampled_from(LAYOUTS[:-1]) for name in (*TENSORS, "dy")}),
    strategy=st.sampled_from(["public", *PLANS]),
)
def test_budget_everywhere(size, r, dtypes, p, scaling, layouts, strategy):
    if dtypes == "fp64" and strategy == "upcast":
        strategy = "library"  # fp64 has nothing to be cast up to; no plan asks for it
    run = on_torch if strategy == "public" else partial(run_branch_plan, plan=PLANS[strategy])
    several = [with_layouts(i, **layouts) for i in problems(size, HELD[dtypes], r, scaling=scaling, dropout_p=p)]
    assert_within_budget(several, run)


def test_layouts_of_no_unit_stride_reach_the_ops():
    # The layouts above survive flattening: the ops, not a copy made before them, read the strides.
    for layout in ("transposed", "strided", "offset"):
        t = laid_out(torch.randn(4, 6), layout)
        assert t.reshape(-1, 6).data_ptr() == t.data_ptr()
