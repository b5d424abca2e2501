"""The LoRA linear on a GPU: every strategy and backend against fp64, and what only a device can show."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels import DtypeError, LoRALinear, UnsupportedError, explain_plan, lora_linear
from lora_kernels.ops import low_rank_torch, problem_of
from lora_kernels.planning import Plan, Way, make_plan
from lora_kernels.planning.plan import paired, ways_of
from lora_kernels.reference.philox import dropout_scale, dropout_threshold, keep_mask
from lora_kernels.testing import LinearInputs, make_linear_inputs, poisoned_allocation, run_linear, run_linear_plan
from tests.linear_cases import (
    DTYPES,
    LAYOUTS,
    PARAMETERS,
    SUBSETS,
    assert_same_bits,
    assert_within_budget,
    pooled,
    with_layouts,
)

CUDA = torch.device("cuda")
GIB = 1 << 30
STRATEGIES = ("one_pass", "pointers", "descriptors", "library", "persistent")
KERNELS = ("one_pass", "gemm_expand", "gemm_expand_tma", "shrink", "persistent")
KERNEL_OF = dict(zip(STRATEGIES, KERNELS, strict=True))
BACKENDS = ("triton", "torch", "auto")
# Compilers warn about many things, differently in each release, and none of it is ours to mend.
quiet_compiler = pytest.mark.filterwarnings("ignore")


def inputs_of(size, dtype, r=16, **options) -> LinearInputs:
    x, adapters = DTYPES[dtype]
    return make_linear_inputs(*size, r, dtype=x, adapter_dtype=adapters, device=CUDA, **options)


def plan_for(inputs: LinearInputs, strategy: str) -> Plan:
    """The planner's plan for this GPU with the strategy forced; skips where it ships no tile for that."""
    (n, k), r = inputs.weight.shape, inputs.lora_A.shape[0]
    problem = problem_of(
        inputs.x.numel() // k, n, k, r, dtype=inputs.x.dtype, adapter_dtype=inputs.lora_A.dtype,
        dropout=inputs.dropout_p > 0, device=inputs.x.device,
    )  # fmt: skip
    plan = make_plan(problem, "triton", triton_available=True)
    if KERNEL_OF[strategy] not in dict(plan.tiles):
        pytest.skip(f"no {KERNEL_OF[strategy]} tile for this GPU, dtype and rank")
    if strategy == "library":
        return paired(problem, plan, "library")
    if strategy == "persistent" and Way("triton", "persistent") not in ways_of(problem, "forward", ("triton",)):
        pytest.skip("the persistent kernel serves 16-bit problems whose rows are whole 16 bytes")
    forced = paired(problem, plan, strategy if strategy in ("one_pass", "persistent") else "shrink_fused")
    return replace(forced, use_tma=strategy == "descriptors")


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("size", [(150, 200, 168), (37, 51, 45), (1000, 1030, 520), (1, 96, 80)], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_of_every_strategy(dtype, strategy, size, p):
    x, adapters = DTYPES[dtype]
    make = partial(make_linear_inputs, dtype=x, adapter_dtype=adapters, device=CUDA, dropout_p=p)
    problems = pooled(make, *size, 16)
    plan = plan_for(problems[0], strategy)
    assert_within_budget(problems, partial(run_linear_plan, plan=plan))


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("size", [(300, 264, 520), (33, 1, 40), (40, 33, 1), (1, 1, 1), (16, 4096, 1024)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_of_every_backend(dtype, backend, size, p):
    x, adapters = DTYPES[dtype]
    make = partial(make_linear_inputs, dtype=x, adapter_dtype=adapters, device=CUDA, dropout_p=p, bias=size[1] > 1)
    assert_within_budget(pooled(make, *size, 8), partial(run_linear, backend=backend))


@pytest.mark.parametrize("r", [1, 5, 8, 64, 70, 128, 256, 512])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_over_ranks(dtype, strategy, r):
    inputs = inputs_of((200, 264, 136), dtype, r, dropout_p=0.1)
    assert_within_budget(inputs, partial(run_linear_plan, plan=plan_for(inputs, strategy)))


@pytest.mark.parametrize("splits", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_over_splits(dtype, splits):
    inputs = inputs_of((700, 96, 1000), dtype, 8, dropout_p=0.1)
    plan = replace(
        plan_for(inputs, "pointers"),
        xa_splits=splits,
        dyb_splits=splits,
        d_lora_A_splits=splits,
        d_lora_B_splits=splits,
    )
    assert_within_budget(inputs, partial(run_linear_plan, plan=plan))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("tensor", [*PARAMETERS, "dy"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_layouts(backend, tensor, layout):
    inputs = with_layouts(inputs_of((72, 136, 104), "bf16-mixed", 8, dropout_p=0.25), **{tensor: layout})
    assert_within_budget(inputs, partial(run_linear, backend=backend))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16-mixed"])
def test_every_subset_of_gradients(dtype, backend):
    inputs = inputs_of((40, 48, 56), dtype, 8, dropout_p=0.5)
    full = run_linear(inputs, backend)
    for subset in SUBSETS:
        part = run_linear(inputs, backend, requires_grad=subset)
        assert set(part) == {"y", *(f"d_{name}" for name in subset)}
        summed_alone = not {"x", "lora_A", "lora_B"} & set(subset)  # the bias, in another order of additions
        kept = [name for name in part if not (summed_alone and name == "d_bias")]
        assert_same_bits({n: part[n] for n in kept}, {n: full[n] for n in kept})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unwritten_memory_does_not_show_and_bits_repeat(dtype, strategy):
    inputs = inputs_of((333, 136, 520), dtype, 24, dropout_p=0.5)
    plan = plan_for(inputs, strategy)
    expected = run_linear_plan(inputs, plan)
    for _ in range(5):
        assert_same_bits(run_linear_plan(inputs, plan), expected)
    with poisoned_allocation():
        assert_same_bits(run_linear_plan(inputs, plan), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_same_call_same_bits(backend, p):
    inputs = inputs_of((2048, 1024, 768), "bf16-mixed", 16, dropout_p=p)
    first = run_linear(inputs, backend)
    for _ in range(5):
        assert_same_bits(run_linear(inputs, backend), first)


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 7, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 1 - 1e-9])
def test_masks_are_the_references_bit_for_bit(p, seed):
    from lora_kernels.kernels.shrink import shrink

    for rows, columns, splits in ((19, 37, 1), (700, 512, 3)):
        x, eye = torch.ones(1, 1, device=CUDA).expand(rows, columns), torch.eye(columns, device=CUDA)
        tile = plan_for(inputs_of((rows, 8, columns), "fp32", 16), "pointers").tile("shrink")
        xa = shrink(
            x=x, lora_A=eye, seed=torch.tensor([seed], device=CUDA), threshold=dropout_threshold(p), scale=1.0,
            splits=splits, precision="ieee", tile=tile,
        )  # fmt: skip
        assert torch.equal(xa.cpu() != 0, keep_mask(torch.tensor([seed]), rows, columns, p))
        assert ((xa == 0) | (xa == 1)).all()


@pytest.mark.parametrize("offset", [None, (2**31 - 7, 24)], ids=["whole", "shard"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_mask_in_forward_and_every_gradient(dtype, strategy, offset):
    # Base zero, x = 1, A = B = 1: y, dA and dB show the mask where dy = 1; dx shows it where dy is all ones.
    size, p, seed = 64, 0.5, 2**33 + 1
    x, adapters = DTYPES[dtype]
    eye, ones = torch.eye(size, device=CUDA), torch.ones(size, size, dtype=x, device=CUDA)
    inputs = LinearInputs(
        x=ones, weight=0 * ones, lora_A=eye.to(adapters), lora_B=eye.to(adapters), bias=None, dy=eye.to(x),
        dropout_p=p, dropout_seed=seed, dropout_offset=offset,
    )  # fmt: skip
    plan = plan_for(inputs, strategy)
    diagonal, full = run_linear_plan(inputs, plan), run_linear_plan(replace(inputs, dy=ones), plan)
    expected = dropout_scale(p) * keep_mask(torch.tensor([seed, *(offset or ())]), size, size, p).float()
    shown = {"y": diagonal["y"], "dA": diagonal["d_lora_A"], "dB": diagonal["d_lora_B"], "dx": full["d_x"]}
    for name, value in shown.items():
        assert torch.equal(value.float().cpu(), expected), name


def test_the_same_seed_is_the_same_mask_on_every_device_and_backend():
    wide = make_linear_inputs(300, 40, 520, 8, dtype=torch.float32, dropout_p=0.5)
    ones = {name: torch.ones_like(getattr(wide, name)) for name in ("x", "lora_A", "lora_B", "dy")}
    wide = replace(wide, **ones, weight=torch.zeros_like(wide.weight))
    keep = keep_mask(torch.tensor([wide.dropout_seed]), 300, 520, 0.5)
    for device, backends in (("cpu", ("torch", "reference")), (CUDA, ("torch", "triton", "reference", "auto"))):
        tensors = {name: getattr(wide, name).to(device) for name in (*PARAMETERS, "dy")}
        for backend in backends:
            dx = run_linear(replace(wide, **tensors), backend)["d_x"]
            assert torch.equal(dx.cpu() != 0, keep), (device, backend)


def test_nan_and_inf_propagate():
    inputs = inputs_of((40, 48, 56), "bf16", 8, dropout_p=0.5, seed=3)
    inputs.x[5, 7], inputs.x[6, 9], inputs.dy[8, 3] = float("nan"), float("inf"), float("-inf")
    expected = run_linear(inputs, "reference")
    for backend in BACKENDS:
        for name, value in run_linear(inputs, backend).items():
            assert torch.equal(value.isfinite(), expected[name].isfinite()), (backend, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(0,), (2, 0), (), (2, 3, 4)], ids=str)
def test_leading_dimensions(leading, backend):
    m = torch.Size(leading).numel()
    inputs = inputs_of((m, 40, 24), "bf16-mixed", 4, dropout_p=0.5)
    inputs = replace(inputs, x=inputs.x.view(*leading, 24), dy=inputs.dy.view(*leading, 40))
    results = run_linear(inputs, backend)
    assert results["y"].shape == (*leading, 40)
    assert results["d_x"].shape == (*leading, 24)
    if m == 0:
        assert not any(gradient.any() for gradient in results.values())


# -- offsets past 2^31 -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("wide", ["N", "K"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_offsets_past_two_to_the_31(backend, wide):
    m, large, small, r, p = (1 << 18) + 40, 8208, 64, 8, 0.5
    n, k = (large, small) if wide == "N" else (small, large)
    assert m * large > 1 << 31
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * GIB:
        pytest.skip(f"needs 40 GiB of free GPU memory for tensors of 2^31 elements; {free / GIB:.0f} GiB are free")
    generator = torch.Generator(CUDA).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=CUDA, dtype=torch.bfloat16)
    x, dy = normal(m, k), normal(m, n)
    weight, lora_A, lora_B = normal(n, k) * k**-0.5, normal(r, k) * k**-0.5, normal(n, r) * r**-0.5
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    y = lora_linear(x, weight, lora_A, lora_B, scaling=2.0, dropout_p=p, dropout_seed=5, backend=backend)
    d_x, d_lora_A, d_lora_B = torch.autograd.grad(y, leaves, dy)

    with torch.no_grad():
        truth_A, truth_B = torch.zeros(r, k, device=CUDA).double(), torch.zeros(n, r, device=CUDA).double()
        wide_A, wide_B, wide_W = lora_A.double(), lora_B.double(), weight.double()
        seed, step = torch.tensor([5], device=CUDA), 1 << 13
        for start in range(0, m, step):
            rows = slice(start, min(start + step, m))
            keep = keep_mask(seed, rows.stop - start, k, p, first_row=start)
            dropped = torch.where(keep, x[rows], 0).double() * 4.0  # scaling / (1 - p)
            xa, dyb = dropped @ wide_A.T, dy[rows].double() @ wide_B * 4.0
            truth_B += dy[rows].double().T @ xa
            truth_A += dyb.T @ torch.where(keep, x[rows], 0).double()
            if start == 0 or rows.stop == m:  # the first rows, and those past 2^31
                truth_y = x[rows].double() @ wide_W.T + xa @ wide_B.T
                truth_x = dy[rows].double() @ wide_W + torch.where(keep, dyb @ wide_A, 0)
                for actual, truth in ((y[rows], truth_y), (d_x[rows], truth_x)):
                    # xa or dyb, the term, and their sum: three roundings to bf16.
                    assert (actual.double() - truth).norm() <= 3 * 2**-9 * truth.norm()
    for actual, truth in ((d_lora_A, truth_A), (d_lora_B, truth_B)):
        assert (actual.double() - truth).norm() <= 3 * 2**-9 * truth.norm()


# -- graphs, streams, transforms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed"])
def test_cuda_graph_draws_a_new_mask_at_each_replay(dtype, backend):
    size = 64
    x_dtype, adapters = DTYPES[dtype]
    x = torch.ones(size, size, dtype=x_dtype, device=CUDA, requires_grad=True)
    weight = torch.zeros(size, size, dtype=x_dtype, device=CUDA)
    lora_A, lora_B = (torch.eye(size, dtype=adapters, device=CUDA).requires_grad_() for _ in range(2))

    def step():
        y = lora_linear(x, weight, lora_A, lora_B, dropout_p=0.5, backend=backend)
        return y, *torch.autograd.grad(y, (x, lora_A), torch.ones_like(y))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, d_x, _ = step()
    masks = []
    for _ in range(4):
        graph.replay()
        torch.cuda.synchronize()
        # The mask of this replay's backward is that of its forward.
        assert torch.equal(d_x != 0, y != 0)
        masks.append((y != 0).clone())
    assert not any(torch.equal(a, b) for n, a in enumerate(masks) for b in masks[:n])
    kept = torch.stack(masks).double().mean().item()
    assert abs(kept - 0.5) <= 5 * (0.25 / (4 * size * size)) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph_reads_new_inputs_and_a_seed_tensor(backend):
    inputs = inputs_of((130, 136, 72), "bf16", 8)
    x, seed = inputs.x.clone(), torch.tensor([1], device=CUDA)

    def call():
        return lora_linear(x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias, dropout_p=0.3,
                           dropout_seed=seed, backend=backend)  # fmt: skip

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for value in (1, 2, -3):
        x.normal_()
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y, call())


@quiet_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_layer_is_the_eager_one(backend):
    inputs = inputs_of((100, 96, 72), "bf16-mixed", 8, dropout_p=0.5)
    torch.compiler.reset()
    compiled = torch.compile(lora_linear, fullgraph=True)
    assert_same_bits(run_linear(inputs, backend, function=compiled), run_linear(inputs, backend))


@quiet_compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layer_trains_with_dropout(mode):
    torch.compiler.reset()
    layer = LoRALinear(72, 96, r=8, lora_dropout=0.5, init_lora_weights=False, device=CUDA)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    seen = []
    for _ in range(4):
        # Gradients lie in the graph's memory, which the next replay writes to.
        layer.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.ones(64, 72, device=CUDA, requires_grad=True)
        compiled(x).sum().backward()
        assert layer.lora_A.grad.isfinite().all()
        seen.append(x.grad.clone())
    assert not any(torch.equal(a, b) for n, a in enumerate(seen) for b in seen[:n])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_the_mask(backend, reentrant):
    layer = LoRALinear(72, 96, r=8, lora_dropout=0.5, init_lora_weights=False, device=CUDA, backend=backend)
    results = []
    for wrap in (False, True):
        x = torch.ones(50, 72, device=CUDA, requires_grad=True)
        layer.zero_grad()
        torch.manual_seed(5)
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrap else layer(x)
        torch.rand(3, device=CUDA)  # the generator moves on before the replay
        y.sum().backward()
        results.append({"y": y.detach(), "dx": x.grad, "dA": layer.lora_A.grad, "dB": layer.lora_B.grad})
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_a_grad_scaler_trains(dtype, backend):
    torch.manual_seed(0)
    layer = LoRALinear(72, 96, r=8, lora_dropout=0.1, device=CUDA, backend=backend)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, enabled=dtype == torch.float16)
    x, target = torch.randn(256, 72, device=CUDA), torch.randn(256, 96, device=CUDA)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            y = layer(x)
            assert y.dtype == dtype
            loss = torch.nn.functional.mse_loss(y.float(), target)
        scaler.scale(loss).backward()
        assert layer.lora_A.grad.dtype == torch.float32
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # fp32 adapters kept fp32 gradients.
    assert (layer.lora_B.grad.to(dtype).float() == layer.lora_B.grad).float().mean() < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_stream(backend):
    inputs = inputs_of((512, 1024, 1024), "bf16", 16, dropout_p=0.5)
    expected = run_linear(inputs, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # A late input: a kernel that ran on another stream would read it before it is there.
        torch.cuda._sleep(20_000_000)
        late = replace(inputs, x=inputs.x * 1, dy=inputs.dy * 1)
        actual = run_linear(late, backend)
    side.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gpu_that_is_not_the_current_one(backend):
    inputs = inputs_of((100, 96, 72), "bf16", 8, dropout_p=0.5)
    tensors = {name: getattr(inputs, name).to("cuda:1") for name in (*PARAMETERS, "dy")}
    results = run_linear(replace(inputs, **tensors), backend)
    assert {t.device.index for t in results.values()} == {1}
    assert torch.cuda.current_device() == 0
    assert_same_bits({k: v.to(CUDA) for k, v in results.items()}, run_linear(inputs, backend))


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", ["bf16", "bf16-mixed"])
def test_memory_saved_and_at_the_peak(dtype, p, backend):
    m, n, k, r = 8192, 4096, 4096, 16
    inputs = inputs_of((m, n, k), dtype, r, dropout_p=p)
    x, lora_A, lora_B = (getattr(inputs, name).requires_grad_() for name in ("x", "lora_A", "lora_B"))

    def step():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = lora_linear(x, inputs.weight, lora_A, lora_B, inputs.bias, dropout_p=p, backend=backend)
        forward_peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = torch.autograd.grad(y, (x, lora_A, lora_B), inputs.dy)
        return y, gradients, forward_peak, held, torch.cuda.max_memory_allocated() - before

    step()  # library workspaces and compiled kernels are made once
    y, (dx, *_), forward_peak, held, backward_peak = step()
    saved = m * r * lora_A.element_size() + (8 if p else 0)
    # x is the caller's; each allocation is rounded up to 512 bytes.
    assert y.nbytes + saved <= held <= y.nbytes + saved + 4 * 512
    # Nothing else of y's or dx's size at any time: less than one of them above the results.
    assert forward_peak < 2 * y.nbytes
    assert backward_peak < 2 * dx.nbytes


# -- plans and refusals ----------------------------------------------------------------------------------------------


def test_plans_say_what_this_gpu_gets():
    for dropout_p in (0.0, 0.1):
        for adapter_dtype in (torch.bfloat16, torch.float32):
            for m in (16, 8192):
                plan = explain_plan(
                    m, 4096, 4096, 16, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, device="cuda",
                    dropout_p=dropout_p,
                )  # fmt: skip
                assert plan.backend in ("torch", "triton")
                assert plan.reason


def test_fp64_runs_on_the_cpu_only():
    t = torch.ones(2, 2, dtype=torch.float64, device=CUDA)
    for backend in (*BACKENDS, "reference"):
        with pytest.raises((DtypeError, UnsupportedError), match=r"float32, float16 or bfloat16 on cuda; got float64"):
            lora_linear(t, t, t, t, backend=backend)


def test_seed_on_the_wrong_device_and_operand_on_the_cpu():
    t = torch.ones(2, 2, device=CUDA)
    with pytest.raises(ValueError, match="dropout_seed must be on x's device, cuda:0; got cpu"):
        lora_linear(t, t, t, t, dropout_p=0.5, dropout_seed=torch.tensor([1]))
    with pytest.raises(ValueError, match="lora_A must be on x's device, cuda:0; got cpu"):
        lora_linear(t, t, t.cpu(), t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
def test_library_blocks_on_a_gpu(dtype, p):
    # More rows than one block of the torch backend, with a tail.
    columns = 1024
    rows = low_rank_torch.BLOCK_ELEMENTS["cuda"] // columns + 77
    assert_within_budget(
        inputs_of((rows, columns, columns), dtype, 8, dropout_p=p), partial(run_linear, backend="torch")
    )
