"""What autograd and the transforms around it meet in a branch: saved tensors, memory, replays, autocast, masks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_kernels import UnsupportedError, lora_branch, lora_linear
from lora_kernels.ops import BranchNeeds, _branch_torch, low_rank_torch
from lora_kernels.planning import BranchPlan, Way
from lora_kernels.reference.philox import dropout_scale, keep_mask
from lora_kernels.testing import run_branch
from tests.branch_cases import DTYPES, SUBSETS, TENSORS, inputs_of
from tests.equality import differ, whole, whole_numbers
from tests.linear_cases import Allocations, assert_same_bits, assert_within_budget

M, N, K, R = 20, 24, 32, 4
BLOCK = 1 << 15  # elements, where a test is of blocks: theirs have 2^20, and tokens to fill them took 17 s
FP64 = (torch.float64,) * 3
BACKENDS = ("torch", "reference", "auto")


def leaves_of(inputs, requires_grad=TENSORS) -> dict[str, Tensor]:
    return {name: getattr(inputs, name).clone().requires_grad_(name in requires_grad) for name in TENSORS}


def call(leaves, inputs, **options) -> Tensor:
    options = {"scaling": inputs.scaling, "dropout_p": inputs.dropout_p, "backend": "torch", **options}
    return lora_branch(*leaves.values(), **options)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_gradients_exactly_where_asked(dtypes, p):
    inputs = whole(inputs_of((M, N, K), dtypes, R, dropout_p=p))
    full = run_branch(inputs, "torch")
    for subset in SUBSETS:
        part = run_branch(inputs, "torch", requires_grad=subset)
        assert_same_bits(part, {name: full[name] for name in ("y", *(f"d_{s}" for s in subset))})
        for name in subset:
            assert part[f"d_{name}"].dtype == getattr(inputs, name).dtype


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_saved_bytes_are_the_documented_ones(dtypes, p, backend):
    x, adapters, _ = DTYPES[dtypes]
    inputs = inputs_of((M, N, K), dtypes, R, dropout_p=p)
    for subset in SUBSETS:
        leaves = leaves_of(inputs, subset)
        owned = {leaves[name].untyped_storage().data_ptr() for name in ("lora_A", "lora_B")}
        saved: dict[int, int] = {}

        def pack(t, owned=owned, saved=saved):
            address = t.untyped_storage().data_ptr()
            if address not in owned:
                saved[address] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = call(leaves, inputs, backend=backend, dropout_seed=5)
        expected = 0
        if "lora_A" in subset:
            expected += M * K * x.itemsize
        if "lora_B" in subset:
            expected += M * R * adapters.itemsize
        if p > 0 and {"x", "lora_A"} & set(subset):
            expected += 8
        assert sum(saved.values()) == expected, subset
        assert y.requires_grad == bool(subset)


def test_a_branch_keeps_no_more_than_lora_linear_does():
    inputs = inputs_of((64, 128, 256), "bf16-mixed", dropout_p=0.5)
    leaves, weight = leaves_of(inputs, ("base_out", "x", "lora_A", "lora_B")), torch.randn(128, 256).bfloat16()
    sizes = {"branch": [], "linear": []}
    for name, forward in (
        ("branch", lambda: call(leaves, inputs)),
        ("linear", lambda: lora_linear(leaves["x"], weight, leaves["lora_A"], leaves["lora_B"], dropout_p=0.5)),
    ):
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=name: sizes[n].append(t.nbytes) or t, lambda t: t):
            forward()
    parameters = leaves["lora_A"].nbytes + leaves["lora_B"].nbytes
    assert sum(sizes["branch"]) == 64 * 256 * 2 + 64 * 8 * 4 + 8 + parameters
    assert sum(sizes["linear"]) == sum(sizes["branch"]) + weight.nbytes


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("strategy", ["library", "upcast"])
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_nothing_else_of_token_size_is_made(monkeypatch, dtypes, strategy, p):
    monkeypatch.setitem(low_rank_torch.BLOCK_ELEMENTS, "cpu", BLOCK)
    # M so large that one fp32 block is half of the smallest tensor of tokens.
    n, k = 80, 72
    m = 4 * BLOCK // k + 77
    i = inputs_of((m, n, k), dtypes, dropout_p=p)
    plan, rest = BranchPlan("torch", strategy, "", Way("torch", strategy)), (torch.tensor([1]) if p else None, 2.0, p)
    with Allocations() as forward:
        y, xa = _branch_torch.forward(i.base_out, i.x, i.lora_A, i.lora_B, *rest, plan)
    with Allocations() as backward:
        dx, *_ = _branch_torch.backward(
            i.dy, i.x, i.lora_A, i.lora_B, xa, *rest, i.x.dtype, BranchNeeds(True, True, True), plan
        )
    for trace, only in ((forward, y), (backward, dx)):
        large = {a: size for a, size in trace.fresh.items() if size >= m * k * 2}
        assert large == {only.untyped_storage().data_ptr(): only.nbytes}
        for made, columns in ((i.x, k), (i.base_out, n)):
            if made.dtype != torch.float32:
                assert ((m, columns), torch.float32) not in trace.seen


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_second_derivative_is_refused_and_the_first_is_right(p, backend):
    inputs = whole(inputs_of((M, N, K), FP64, R, dropout_p=p))
    leaves = leaves_of(inputs)
    y = call(leaves, inputs, backend=backend, dropout_seed=0)
    first = torch.autograd.grad(y, list(leaves.values()), inputs.dy, create_graph=True)
    named = {f"d_{name}": g.detach() for name, g in zip(TENSORS, first, strict=True)}
    assert_same_bits({**named, "y": y.detach()}, run_branch(inputs, "torch"))
    with pytest.raises(UnsupportedError, match=r"^lora_branch is differentiable once.*backend='reference'"):
        sum(g.square().sum() for g in first).backward()


def test_second_derivative_is_never_silently_zero():
    inputs = inputs_of((M, N, K), FP64, R)
    for subset in SUBSETS[1:]:
        leaves, dy = leaves_of(inputs, subset), inputs.dy.clone().requires_grad_()
        first = torch.autograd.grad(
            call(leaves, inputs), [leaves[n] for n in subset], dy, create_graph=True, materialize_grads=True
        )
        total = sum(g.sum() for g in first)
        if subset == ("base_out",):  # its gradient is dy, and differentiable as dy is
            assert torch.equal(torch.autograd.grad(total, dy)[0], torch.ones_like(dy))
            continue
        with pytest.raises(UnsupportedError, match="differentiable once"):
            torch.autograd.grad(total, dy)


def test_reference_backend_is_differentiable_twice():
    inputs = inputs_of((3, 4, 5), FP64, 2)
    function = partial(lora_branch, scaling=2.0, dropout_p=0.3, dropout_seed=1, backend="reference")
    assert torch.autograd.gradgradcheck(function, list(leaves_of(inputs).values()))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_of_the_public_function(p):
    inputs = inputs_of((5, 7, 6), FP64, 3)
    function = partial(lora_branch, scaling=1.7, dropout_p=p, dropout_seed=4, backend="torch")
    assert torch.autograd.gradcheck(function, list(leaves_of(inputs).values()))


def test_backward_twice_over_a_kept_graph():
    inputs = whole(inputs_of((M, N, K), "fp32", R, dropout_p=0.5))
    leaves = leaves_of(inputs)
    y = call(leaves, inputs, dropout_seed=1)
    once = torch.autograd.grad(y, list(leaves.values()), inputs.dy, retain_graph=True)
    twice = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("changed", ["x", "lora_A", "lora_B", "seed"])
def test_a_saved_tensor_that_was_written_to_is_noticed(changed):
    inputs = inputs_of((M, N, K), "fp32", R, dropout_p=0.5)
    leaves, seed = leaves_of(inputs), torch.tensor([3])
    y = call(leaves, inputs, dropout_seed=seed)
    with torch.no_grad():
        (seed if changed == "seed" else leaves[changed]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_base_out_is_not_kept_and_may_be_written_to():
    inputs = whole(inputs_of((M, N, K), "fp32", R))
    leaves = leaves_of(inputs)
    y = call(leaves, inputs)
    with torch.no_grad():
        leaves["base_out"].zero_()
    gradient = torch.autograd.grad(y, leaves["lora_B"], inputs.dy)[0]
    assert torch.equal(gradient, run_branch(inputs, "torch")["d_lora_B"])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 1, 5)])
@pytest.mark.parametrize("change", ["add_", "relu_", "through checkpoint"])
def test_the_output_may_be_changed_in_place(change, leading, grad):
    i = whole(inputs_of((M, N, K), "fp32", R))
    x, base_out, residual = (whole_numbers(torch.randn(*leading, size)) for size in (K, N, N))

    def block(x, base_out, lora_A, *, in_place):
        y = lora_branch(base_out, x, lora_A, i.lora_B, backend="torch")
        if change == "relu_":
            return y.relu_() if in_place else y.relu()
        return y.add_(residual) if in_place else y + residual

    results = []
    for in_place in (True, False):
        leaves = [t.clone().requires_grad_(grad) for t in (x, base_out, i.lora_A)]
        run = partial(block, in_place=in_place)
        y = checkpoint(run, *leaves, use_reentrant=False) if change == "through checkpoint" else run(*leaves)
        results.append((y.detach(), *(torch.autograd.grad(y.sum(), leaves) if grad else ())))
        assert torch.equal(leaves[1], base_out)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not lora_branch(base_out, x, i.lora_A, i.lora_B)._is_view()


def test_a_hook_on_base_out_sees_its_gradient_and_may_replace_it():
    i = inputs_of((M, N, K), "fp32", R)
    x = i.x.clone().requires_grad_()
    weight = torch.randn(N, K, requires_grad=True)
    base_out = F.linear(x, weight)
    seen = []
    base_out.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    y = lora_branch(base_out, x, i.lora_A, i.lora_B, backend="torch")
    (d_weight,) = torch.autograd.grad(y, weight, i.dy)
    assert torch.equal(seen[0], i.dy)
    torch.testing.assert_close(d_weight, 2 * i.dy.T @ i.x)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16-mixed", "bf16-over-fp32"])
def test_torch_func_grad(dtypes):
    i = whole(inputs_of((M, N, K), dtypes, R, dropout_p=0.5))

    def loss(*tensors):
        return (lora_branch(*tensors, scaling=i.scaling, dropout_p=0.5, dropout_seed=0, backend="torch") * i.dy).sum()

    tensors = [getattr(i, name) for name in TENSORS]
    gradients = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*tensors)
    expected = run_branch(i, "torch")
    for name, gradient in zip(TENSORS, gradients, strict=True):
        assert torch.equal(gradient, expected[f"d_{name}"]), name
    of_lora_B = torch.func.grad(loss, argnums=3)
    with pytest.raises(UnsupportedError, match="differentiable once"):
        torch.func.grad(lambda *t: of_lora_B(*t).float().sum(), argnums=2)(*tensors)


# The op has no batching rule of its own and runs once per slice; functorch says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_torch_func_vmap(p):
    i = whole(inputs_of((M, N, K), FP64, R))
    rest = {"scaling": 2.0, "dropout_p": p, "dropout_seed": torch.tensor([4]), "backend": "torch"}

    def loss(base_out, x, lora_A, lora_B):
        return lora_branch(base_out, x, lora_A, lora_B, **rest).square().sum()

    base_out, x = (whole_numbers(torch.randn(3, 5, size).double()) for size in (N, K))
    adapters = (i.lora_A, i.lora_B)
    y = torch.func.vmap(lambda b, x: lora_branch(b, x, *adapters, **rest))(base_out, x)
    assert torch.equal(y, torch.stack([lora_branch(b, a, *adapters, **rest) for b, a in zip(base_out, x, strict=True)]))
    for argnum in (0, 2):
        gradient = torch.func.grad(loss, argnums=argnum)
        # base_out shared by the batch: its gradient is each sample's own, all the same.
        for shared in (base_out, base_out[0]):
            in_dims = (0 if shared.dim() == 3 else None, 0, None, None)
            found = torch.func.vmap(gradient, in_dims=in_dims)(shared, x, *adapters)
            bases = shared if shared.dim() == 3 else shared.expand(3, 5, N)
            expected = [gradient(b, a, *adapters) for b, a in zip(bases, x, strict=True)]
            assert torch.equal(found, torch.stack(expected))


# functorch loads torch's own decompositions, written with torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused_and_not_silently_zero():
    i = inputs_of((M, N, K), FP64, R)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
        torch.func.jvp(lambda b: lora_branch(b, i.x, i.lora_A, i.lora_B), (i.base_out,), (i.base_out,))


# -- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_x_is_cast_and_base_out_is_not(dtype, out_dtype, adapters, x_dtype, backend):
    i = inputs_of((16, 24, 32), (torch.float32,) * 3, R)
    i = replace(i, base_out=i.base_out.to(out_dtype), x=i.x.to(x_dtype))
    i = replace(i, lora_A=i.lora_A.to(adapters), lora_B=i.lora_B.to(adapters))
    leaves = leaves_of(i)
    with torch.autocast("cpu", dtype):
        y = call(leaves, i, backend=backend)
    assert y.dtype == out_dtype
    y.float().mul(i.dy).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype == getattr(i, name).dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_autocast_computes_what_the_cast_call_does(dtype, out_dtype, p):
    # fp32 over a 16-bit x is what a quantised layer meets: it answers in the dtype of the x that it was given.
    wide = inputs_of((40, 56, 48), (torch.float32, torch.float32, out_dtype), dropout_p=p)

    def under_autocast(inputs):
        leaves = leaves_of(inputs)
        with torch.autocast("cpu", dtype):
            y = call(leaves, inputs, dropout_seed=0)
        y.backward(inputs.dy)
        for name, leaf in leaves.items():
            assert leaf.grad.dtype == getattr(inputs, name).dtype
        return {"y": y.detach()} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}

    def as_called(inputs):
        found = run_branch(replace(inputs, x=inputs.x.to(dtype)), "torch")
        return found | {"d_x": found["d_x"].to(inputs.x.dtype)}

    assert_same_bits(under_autocast(whole(wide)), as_called(whole(wide)))
    found = under_autocast(wide)
    # fp32 adapters stay fp32 inside, forward and backward: not one gradient of theirs is a 16-bit number.
    assert (found["d_lora_A"].to(dtype).float() == found["d_lora_A"]).float().mean() < 0.02
    assert_within_budget(replace(wide, x=wide.x.to(dtype)), partial(run_branch, backend="torch"))


def test_autocast_leaves_fp64_alone():
    i = whole(inputs_of((5, 6, 7), FP64, 2))
    arguments = [getattr(i, name) for name in TENSORS]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_branch(*arguments)
    assert torch.equal(y, lora_branch(*arguments))


def test_backward_outside_and_inside_autocast_agree():
    i = whole(inputs_of((16, 24, 32), "fp32", R))
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


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("size", "p", "seed"), [(40, 0.5, 1), (37, 0.1, -3), (64, 0.9, 2**62 + 5), (1, 0.5, 0)])
def test_forward_and_every_gradient_see_the_documented_mask(backend, dtypes, size, p, seed):
    x_dtype, adapters, out = DTYPES[dtypes]
    x = torch.ones(size, size, dtype=x_dtype, requires_grad=True)
    lora_A, lora_B = (torch.eye(size, dtype=adapters, requires_grad=True) for _ in range(2))
    base_out = torch.zeros(size, size, dtype=out)
    y = lora_branch(base_out, x, lora_A, lora_B, dropout_p=p, dropout_seed=seed, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    d_lora_A, d_lora_B = torch.autograd.grad(y, (lora_A, lora_B), torch.eye(size, dtype=out))
    keep = keep_mask(torch.tensor([seed]), size, size, p)
    for name, value in {"y": y.detach(), "dx": dx, "dA": d_lora_A, "dB": d_lora_B}.items():
        assert torch.equal(value != 0, keep), name
        # The scale is that of the p that is applied, to within one rounding of it and one of the result.
        eps = max(torch.finfo(t).eps for t in (value.dtype, x_dtype, adapters, out))
        assert ((value[keep].double() / dropout_scale(p) - 1).abs() <= eps + 1e-15).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_seed_is_lora_linears_mask(backend):
    x, weight, eye = torch.ones(30, 24), torch.zeros(24, 24), torch.eye(24)
    options = {"dropout_p": 0.5, "dropout_seed": 7, "backend": backend}
    assert torch.equal(lora_branch(weight[:1].expand(30, 24), x, eye, eye, **options),
                       lora_linear(x, weight, eye, eye, **options))  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_seed_each_call_draws_one_and_only_under_dropout(backend):
    i = inputs_of((M, N, K), "fp32", R)
    tensors = [getattr(i, name) for name in TENSORS]

    def draw():
        return lora_branch(*tensors, dropout_p=0.5, backend=backend)

    torch.manual_seed(0)
    first = [draw() for _ in range(3)]
    assert all(differ(a, b) for n, a in enumerate(first) for b in first[:n])
    torch.manual_seed(0)
    assert not any(differ(a, draw()) for a in first)
    before = torch.get_rng_state()
    lora_branch(*tensors, backend=backend)
    lora_branch(*tensors, dropout_p=0.5, dropout_seed=3, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


class Branched(nn.Module):
    """A frozen layer that no kernel of ours may look into, and a branch beside it."""

    def __init__(self, backend: str):
        super().__init__()
        self.base, self.backend = nn.Linear(24, 24).requires_grad_(False), backend
        self.lora_A, self.lora_B = nn.Parameter(torch.eye(24)), nn.Parameter(torch.eye(24))
        nn.init.zeros_(self.base.weight)

    def forward(self, x):
        return lora_branch(self.base(x), x, self.lora_A, self.lora_B, dropout_p=0.5, backend=self.backend)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_the_mask(backend, reentrant):
    layer = Branched(backend)
    results = []
    for wrap in (False, True):
        x = torch.ones(30, 24, requires_grad=True)
        layer.zero_grad()
        torch.manual_seed(5)
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrap else layer(x)
        torch.rand(3)  # the generator moves on before the replay
        y.sum().backward()
        results.append([y.detach(), x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
        # The mask of the replay, seen in dx, is that of the forward, seen in y (less the bias).
        assert torch.equal(x.grad != 0, (y - layer.base.bias).detach().abs() > 0.5)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_dropped_element_reaches_nothing(backend, value):
    # x is bad exactly where the mask drops; base_out was not computed from it here.
    keep = keep_mask(torch.tensor([2]), 16, 16, 0.5)
    x = torch.where(keep, 1.0, value).requires_grad_()
    lora_A, lora_B = torch.eye(16, requires_grad=True), torch.eye(16, requires_grad=True)
    y = lora_branch(torch.zeros(16, 16), x, lora_A, lora_B, dropout_p=0.5, dropout_seed=2, backend=backend)
    y.backward(torch.eye(16))
    assert torch.equal(y != 0, keep)
    for t in (x, lora_A, lora_B):
        assert t.grad.isfinite().all()
