"""Mixed precision and accumulation in training: what autocast hands to the operation, GradScaler, micro-batches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import LoRALinear, lora_branch
from lora_kernels.ops import BRANCH, LINEAR
from lora_kernels.testing import budget_rows

HALF = (torch.bfloat16, torch.float16)


class Arguments(TorchDispatchMode):
    """The tensors that one op is called with, and how many casts there are besides."""

    def __init__(self, op):
        super().__init__()
        self.op, self.tensors, self.casts = op, None, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.tensors = args
        self.casts += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("x_dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_copies_x_at_most_once_and_never_to_fp32(dtype, x_dtype):
    # The forward itself makes no other tensor of x's size, as test_linear_autograd shows of every dtype it is given.
    layer, x = LoRALinear(24, 16, r=4), torch.randn(5, 24).to(x_dtype)
    weight = layer.weight.detach().to(dtype)
    with torch.autocast("cpu", dtype):
        with Arguments(LINEAR.forward) as linear:
            layer(x)
        with Arguments(BRANCH.forward) as branch:
            lora_branch(x.new_zeros(5, 16), x, layer.lora_A, layer.lora_B)
    for seen, found in ((linear, linear.tensors[0]), (branch, branch.tensors[1])):
        assert found.dtype == dtype
        assert (found.data_ptr() == x.data_ptr()) == (x_dtype == dtype)
        # Besides, the weight; not the adapters, nor a bias beside them, which are fp32.
        assert seen.casts == (x_dtype != dtype) + (seen is linear)
    assert torch.equal(linear.tensors[1], weight)
    assert {t.dtype for t in linear.tensors[2:5]} == {torch.float32}
    assert linear.tensors[2].data_ptr() == layer.lora_A.data_ptr()


def test_a_grad_scaler_skips_what_overflows_and_scales_the_rest():
    torch.manual_seed(0)
    layer = LoRALinear(24, 16, r=4, lora_dropout=0.1)
    parameters = [layer.lora_A, layer.lora_B]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    x, target = torch.randn(64, 24), torch.randn(64, 16)
    losses, skipped = [], 0
    for step in range(40):
        optimizer.zero_grad()
        before, scale = layer.lora_B.detach().clone(), scaler.get_scale()
        with torch.autocast("cpu", torch.float16):
            torch.manual_seed(step)
            loss = (layer(x).float() - target).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite = all(bool(p.grad.isfinite().all()) for p in parameters)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.lora_B, before) != finite
        assert scaler.get_scale() == (scale if finite else scale / 2)
        skipped += not finite
        losses.append(loss.item())
    assert 0 < skipped < 35
    assert losses[-1] < losses[skipped]


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_accumulate(dtype, p):
    """k backwards into the same .grad are one backward of the sum, with the masks of the same seeds."""
    micro, size = 4, 40
    torch.manual_seed(0)
    layer = LoRALinear(24, 16, r=4, lora_dropout=p, init_lora_weights=False, dtype=dtype, adapter_dtype=torch.float32)
    x, dy = torch.randn(micro, size, 24, dtype=dtype), torch.randn(micro, size, 16, dtype=dtype)

    def gradients(layer, x, dy, *, at_once):
        layer.zero_grad()
        torch.manual_seed(7)
        if at_once:
            sum((layer(part) * d).sum() for part, d in zip(x, dy, strict=True)).backward()
        else:
            for part, d in zip(x, dy, strict=True):
                layer(part).backward(d)
        return {"A": layer.lora_A.grad.clone(), "B": layer.lora_B.grad.clone()}

    found = gradients(layer, x, dy, at_once=False)
    layer.backend = "reference"
    eager = gradients(layer, x, dy, at_once=False)
    layer.double()  # its .grad, too
    exact = x.double(), dy.double()
    truth = gradients(layer, *exact, at_once=True)
    assert not [row for row in budget_rows(found, eager, truth) if not row.ok]
    if p == 0:  # k micro-batches are one batch
        layer.zero_grad()
        layer(exact[0]).backward(exact[1])
        for name, gradient in (("A", layer.lora_A.grad), ("B", layer.lora_B.grad)):
            torch.testing.assert_close(gradient, truth[name], rtol=1e-12, atol=1e-12)
