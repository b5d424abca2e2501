"""torch.compile, forward and backward in one graph each: numbers, masks, batch sizes, autocast, refusals."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lora_kernels import LoRALinear, UnsupportedError, lora_branch
from lora_kernels.testing import budget_rows
from tests.equality import assert_same_numbers
from tests.stack_cases import assert_one_mask, chain, compiler_warnings

pytestmark = compiler_warnings

SIZES = (7, 40, 12, 33, 150)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """The half of a transformer's block that is made of linears: inductor has something to fuse around each of them."""

    def __init__(self, **options) -> None:
        super().__init__()
        options = {"r": 4, "init_lora_weights": False, **options}
        self.norm = nn.LayerNorm(24, dtype=options.get("dtype"))
        self.up, self.down = LoRALinear(24, 40, **options), LoRALinear(40, 24, **options)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def results(module, x, dy, *, seed=5):
    """y and every gradient of one forward and backward."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    y = module(x)
    y.backward(dy.to(y.dtype))
    gradients = {f"d_{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "d_x": x.grad, **gradients}


def plain(block, dtype):
    """The same block in plain PyTorch, with the same masks for the same seed."""
    twin = copy.deepcopy(block).to(dtype)
    twin.up.backend = twin.down.backend = "reference"
    return twin


def joined(runs):
    return {name: torch.cat([run[name].flatten() for run in runs]) for name in runs[0]}


@pytest.mark.parametrize(("dtype", "mode"), [(torch.float32, "default"), (torch.bfloat16, "reduce-overhead")], ids=str)
def test_a_block_trains_within_the_budget_with_one_compilation_for_all_sizes(dtype, mode):
    torch.manual_seed(0)
    block = Block(lora_dropout=0.1, dtype=dtype)
    inputs = [(torch.randn(2, size, 24, dtype=dtype), torch.randn(2, size, 24)) for size in SIZES]
    # inductor draws from a generator of its own unless told to use torch's, from which plain PyTorch has its masks.
    with inductor_config.patch(fallback_random=True):
        block.compile(mode=mode, fullgraph=True, dynamic=True)
        actual = [results(block, *inputs[0])]
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual += [results(block, *each) for each in inputs[1:]]
    assert counters["graph_break"] == {}
    block._compiled_call_impl = None
    eager = [results(plain(block, dtype), *each) for each in inputs]
    truth = [results(plain(block, torch.float64), x.double(), dy) for x, dy in inputs]
    rows = budget_rows(joined(actual), joined(eager), joined(truth))
    assert {row.name for row in rows} >= {"y", "d_x", "d_up.lora_A", "d_up.lora_B", "d_norm.weight"}
    assert not [row for row in rows if not row.ok]


@pytest.mark.parametrize(("dynamic", "first"), [(None, 2), (True, 1)], ids=["default", "dynamic"])
def test_it_is_not_compiled_again_for_each_batch_size(dynamic, first):
    # By default the second size is what tells PyTorch that sizes change; that graph is for any size.
    model, _ = chain()
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    inputs = [torch.rand(size, 24).double() for size in SIZES]
    for x in inputs[:first]:
        assert_one_mask(model, x, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in inputs[first:]:
            assert_one_mask(model, x, compiled)


def test_masks_from_inductors_own_generator():
    # It is what draws the seeds unless fallback_random is set: one draw for each call of each layer.
    size = 32
    layers = [LoRALinear(size, size, r=size, lora_alpha=size, lora_dropout=0.5, bias=False) for _ in range(2)]
    for layer in layers:
        with torch.no_grad():
            layer.weight.zero_()
            layer.lora_A.copy_(torch.eye(size))
            layer.lora_B.copy_(torch.eye(size))
    first, second = layers
    step = torch.compile(lambda x: (first(x), second(x), first(x)), fullgraph=True)
    x = torch.ones(size, size)

    def masks():
        return [y != 0 for y in step(x)]

    torch.manual_seed(3)
    seen = [*masks(), *masks()]
    assert not any(torch.equal(a, b) for n, a in enumerate(seen) for b in seen[:n])
    kept = torch.stack(seen).double().mean().item()
    assert abs(kept - 0.5) <= 5 * (0.25 / (6 * size * size)) ** 0.5
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(seen, [*masks(), *masks()], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_within_and_partly_switched_off(dtype):
    torch.manual_seed(0)
    block = Block()
    under = partial(torch.autocast, "cpu", dtype)

    def around(module, x):
        with under():
            return module(x)

    def partly(block, x):
        with under():
            h = block.up(x)
            with under(enabled=False):
                return block.down(h.float())

    def run(function):
        x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        block.zero_grad()
        y = function(x)
        y.float().square().sum().backward()
        return y.dtype, {"y": y.detach(), "x": x.grad, "A": block.up.lora_A.grad, "B": block.down.lora_B.grad}

    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    for eager, fast in (
        (partial(around, block), partial(around, compiled(block))),
        (partial(around, block), compiled(partial(around, block))),
        (partial(partly, block), compiled(partial(partly, block))),
    ):
        (expected_dtype, expected), (found_dtype, found) = run(eager), run(fast)
        assert found_dtype == expected_dtype
        assert_same_numbers(found, expected)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("operation", ["lora_linear", "lora_branch"])
def test_a_backend_that_cannot_serve_the_call_is_refused_while_compiling(operation, train):
    layer = LoRALinear(24, 16, r=4).requires_grad_(train)

    def call(x, backend):
        if operation == "lora_linear":
            layer.backend = backend
            return layer(x)
        return lora_branch(x @ layer.weight.T, x, layer.lora_A, layer.lora_B, backend=backend)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 24)
    with pytest.raises(UnsupportedError, match=r"backend='triton' cannot serve .*CPU.*Use backend='auto' to fall back"):
        compiled(x, "triton")
    assert_same_numbers(compiled(x, "auto"), call(x, "auto"))


def test_torch_func_inside_of_a_compiled_function():
    layer = LoRALinear(24, 16, r=4, init_lora_weights=False)
    parameters, x = {name: p.detach() for name, p in layer.named_parameters()}, torch.randn(3, 24)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    # Compiled by PyTorch alone, the operation's gradient would be silently zero.
    for transformed, arguments in ((grad(loss), (parameters, x)), (vmap(layer), (x,))):
        with pytest.raises(Unsupported, match=r"torch.func must not be traced.*fullgraph=True.*backend='reference'"):
            torch.compile(transformed, backend="aot_eager", fullgraph=True)(*arguments)
    expected = grad(loss)(parameters, x)
    torch.compiler.reset()
    found = torch.compile(grad(loss), backend="aot_eager")(parameters, x)
    assert_same_numbers(found, expected)
    layer.backend = "reference"
    torch.compiler.reset()
    found = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)(parameters, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
