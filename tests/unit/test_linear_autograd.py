"""What autograd and the transforms around it meet: saved tensors, memory, second derivatives, checkpoints, autocast."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_kernels import UnsupportedError, lora_linear
from lora_kernels.ops import Needs, _linear_torch, low_rank_torch
from lora_kernels.planning import Plan
from lora_kernels.reference import linear as reference
from lora_kernels.testing import make_linear_inputs, run_linear
from tests.equality import whole, whole_numbers
from tests.linear_cases import DTYPES, PARAMETERS, SUBSETS, Allocations, assert_same_bits, assert_within_budget

M, N, K, R = 20, 24, 32, 4
BLOCK = 1 << 15  # elements, where a test is of blocks: theirs have 2^20, and tokens to fill them took 17 s


def leaves_of(inputs, requires_grad=PARAMETERS) -> dict[str, Tensor]:
    return {name: getattr(inputs, name).clone().requires_grad_(name in requires_grad) for name in PARAMETERS}


def call(leaves, inputs, **options) -> Tensor:
    options = {"scaling": inputs.scaling, "dropout_p": inputs.dropout_p, "backend": "torch", **options}
    return lora_linear(*leaves.values(), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_gradients_exactly_where_asked(dtype, p):
    x, adapters = DTYPES[dtype]
    inputs = whole(make_linear_inputs(M, N, K, R, dtype=x, adapter_dtype=adapters, dropout_p=p))
    full = run_linear(inputs, "torch")
    for subset in SUBSETS:
        part = run_linear(inputs, "torch", requires_grad=subset)
        assert_same_bits(part, {name: full[name] for name in ("y", *(f"d_{s}" for s in subset))})
        for name in subset:
            assert part[f"d_{name}"].dtype == getattr(inputs, name).dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_saved_bytes_are_the_documented_ones(dtype, p, backend):
    x, adapters = DTYPES[dtype]
    inputs = make_linear_inputs(M, N, K, R, dtype=x, adapter_dtype=adapters, dropout_p=p)
    for subset in SUBSETS:
        leaves = leaves_of(inputs, subset)
        owned = {leaves[name].untyped_storage().data_ptr() for name in PARAMETERS if name != "x"}
        saved: dict[int, int] = {}

        def pack(t, owned=owned, saved=saved):
            address = t.untyped_storage().data_ptr()
            if address not in owned:
                saved[address] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = call(leaves, inputs, backend=backend, dropout_seed=5)
        expected = 0
        if {"lora_A", "weight"} & set(subset):
            expected += M * K * x.itemsize
        if "lora_B" in subset:
            expected += M * R * adapters.itemsize
        if p > 0 and {"x", "lora_A"} & set(subset):
            expected += 8
        assert sum(saved.values()) == expected, subset
        assert y.requires_grad == bool(subset)


def test_frozen_weight_costs_the_documented_bytes_and_no_more():
    # The case that the documentation states: x and M * R elements, and 8 bytes under dropout.
    inputs = make_linear_inputs(64, 128, 256, 8, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.5)
    leaves = leaves_of(inputs, ("x", "lora_A", "lora_B"))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        call(leaves, inputs)
    parameters = sum(leaves[name].nbytes for name in ("weight", "lora_A", "lora_B"))
    assert sum(sizes) - parameters == 64 * 256 * 2 + 64 * 8 * 4 + 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["library", "upcast"])
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_nothing_else_of_token_size_is_made(monkeypatch, dtype, strategy, p):
    monkeypatch.setitem(low_rank_torch.BLOCK_ELEMENTS, "cpu", BLOCK)
    x, adapters = DTYPES[dtype]
    # M so large that one fp32 block is half of the smallest tensor of tokens.
    n, k, r = 80, 72, 8
    m = 4 * BLOCK // k + 77
    i = make_linear_inputs(m, n, k, r, dtype=x, adapter_dtype=adapters, dropout_p=p)
    plan, rest = Plan("torch", strategy, "a test asks for it"), (torch.tensor([1]) if p else None, 2.0, p)
    of_token_size = m * k * 2
    with Allocations() as forward:
        y, xa = _linear_torch.forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, *rest, plan)
    with Allocations() as backward:
        dx, *_ = _linear_torch.backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, xa, *rest, Needs(*[True] * 5), plan)
    for trace, only in ((forward, y), (backward, dx)):
        large = {a: size for a, size in trace.fresh.items() if size >= of_token_size}
        assert large == {only.untyped_storage().data_ptr(): only.nbytes}
        if x != torch.float32:
            assert not {((m, n), torch.float32), ((m, k), torch.float32)} & trace.seen


def test_allocations_sees_a_temporary():
    t = torch.ones(10)
    with Allocations() as trace:
        (t + 1).mul_(2).view(2, 5)
    assert list(trace.fresh.values()) == [40]


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_second_derivative_is_refused_and_the_first_is_right(p, backend):
    inputs = whole(make_linear_inputs(M, N, K, R, dtype=torch.float64, dropout_p=p))
    leaves = leaves_of(inputs)
    y = call(leaves, inputs, backend=backend, dropout_seed=0)
    first = torch.autograd.grad(y, list(leaves.values()), inputs.dy, create_graph=True)
    expected = run_linear(inputs, "torch")
    named = {f"d_{name}": g.detach() for name, g in zip(PARAMETERS, first, strict=True)}
    assert_same_bits({**named, "y": y.detach()}, expected)
    penalty = sum(g.square().sum() for g in first)
    with pytest.raises(UnsupportedError, match=r"differentiable once.*backend='reference'"):
        penalty.backward()


def test_second_derivative_is_never_silently_zero():
    # Also where the gradient reaches only one input, and where dy is what is differentiated.
    inputs = make_linear_inputs(M, N, K, R, dtype=torch.float64)
    for subset in SUBSETS[1:]:
        leaves = leaves_of(inputs, subset)
        dy = inputs.dy.clone().requires_grad_()
        first = torch.autograd.grad(
            call(leaves, inputs), [leaves[n] for n in subset], dy, create_graph=True, materialize_grads=True
        )
        with pytest.raises(UnsupportedError, match="differentiable once"):
            torch.autograd.grad(sum(g.sum() for g in first), dy)


def test_reference_backend_is_differentiable_twice():
    inputs = make_linear_inputs(3, 4, 5, 2, dtype=torch.float64, dropout_p=0.3)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(inputs).values()]

    def function(*tensors):
        return lora_linear(*tensors, scaling=2.0, dropout_p=0.3, dropout_seed=1, backend="reference")

    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_the_public_function(bias, p):
    inputs = make_linear_inputs(5, 7, 6, 3, dtype=torch.float64, bias=bias)
    leaves = [t.requires_grad_() for name in PARAMETERS if (t := getattr(inputs, name)) is not None]
    function = partial(lora_linear, scaling=1.7, dropout_p=p, dropout_seed=4, backend="torch")
    assert torch.autograd.gradcheck(function, leaves)


def test_no_gradient_flows_from_no_use():
    inputs = make_linear_inputs(M, N, K, R, dtype=torch.float32)
    leaves = leaves_of(inputs)
    y = call(leaves, inputs)
    other = torch.zeros((), requires_grad=True)
    assert torch.autograd.grad((y.detach() * other).sum(), leaves["x"], allow_unused=True) == (None,)


def test_backward_twice_over_a_kept_graph():
    inputs = whole(make_linear_inputs(M, N, K, R, dtype=torch.float32, dropout_p=0.5))
    leaves = leaves_of(inputs)
    y = call(leaves, inputs, dropout_seed=1)
    once = torch.autograd.grad(y, list(leaves.values()), inputs.dy, retain_graph=True)
    twice = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("changed", ["x", "lora_A", "lora_B", "weight", "seed"])
def test_a_saved_tensor_that_was_written_to_is_noticed(changed):
    inputs = make_linear_inputs(M, N, K, R, dtype=torch.float32, dropout_p=0.5)
    leaves, seed = leaves_of(inputs), torch.tensor([3])
    y = call(leaves, inputs, dropout_seed=seed)
    with torch.no_grad():
        (seed if changed == "seed" else leaves[changed]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 1, 5)])
@pytest.mark.parametrize("change", ["add_", "relu_", "through checkpoint"])
def test_the_output_may_be_changed_in_place(change, leading, grad):
    i = whole(make_linear_inputs(M, N, K, R, dtype=torch.float32))
    x, residual = whole_numbers(torch.randn(*leading, K)), whole_numbers(torch.randn(*leading, N))

    def block(x, lora_A, *, in_place):
        y = lora_linear(x, i.weight, lora_A, i.lora_B, i.bias, backend="torch")
        if change == "relu_":
            return y.relu_() if in_place else y.relu()
        return y.add_(residual) if in_place else y + residual

    results = []
    for in_place in (True, False):
        leaves = x.clone().requires_grad_(grad), i.lora_A.clone().requires_grad_(grad)
        run = partial(block, in_place=in_place)
        y = checkpoint(run, *leaves, use_reentrant=False) if change == "through checkpoint" else run(*leaves)
        results.append((y.detach(), *(torch.autograd.grad(y.sum(), leaves) if grad else ())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not lora_linear(x, i.weight, i.lora_A, i.lora_B)._is_view()


@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed"])
def test_torch_func_grad(dtype):
    x, adapters = DTYPES[dtype]
    i = whole(make_linear_inputs(M, N, K, R, dtype=x, adapter_dtype=adapters, dropout_p=0.5))

    def loss(*tensors):
        y = lora_linear(*tensors, scaling=i.scaling, dropout_p=0.5, dropout_seed=0, backend="torch")
        return (y * i.dy).sum()

    tensors = [getattr(i, name) for name in PARAMETERS]
    gradients = torch.func.grad(loss, argnums=tuple(range(5)))(*tensors)
    expected = run_linear(i, "torch")
    for name, gradient in zip(PARAMETERS, gradients, strict=True):
        assert torch.equal(gradient, expected[f"d_{name}"]), name
    of_lora_B = torch.func.grad(loss, argnums=3)
    with pytest.raises(UnsupportedError, match="differentiable once"):
        torch.func.grad(lambda *t: of_lora_B(*t).float().sum(), argnums=2)(*tensors)


# The op has no batching rule of its own and runs once per slice; functorch says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_torch_func_vmap(p):
    i = whole(make_linear_inputs(M, N, K, R, dtype=torch.float64, dropout_p=p))
    rest = {"scaling": 2.0, "dropout_p": p, "dropout_seed": torch.tensor([4]), "backend": "torch"}

    def loss(x, weight, lora_A, lora_B, bias):
        return lora_linear(x, weight, lora_A, lora_B, bias, **rest).square().sum()

    batch = whole_numbers(torch.randn(3, 5, K).double())
    tensors = [getattr(i, name) for name in PARAMETERS[1:]]
    y = torch.func.vmap(lambda x: lora_linear(x, *tensors, **rest))(batch)
    assert torch.equal(y, torch.stack([lora_linear(x, *tensors, **rest) for x in batch]))
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=2), in_dims=(0, None, None, None, None))(batch, *tensors)
    expected = torch.stack([torch.func.grad(loss, argnums=2)(x, *tensors) for x in batch])
    assert torch.equal(per_sample, expected)


# functorch loads torch's own decompositions, written with torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused_and_not_silently_zero():
    i = make_linear_inputs(M, N, K, R, dtype=torch.float64)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
        torch.func.jvp(lambda x: lora_linear(x, i.weight, i.lora_A, i.lora_B), (i.x,), (i.x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_autocast_is_f_linears(dtype, adapters, x_dtype, backend):
    i = make_linear_inputs(16, 24, 32, 4, dtype=torch.float32)
    i = replace(i, x=i.x.to(x_dtype), lora_A=i.lora_A.to(adapters), lora_B=i.lora_B.to(adapters))
    leaves, plain = leaves_of(i), leaves_of(i)
    with torch.autocast("cpu", dtype):
        y = call(leaves, i, backend=backend)
        base = F.linear(plain["x"], plain["weight"], plain["bias"])
    assert y.dtype == base.dtype == dtype
    y.float().mul(i.dy).sum().backward()
    base.float().mul(i.dy).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype == getattr(i, name).dtype
        if not name.startswith("lora"):
            assert plain[name].grad.dtype == leaf.grad.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_autocast_computes_what_the_cast_call_does(dtype, p):
    wide = make_linear_inputs(40, 56, 48, 8, dtype=torch.float32, dropout_p=p)

    def cast(inputs):
        return replace(inputs, x=inputs.x.to(dtype), weight=inputs.weight.to(dtype), dy=inputs.dy.to(dtype))

    def under_autocast(inputs):
        leaves = leaves_of(inputs)
        with torch.autocast("cpu", dtype):
            y = call(leaves, inputs, dropout_seed=0)
        y.backward(inputs.dy.to(dtype))
        assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())
        return {"y": y.detach()} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}

    expected = run_linear(cast(whole(wide)), "torch")
    assert_same_bits(under_autocast(whole(wide)), {n: t if n == "y" else t.float() for n, t in expected.items()})
    # fp32 adapters, and a bias beside them, stay fp32 inside: not one gradient of theirs is a 16-bit number.
    d_lora_A = under_autocast(wide)["d_lora_A"]
    assert (d_lora_A.to(dtype).float() == d_lora_A).float().mean() < 0.02
    assert_within_budget(cast(wide), partial(run_linear, backend="torch"))


def test_autocast_leaves_fp64_alone():
    i = whole(make_linear_inputs(5, 6, 7, 2, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(i.x, i.weight, i.lora_A, i.lora_B, i.bias)
    assert torch.equal(y, lora_linear(i.x, i.weight, i.lora_A, i.lora_B, i.bias))


def test_backward_outside_and_inside_autocast_agree():
    i = whole(make_linear_inputs(16, 24, 32, 4, dtype=torch.float32))
    gradients = []
    for inside in (True, False):
        leaves = leaves_of(i)
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(leaves, i).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    assert_same_bits(*gradients)


@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
def test_it_is_the_same_function_on_every_backend(backend):
    i = make_linear_inputs(M, N, K, R, dtype=torch.float64, dropout_p=0.5)
    y = lora_linear(i.x, i.weight, i.lora_A, i.lora_B, i.bias, dropout_p=0.5, dropout_seed=8, backend=backend)
    expected = reference.lora_linear(i.x, i.weight, i.lora_A, i.lora_B, i.bias, dropout_p=0.5, seed=torch.tensor([8]))
    # Two orders of at most 64 roundings each.
    assert (y - expected).norm() <= 2 * 64 * 2**-53 * expected.norm() * 4
