"""torch.func over modules and whole models: what works is right, what does not says what to do."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from lora_kernels import LoRALinear, UnsupportedError, add_lora, lora_branch, set_adapter
from lora_kernels.reference.philox import keep_mask
from tests.adapter_models import Stack
from tests.equality import assert_same_numbers

# The op has no batching rule of its own and runs once per slice; functorch says so.
slow_vmap = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule"
)


def test_gradients_of_a_model_with_several_adapters():
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(3, 12)
    for name in ("default", "french"):
        add_lora(model, r=2, target_modules=["up", "head"], init_lora_weights=False, adapter_name=name)
    for name in ("default", "french"):
        set_adapter(model, name)
        trained = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
        gradients = grad(lambda trained: functional_call(model, trained, (x,)).square().sum())(trained)
        model.zero_grad()
        model(x).square().sum().backward()
        assert gradients.keys() == {key for key, p in model.named_parameters() if p.grad is not None}
        for key, gradient in gradients.items():
            assert_same_numbers(gradient, model.get_parameter(key).grad, key)


@slow_vmap
def test_the_masks_of_vmap_are_the_same_or_different_as_asked():
    size = 32
    layer = LoRALinear(size, size, bias=False, r=size, lora_alpha=size, lora_dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(size))
        layer.lora_B.copy_(torch.eye(size))
    x = torch.ones(3, size, size)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)
    same, different = ((vmap(layer, randomness=each)(x) != 0) for each in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    assert not any(torch.equal(different[a], different[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    # One seed for all: the masks are those of the single call.
    y = vmap(lambda x: lora_branch(x * 0, x, layer.lora_A, layer.lora_B, dropout_p=0.5, dropout_seed=4))(x)
    assert torch.equal(y[2] != 0, keep_mask(torch.tensor([4]), size, size, 0.5))


@slow_vmap  # which jacrev and jacfwd use
# functorch loads torch's own decompositions, written with torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused_with_what_to_do():
    layer, x = LoRALinear(6, 5, r=2, init_lora_weights=False, dtype=torch.float64), torch.randn(3, 6).double()

    def loss(x):
        return layer(x).pow(3).sum()

    for call in (lambda: jvp(layer, (x,), (x,)), lambda: jacfwd(layer)(x), lambda: hessian(loss)(x)):
        with pytest.raises(UnsupportedError, match=r"forward-mode tangent.*jacrev.*backend='reference'"):
            call()
    expected = jacrev(layer)(x)
    layer.backend = "reference"
    for other in (jacfwd(layer)(x), jacrev(layer)(x)):
        torch.testing.assert_close(other, expected, rtol=1e-12, atol=1e-12)
    assert hessian(loss)(x).any()
    # The transform alone is no fault: here nothing that reaches the layer has a tangent.
    layer.backend = "auto"
    _, tangent = jvp(lambda t: (layer(x) * t).sum(), (torch.tensor(2.0).double(),), (torch.tensor(1.0).double(),))
    torch.testing.assert_close(tangent, layer(x).sum())
