"""The `torch` backend against the specification in fp64: every dtype, shape, layout and plan."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn import functional as F

from lora_kernels import ArgumentError, UnsupportedError, config, explain_plan, lora_linear
from lora_kernels.ops import Needs, _linear_torch, low_rank_torch
from lora_kernels.planning import Plan
from lora_kernels.testing import (
    LinearInputs,
    make_linear_inputs,
    order_errors,
    poisoned_allocation,
    relative_error,
    run_linear,
    run_linear_plan,
)
from tests.equality import whole
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
    truth_of,
    with_layouts,
)

ALL_DTYPES = {**DTYPES, "fp64": (torch.float64, torch.float64)}
PLANS = {strategy: Plan("torch", strategy, "a test asks for it") for strategy in ("library", "upcast")}
# Even, odd and prime, tall and wide, one, and a tail after each row block; M, N, K.
SIZES = [(64, 48, 32), (37, 51, 45), (131, 7, 97), (3, 129, 1), (5, 1, 64), (1, 96, 80), (2, 3, 3)]
RANKS = (1, 8, 16, 64, 256, 512)
BLOCK = 1 << 15  # elements, where a test is of blocks: theirs are 2^20 and 2^23, which take a second each

on_torch = partial(run_linear, backend="torch")


def problems(size, dtype, *, r=8, **options) -> list[LinearInputs]:
    x, adapters = ALL_DTYPES[dtype]
    return pooled(make_linear_inputs, *size, r, dtype=x, adapter_dtype=adapters, **options)


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_budget_over_sizes(dtype, size, bias, p):
    assert_within_budget(problems(size, dtype, bias=bias, dropout_p=p), on_torch)


@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_under_both_plans(dtype, size, p, strategy):
    # This machine's CPU gets one of the two for each dtype; other CPUs get the other.
    assert_within_budget(problems(size, dtype, dropout_p=p), partial(run_linear_plan, plan=PLANS[strategy]))


@over_fp16s_range()
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("strategy", PLANS)
def test_fp16_stays_in_range(strategy, bias, stored, scaling, p):
    problem = make_linear_inputs(64, 48, 32, 8, dtype=torch.float16, scaling=scaling, dropout_p=p, bias=bias)
    problem = far_from_one(problem, stored)
    assert_in_range(problem, stored, run_linear_plan(problem, PLANS[strategy]))


@pytest.mark.parametrize(
    "run", [on_torch, *(partial(run_linear_plan, plan=plan) for plan in PLANS.values())], ids=["auto", *PLANS]
)
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize("dtype", ["fp16-mixed", "bf16-mixed"])
def test_budget_with_a_bias_in_fp32(dtype, size, run):
    assert_within_budget(problems(size, dtype, bias_dtype=torch.float32), run)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_bias_in_fp32_and_its_gradient_stay_there(backend):
    inputs = make_linear_inputs(
        300, 40, 24, 8, dtype=torch.bfloat16, adapter_dtype=torch.float32, bias_dtype=torch.float32
    )
    found = run_linear(inputs, backend)
    assert found["y"].dtype == torch.bfloat16
    assert found["d_bias"].dtype == torch.float32
    # To fp32's precision, which no gradient has that was once rounded to 16 bits.
    assert relative_error(found["d_bias"], truth_of(inputs)["d_bias"]) < 1e-6
    half = run_linear(replace(inputs, bias=inputs.bias.bfloat16()), backend)
    assert half["d_bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_as_a_tensor_is_the_number_and_gets_a_gradient(dtype, backend):
    x, adapters = DTYPES[dtype]
    i = make_linear_inputs(37, 51, 45, 8, dtype=x, adapter_dtype=adapters, dropout_p=0.25)
    as_tensor = replace(i, scaling=torch.tensor(1.3, dtype=torch.float64))
    runs = [run_linear(replace(i, scaling=1.3), backend), run_linear(as_tensor, backend)]
    truth = truth_of(replace(i, scaling=1.3))
    order = order_errors(truth, i)
    # The product with lora_B is one more rounding to its dtype, which y, dx, dA and dB each see once.
    for name in runs[0]:
        limit = 2 * relative_error(runs[0][name], truth[name]) + torch.finfo(adapters).eps + order[name]
        assert relative_error(runs[1][name], truth[name]) <= limit, name

    scaling = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    lora_linear(i.x, i.weight, i.lora_A, i.lora_B, scaling=scaling, backend=backend).float().mul(i.dy).sum().backward()
    term = i.x.double() @ i.lora_A.double().T @ i.lora_B.double().T
    torch.testing.assert_close(scaling.grad, (term * i.dy.double()).sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_budget_over_ranks(dtype, p, r):
    assert_within_budget(problems((50, 40, 72), dtype, r=r, dropout_p=p), on_torch)


# More than one block of rows, and more than one of columns (256, or the limit over K), with a tail in each.
@pytest.mark.parametrize("size", [(BLOCK // 515 + 77, 24, 515), (18, 300, 129), (18, 700, 60)], ids=["rows", "N", "K"])
@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
def test_budget_across_blocks(monkeypatch, dtype, strategy, size):
    monkeypatch.setitem(low_rank_torch.BLOCK_ELEMENTS, "cpu", BLOCK)
    monkeypatch.setattr(_linear_torch, "WEIGHT_BLOCK_ELEMENTS", BLOCK)
    x, adapters = DTYPES[dtype]
    inputs = make_linear_inputs(*size, 4, dtype=x, adapter_dtype=adapters, dropout_p=0.5)
    assert_within_budget(inputs, partial(run_linear_plan, plan=PLANS[strategy]))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (2, 1, 3), (1, 2, 3, 1)], ids=str)
def test_leading_dimensions(leading, dtype):
    x, adapters = ALL_DTYPES[dtype]
    m = int(torch.tensor(leading).prod()) if leading else 1
    flat = whole(make_linear_inputs(m, 40, 24, 4, dtype=x, adapter_dtype=adapters, dropout_p=0.5))
    shaped = replace(flat, x=flat.x.view(*leading, 24), dy=flat.dy.view(*leading, 40))
    actual, expected = on_torch(shaped), on_torch(flat)
    assert actual["y"].shape == (*leading, 40)
    assert actual["d_x"].shape == (*leading, 24)
    assert_same_bits({k: v.reshape(expected[k].shape) for k, v in actual.items()}, expected)


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@pytest.mark.parametrize("leading", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_no_tokens(dtype, leading, backend):
    x, adapters = ALL_DTYPES[dtype]
    inputs = make_linear_inputs(0, 6, 4, 2, dtype=x, adapter_dtype=adapters, dropout_p=0.5)
    inputs = replace(inputs, x=inputs.x.view(*leading, 4), dy=inputs.dy.view(*leading, 6))
    results = run_linear(inputs, backend)
    assert results["y"].shape == (*leading, 6)
    for name in PARAMETERS:
        gradient, parameter = results[f"d_{name}"], getattr(inputs, name)
        assert gradient.shape == parameter.shape
        assert gradient.dtype == parameter.dtype
        assert not gradient.any()


@pytest.mark.parametrize("tensor", [*PARAMETERS, "dy"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
def test_layouts_do_not_change_results(dtype, layout, tensor):
    x, adapters = DTYPES[dtype]
    inputs = make_linear_inputs(40, 56, 48, 8, dtype=x, adapter_dtype=adapters, dropout_p=0.25)
    awkward = with_layouts(inputs, **{tensor: layout})
    assert_within_budget(awkward, on_torch)
    for name, gradient in on_torch(awkward).items():
        if name != "y":
            assert gradient.shape == getattr(inputs, name.removeprefix("d_")).shape


@pytest.mark.parametrize("shape", [(4, 5, 24), (2, 3, 4, 24)], ids=str)
def test_x_that_no_view_flattens(shape):
    inputs = make_linear_inputs(20, 40, 24, 4, dtype=torch.float32)
    x = torch.randn(shape).transpose(0, 1)
    dy = torch.randn(*x.shape[:-1], 40).transpose(0, 1).contiguous().transpose(0, 1)
    inputs = whole(replace(inputs, x=x, dy=dy))
    assert inputs.x.stride() == x.stride()
    truth = run_linear(inputs.double(), "reference")
    flat = replace(inputs, x=inputs.x.reshape(-1, 24), dy=inputs.dy.reshape(-1, 40))
    results = on_torch(inputs)
    assert results["d_x"].shape == truth["d_x"].shape == x.shape
    assert_same_bits(
        {k: v.reshape(-1) for k, v in results.items()}, {k: v.reshape(-1) for k, v in on_torch(flat).items()}
    )


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_dy_of_a_sum(dtype, reduce):
    x, adapters = DTYPES[dtype]
    inputs = whole(make_linear_inputs(32, 64, 48, 8, dtype=x, adapter_dtype=adapters))
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in PARAMETERS}
    y = lora_linear(*leaves.values(), scaling=2.0, backend="torch")
    getattr(y, reduce)().backward()
    one = torch.ones((), dtype=x) / (y.numel() if reduce == "mean" else 1)
    expected = on_torch(replace(inputs, dy=one.to(x).expand(32, 64)))
    assert_same_bits(
        {f"d_{n}": leaf.grad for n, leaf in leaves.items()}, {n: expected[n] for n in expected if n != "y"}
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16-mixed"])
@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_every_subset_of_gradients(dtype, strategy, p):
    x, adapters = DTYPES[dtype]
    inputs = whole(make_linear_inputs(20, 24, 32, 4, dtype=x, adapter_dtype=adapters, dropout_p=p))
    full = run_linear_plan(inputs, PLANS[strategy])
    for subset in SUBSETS:
        part = run_linear_plan(inputs, PLANS[strategy], Needs(*(name in subset for name in PARAMETERS)))
        assert_same_bits(part, {name: full[name] for name in ("y", *(f"d_{s}" for s in subset))})


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unwritten_memory_does_not_show(dtype, strategy, p):
    x, adapters = DTYPES[dtype]
    inputs = whole(make_linear_inputs(37, 51, 45, 5, dtype=x, adapter_dtype=adapters, dropout_p=p))
    expected, public = run_linear_plan(inputs, PLANS[strategy]), on_torch(inputs)
    with poisoned_allocation():
        assert_same_bits(run_linear_plan(inputs, PLANS[strategy]), expected)
        assert_same_bits(on_torch(inputs), public)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_same_call_same_bits(dtype, p):
    x, adapters = ALL_DTYPES[dtype]
    inputs = whole(make_linear_inputs(300, 130, 515, 8, dtype=x, adapter_dtype=adapters, dropout_p=p))
    first = on_torch(inputs)
    for _ in range(3):
        assert_same_bits(on_torch(inputs), first)


@pytest.mark.parametrize("dtype", ["fp16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_fp32_adapter_gradients_never_pass_through_16_bits(dtype, strategy, p):
    x, adapters = DTYPES[dtype]
    inputs = make_linear_inputs(64, 48, 40, 8, dtype=x, adapter_dtype=adapters, dropout_p=p)
    results = run_linear_plan(inputs, PLANS[strategy])
    for name in ("d_lora_A", "d_lora_B"):
        gradient = results[name]
        assert gradient.dtype == torch.float32
        # Of 2^13 fp32 numbers, one is representable in fp16 (11 bits of significand), fewer in bf16.
        assert (gradient.to(x).float() == gradient).float().mean() < 0.02


@pytest.mark.parametrize("dtype", ["fp16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_upcast_rounds_y_once_and_library_twice(dtype, p):
    x, adapters = DTYPES[dtype]
    inputs = make_linear_inputs(64, 48, 40, 8, dtype=x, adapter_dtype=adapters, dropout_p=p)
    assert_rounded_once_each(inputs, {"y": run_linear_plan(inputs, PLANS["upcast"])["y"]})
    with pytest.raises(AssertionError, match="elements"):
        assert_rounded_once_each(inputs, {"y": run_linear_plan(inputs, PLANS["library"])["y"]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "bias", "lora_A", "lora_B", "dy"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
def test_nan_and_inf_propagate(dtype, where, value):
    x, adapters = DTYPES[dtype]
    inputs = make_linear_inputs(20, 24, 32, 4, dtype=x, adapter_dtype=adapters, dropout_p=0.5, seed=3)
    getattr(inputs, where).view(-1)[37 % getattr(inputs, where).numel()] = value
    actual, expected = on_torch(inputs), run_linear(inputs, "reference")
    for name, gradient in expected.items():
        assert torch.equal(actual[name].isfinite(), gradient.isfinite()), name
    # The row of y that F.linear would spoil is spoilt.
    base = F.linear(inputs.x, inputs.weight, inputs.bias)
    assert not actual["y"][~base.isfinite()].isfinite().any()


def test_inputs_are_left_alone():
    inputs = make_linear_inputs(20, 24, 32, 4, dtype=torch.float32, dropout_p=0.5)
    names = (*PARAMETERS, "dy")
    before = {name: getattr(inputs, name).clone() for name in names}
    on_torch(inputs)
    assert_same_bits({name: getattr(inputs, name) for name in names}, before)


def test_without_grad_nothing_is_recorded():
    inputs = make_linear_inputs(2, 3, 4, 1, dtype=torch.float32)
    with torch.no_grad():
        leaves = [getattr(inputs, name).requires_grad_() for name in PARAMETERS]
        assert lora_linear(*leaves).grad_fn is None
    with torch.inference_mode():
        assert lora_linear(*leaves).is_inference()


def test_scaling_may_be_any_real():
    i = make_linear_inputs(3, 5, 4, 2, dtype=torch.float64)
    arguments = (i.x, i.weight, i.lora_A, i.lora_B, i.bias)
    for scaling in (0, -1, 3, 0.125, 1e-8, 1e6):
        y = lora_linear(*arguments, scaling=scaling)
        expected = F.linear(i.x, i.weight, i.bias) + scaling * (i.x @ i.lora_A.T @ i.lora_B.T)
        assert (y - expected).norm() <= 64 * 2**-53 * (expected.norm() + abs(scaling) * i.x.norm())


def test_a_zero_adapter_is_f_linear():
    # Exactly: the zeros that the base accumulates on change nothing.
    i = whole(make_linear_inputs(33, 65, 129, 8, dtype=torch.float64))
    y = lora_linear(i.x, i.weight, i.lora_A, torch.zeros_like(i.lora_B), scaling=3.0, dropout_p=0.5)
    assert torch.equal(y, i.x @ i.weight.T)


def test_explicit_triton_on_the_cpu_is_refused_with_the_reason():
    i = make_linear_inputs(2, 3, 4, 1, dtype=torch.float32)
    with pytest.raises(
        UnsupportedError, match=r"backend='triton'.*(CPU.*TRITON_INTERPRET|not installed).*backend='auto'"
    ):
        lora_linear(i.x, i.weight, i.lora_A, i.lora_B, backend="triton")


def nodes_of(y) -> set[str]:
    names, queue = set(), [y.grad_fn]
    while queue:
        node = queue.pop()
        names.add(type(node).__name__)
        queue += [parent for parent, _ in node.next_functions if parent is not None]
    return names


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("auto", True), ("torch", True), ("reference", False), ("triton", UnsupportedError), ("x", ArgumentError)],
)
def test_a_process_may_say_what_auto_means(monkeypatch, backend, expected):
    # As LORA_KERNELS_BACKEND does; test_cli has the variable itself.
    monkeypatch.setattr(config, "AUTO_BACKEND", backend)
    i = make_linear_inputs(2, 3, 4, 1, dtype=torch.float32)
    arguments = (i.x.requires_grad_(), i.weight, i.lora_A, i.lora_B)
    if isinstance(expected, bool):
        assert any("LoRALinearFunction" in name for name in nodes_of(lora_linear(*arguments))) == expected
        assert (explain_plan(8, 8, 8, 8, dtype=torch.float32, device="cpu").backend == "reference") != expected
        return
    for refused in (
        lambda: lora_linear(*arguments),
        lambda: explain_plan(8, 8, 8, 8, dtype=torch.float32, device="cpu"),
    ):
        with pytest.raises(expected, match=f"{backend}"):
            refused()


# From 2, so that 50 problems have 100 roundings in every tensor, and without expanded rows, which repeat the same
# roundings: both have tests of their own. Ones are among SIZES.
dimension = st.one_of(st.integers(2, 9), st.sampled_from([16, 31, 64, 65]))


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.tuples(dimension, dimension, dimension),
    r=st.integers(2, 40),
    dtype=st.sampled_from(sorted(ALL_DTYPES)),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.75]),
    bias=st.booleans(),
    scaling=st.sampled_from([-2.0, 0.125, 1.0, 16.0]),
    layouts=st.fixed_dictionaries(
        {name: st.sampled_from(LAYOUTS[:-1]) for name in ("x", "weight", "lora_A", "lora_B", "dy")}
    ),
    strategy=st.sampled_from(["public", *PLANS]),
)
def test_budget_everywhere(size, r, dtype, p, bias, scaling, layouts, strategy):
    if dtype == "fp64" and strategy == "upcast":
        strategy = "library"  # fp64 has nothing to be cast up to; no plan asks for it
    run = on_torch if strategy == "public" else partial(run_linear_plan, plan=PLANS[strategy])
    several = [with_layouts(i, **layouts) for i in problems(size, dtype, r=r, bias=bias, scaling=scaling, dropout_p=p)]
    assert_within_budget(several, run)


def test_layouts_are_what_they_say():
    t = torch.arange(12.0).view(3, 4)
    assert not laid_out(t, "transposed").is_contiguous()
    assert laid_out(t, "strided").stride() == (8, 2)
    assert laid_out(t, "offset").storage_offset() == 1
    assert laid_out(t, "expanded").stride(0) == 0
    for layout in LAYOUTS[:4]:
        assert torch.equal(laid_out(t, layout), t)
