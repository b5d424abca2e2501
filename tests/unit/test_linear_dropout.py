"""Dropout of the LoRA linear: one mask, recovered from y and from every gradient, in forward, backward and replay."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, lora_linear
from lora_kernels.ops import Needs, _linear_torch, low_rank_torch
from lora_kernels.planning import Plan
from lora_kernels.reference.philox import dropout_scale, keep_mask
from tests.equality import whole_numbers

BACKENDS = ("torch", "reference", "auto")
DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-mixed": (torch.bfloat16, torch.float32),
}


def probe(size: int, dtype: str, *, p: float, seed, backend: str, x=None):
    """The masks that y, dx, dA and dB each show: base zero, adapters the identity, dy ones and then the identity.

    With x = 1 and A = B = 1: y = scale * mask. dy = ones gives dx = scale * mask * (row sum of A). dy = 1 gives dyb =
    scale * 1 and hence dA = scale * mask, and dB = xa = scale * mask.
    """
    kind, adapters = DTYPES[dtype]
    eye = torch.eye(size, dtype=adapters)
    x = torch.ones(size, size, dtype=kind).requires_grad_()
    weight = torch.zeros(size, size, dtype=kind)
    lora_A, lora_B = eye.clone().requires_grad_(), eye.clone().requires_grad_()
    y = lora_linear(x, weight, lora_A, lora_B, dropout_p=p, dropout_seed=seed, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    d_lora_A, d_lora_B = torch.autograd.grad(y, (lora_A, lora_B), torch.eye(size, dtype=kind))
    return {"y": y.detach(), "dx": dx, "dA": d_lora_A, "dB": d_lora_B}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "p", "seed"), [(40, 0.5, 1), (37, 0.1, -3), (64, 0.9, 2**62 + 5), (1, 0.5, 0)])
def test_forward_and_every_gradient_see_the_documented_mask(backend, dtype, size, p, seed):
    keep = keep_mask(torch.tensor([seed]), size, size, p)
    for name, value in probe(size, dtype, p=p, seed=seed, backend=backend).items():
        assert torch.equal(value != 0, keep), name
        # The scale is that of the p that is applied, to within one rounding of it and one of the result.
        kept = value[keep].double()
        assert ((kept / dropout_scale(p) - 1).abs() <= torch.finfo(value.dtype).eps + 1e-15).all(), name


@pytest.mark.parametrize("strategy", ["library", "upcast"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
def test_mask_across_blocks_of_rows_and_columns(dtype, strategy):
    # dx [M, K] is made in several blocks of rows, and in two of columns under upcast.
    kind, adapters = DTYPES[dtype]
    n, k, seed = 8300, 1030, torch.tensor([6])
    m = low_rank_torch.BLOCK_ELEMENTS["cpu"] // k + 50
    plan = Plan("torch", strategy, "a test asks for it")
    dy = torch.zeros(m, n, dtype=kind)
    dy[:, 0] = 1
    lora_A, lora_B = torch.ones(1, k, dtype=adapters), torch.zeros(n, 1, dtype=adapters)
    lora_B[0] = 1
    dx, *_ = _linear_torch.backward(
        dy, None, torch.zeros(n, k, dtype=kind), lora_A, lora_B, None, seed, 1.0, 0.5, Needs(True, *[False] * 4), plan
    )
    assert torch.equal(dx, 2.0 * keep_mask(seed, m, k, 0.5).to(kind))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_tokens_after_flattening(backend):
    x = torch.ones(3, 5, 24)
    eye, weight = torch.eye(24), torch.zeros(24, 24)
    y = lora_linear(x, weight, eye, eye, dropout_p=0.5, dropout_seed=9, backend=backend)
    assert torch.equal(y.view(15, 24) != 0, keep_mask(torch.tensor([9]), 15, 24, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_may_be_an_int_or_a_tensor_of_any_one_element_shape(backend):
    masks = [
        probe(24, "fp32", p=0.5, seed=seed, backend=backend)["y"]
        for seed in (-77, torch.tensor(-77), torch.tensor([-77]), torch.tensor([[-77]]))
    ]
    assert all(torch.equal(masks[0], mask) for mask in masks[1:])


def test_the_same_seed_is_the_same_mask_on_every_backend_and_call():
    masks = [probe(24, "fp32", p=0.5, seed=11, backend=b)["y"] for b in (*BACKENDS, *BACKENDS)]
    assert all(torch.equal(masks[0], mask) for mask in masks[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_seed_each_call_draws_one(backend):
    def draw():
        return probe(24, "fp32", p=0.5, seed=None, backend=backend)["y"]

    torch.manual_seed(0)
    first = [draw() for _ in range(4)]
    assert not any(torch.equal(a, b) for n, a in enumerate(first) for b in first[:n])
    torch.manual_seed(0)
    assert all(torch.equal(a, draw()) for a in first)


def test_without_a_seed_the_generator_moves_only_under_dropout():
    i = torch.ones
    torch.manual_seed(0)
    before = torch.get_rng_state()
    lora_linear(i(2, 3), i(4, 3), i(1, 3), i(4, 1))
    lora_linear(i(2, 3), i(4, 3), i(1, 3), i(4, 1), dropout_p=0.5, dropout_seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    lora_linear(i(2, 3), i(4, 3), i(1, 3), i(4, 1), dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_the_mask(backend, reentrant):
    layer = LoRALinear(24, 24, lora_dropout=0.5, r=24, lora_alpha=24, backend=backend)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(24))
        layer.lora_B.copy_(torch.eye(24))
        layer.weight.zero_()
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
        assert torch.equal(x.grad != 0, (y - layer.bias).detach().abs() > 0.5)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_mean_are_statistically_right(p):
    torch.manual_seed(1)
    n, size, runs = 64 * 64, 64, 20
    values = torch.cat([probe(size, "fp64", p=p, seed=None, backend="torch")["y"].reshape(-1) for _ in range(runs)])
    kept = (values != 0).sum().item()
    # Five standard deviations of a binomial count.
    assert abs(kept - n * runs * (1 - p)) <= 5 * math.sqrt(n * runs * p * (1 - p))
    assert abs(values.mean().item() - 1) <= 5 * math.sqrt(p / (1 - p) / (n * runs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_extreme_p(backend, p):
    values = probe(32, "fp64", p=p, seed=4, backend=backend)
    keep = keep_mask(torch.tensor([4]), 32, 32, p)
    for value in values.values():
        assert torch.equal(value != 0, keep)
        assert value.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_p_zero_is_the_call_without_dropout(backend):
    x, weight, lora_A, lora_B = (whole_numbers(torch.randn(s)) for s in ((5, 16), (8, 16), (4, 16), (8, 4)))
    plain = lora_linear(x, weight, lora_A, lora_B, backend=backend)
    assert torch.equal(lora_linear(x, weight, lora_A, lora_B, dropout_p=0.0, dropout_seed=3, backend=backend), plain)
    assert torch.equal(lora_linear(x, weight, lora_A, lora_B, dropout_p=0, backend=backend), plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dropped_element_never_reaches_the_adapter(backend, value):
    # x is bad exactly where the mask drops. The base makes NaN of that; dA must not.
    keep = keep_mask(torch.tensor([2]), 16, 16, 0.5)
    x = torch.where(keep, 1.0, value)
    lora_A = torch.eye(16, requires_grad=True)
    y = lora_linear(x, torch.zeros(16, 16), lora_A, torch.eye(16), dropout_p=0.5, dropout_seed=2, backend=backend)
    y.nan_to_num().backward(torch.eye(16))
    assert lora_A.grad is not None
    assert lora_A.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_path_is_never_dropped(backend):
    x, weight = whole_numbers(torch.randn(20, 16).double()), whole_numbers(torch.randn(8, 16).double())
    y = lora_linear(x, weight, x.new_zeros(2, 16), x.new_zeros(8, 2), dropout_p=0.9, backend=backend)
    assert torch.equal(y, x @ weight.T)
