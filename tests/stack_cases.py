"""What the tests of the training stack share: a chain of layers whose gradients show whether the mask was one."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, lora_branch
from lora_kernels.ops import _branch_torch, _linear_torch

# torch's own compiler does what torch's own warnings advise against; none of it is ours to mend.
compiler_warnings = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning",
    "ignore:.*autograd.function.Function'> should not be instantiated:DeprecationWarning",  # Dynamo, for its ctx
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
)


class BranchLayer(LoRALinear):
    """The same layer by `lora_branch`, over a base that is computed elsewhere."""

    def forward(self, input: Tensor) -> Tensor:
        base_out = nn.functional.linear(input, self.weight, self.bias)
        p = self.lora_dropout if self.training else 0.0
        return lora_branch(base_out, input, self.lora_A, self.lora_B, scaling=self.scaling, dropout_p=p)


class Chain(nn.Module):
    """Two LoRA layers over bases of zero, and nothing negative anywhere.

    y is linear in x and in every lora_A and lora_B, so by Euler's theorem <d_p, p> = <dy, y> for each of them, but only
    if forward, backward and replay drop the same elements. No seed need be known for that, and nothing cancels.
    """

    def __init__(self, layer: type[LoRALinear] = LoRALinear, *, p: float = 0.5, **options) -> None:
        super().__init__()
        options = {"r": 4, "lora_dropout": p, "bias": False, "init_lora_weights": False, **options}
        self.up, self.down = layer(24, 40, **options), layer(40, 16, **options)
        with torch.no_grad():
            for each in (self.up, self.down):
                each.weight.zero_()
                each.lora_A.abs_()
                each.lora_B.abs_()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(2 * self.up(x))


def chain(layer: type[LoRALinear] = LoRALinear, **options) -> tuple[Chain, Tensor]:
    """In fp64 where not said otherwise, and an x for it."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64, **options}
    model = Chain(layer, **options)
    return model, torch.rand(3, 7, 24, dtype=options["dtype"], device=options.get("device"))


def assert_one_mask(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Euler's identity for x and every trained parameter, in one forward and backward of `call`; returns y."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = (model if call is None else call)(x)
    dy = torch.rand_like(y)  # so the generator moves on before a replay
    y.backward(dy)
    trained = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Both sides are sums of products of nonnegative numbers, with fewer roundings than there are numbers.
    roundings = sum(t.numel() for t in (x, y, *model.parameters()))
    expected = (dy.double() * y.detach().double()).sum()
    assert expected > 0
    for name, t in trained.items():
        assert t.grad is not None, name
        found = (t.grad.double() * t.detach().double()).sum()
        assert abs(found / expected - 1) <= 2 * roundings * torch.finfo(y.dtype).eps, name
    return y.detach()


@contextmanager
def counted_forwards(monkeypatch: pytest.MonkeyPatch):
    """How often the torch backend's forwards have run, whoever called them; a list of one number."""
    count = [0]
    with monkeypatch.context() as patch:
        for module in (_linear_torch, _branch_torch):

            def forward(*args, original=module.forward):
                count[0] += 1
                return original(*args)

            patch.setattr(module, "forward", forward)
        yield count


doubled_calls = []


@torch.library.custom_op("lora_kernels_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    doubled_calls.append(x.shape)
    return 2 * x


doubled.register_fake(torch.empty_like)


class Squared(torch.autograd.Function):
    """4 x^2; saves what its op returned, as this package's nodes do."""

    @staticmethod
    def forward(ctx, x):
        y = doubled(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return 4 * y * dy


@cache
def compiled_checkpoints_replay() -> bool:
    """Whether a checkpoint that is compiled replays an autograd.Function, whoever wrote it.

    torch 2.11 marks the calls in the checkpointed graph, but not those inside a Function's: it keeps their results.
    """
    torch.compiler.reset()
    x = torch.ones(3, requires_grad=True)
    doubled_calls.clear()
    call = torch.compile(
        lambda t: checkpoint(Squared.apply, t, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    call(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 8.0))
    return len(doubled_calls) == 2
