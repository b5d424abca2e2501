"""The training stack on a GPU: a whole step in a CUDA graph, compile with checkpointing and autocast, moves."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear
from tests.stack_cases import assert_one_mask, chain

CUDA = torch.device("cuda")
BACKENDS = ("triton", "torch", "auto")
# Compilers warn about many things, differently in each release, and none of it is ours to mend.
quiet_compiler = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_the_mask(backend, reentrant):
    model, x = chain(dtype=torch.float32, device=CUDA, backend=backend)
    assert_one_mask(model, x, partial(checkpoint, model, use_reentrant=reentrant))


@quiet_compiler
@pytest.mark.parametrize(
    ("place", "mode"), [("inside", "default"), ("inside", "reduce-overhead"), ("outside", "default")]
)
def test_compiled_with_checkpointing_and_dropout(place, mode):
    model, x = chain(dtype=torch.float32, device=CUDA)
    compiled = partial(torch.compile, mode=mode, fullgraph=True)
    replayed = partial(partial, checkpoint, use_reentrant=False)
    call = compiled(replayed(model)) if place == "inside" else replayed(compiled(model))
    sums = set()
    for _ in range(4):  # the first ones warm up, the later ones replay a graph
        torch.compiler.cudagraph_mark_step_begin()
        sums.add(assert_one_mask(model, x, call).sum().item())
    assert len(sums) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_training_step_is_the_eager_one(backend, dtype):
    """Forward, backward and the optimiser's step, under autocast for bf16; a replay draws the mask that eager would."""

    def trained(steps, *, captured):
        torch.manual_seed(0)
        layer = LoRALinear(72, 96, r=8, lora_dropout=0.5, init_lora_weights=False, device=CUDA, backend=backend)
        optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2, capturable=True)
        x, target = torch.randn(256, 72, device=CUDA), torch.randn(256, 96, device=CUDA)

        def step():
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                y = layer(x)
            loss = (y.float() - target).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph, losses = torch.cuda.CUDAGraph(), []
        if captured:
            with torch.cuda.graph(graph):
                loss = step()
        torch.manual_seed(1)  # which a captured graph's generator follows, too
        for _ in range(steps):
            if captured:
                graph.replay()
            else:
                loss = step()
            losses.append(loss.item())
        return losses, layer

    losses, layer = trained(30, captured=True)
    assert sum(losses[-5:]) < sum(losses[:5])
    expected, twin = trained(30, captured=False)
    assert losses == expected
    assert torch.equal(layer.lora_A, twin.lora_A)
    assert torch.equal(layer.lora_B, twin.lora_B)


@quiet_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiled_under_autocast_with_a_grad_scaler(dtype):
    torch.manual_seed(0)
    layer = LoRALinear(72, 96, r=8, lora_dropout=0.1, device=CUDA)
    compiled = torch.compile(layer, fullgraph=True)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.5)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, enabled=dtype == torch.float16)
    x, target = torch.randn(256, 72, device=CUDA), torch.randn(256, 96, device=CUDA)
    losses, skipped = [], 0
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            y = compiled(x)
            loss = (y.float() - target).square().mean()
        assert y.dtype == dtype
        scaler.scale(loss).backward()
        assert layer.lora_A.grad.dtype == torch.float32
        before = layer.lora_B.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        skipped += torch.equal(layer.lora_B, before)
        losses.append(loss.item())
    assert (skipped > 0) == (dtype == torch.float16)
    assert losses[-1] < losses[skipped]


def test_a_scaling_in_a_tensor_follows_to_the_gpu_and_is_read_by_a_captured_graph():
    layer = LoRALinear(72, 96, r=8, init_lora_weights=False).requires_grad_(False)
    scaling = layer.scaling = torch.tensor(2.0)
    layer.add_adapter("other", r=8, init_lora_weights=False)
    layer.half().to(CUDA)
    layer.set_adapter("default")
    assert layer.scaling is scaling
    assert scaling.device.type == "cuda"
    assert scaling.dtype == torch.float32
    x = torch.randn(32, 72, device=CUDA, dtype=torch.float16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for value in (2.0, -1.0, 0.5):
            scaling.fill_(value)
            graph.replay()
            assert torch.equal(y, layer(x))
