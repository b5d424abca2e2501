"""The LoRA branch on a GPU: every backend against fp64, and what only a device can show."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import DtypeError, lora_branch, lora_linear
from lora_kernels.ops import BRANCH, BranchNeeds
from lora_kernels.planning import BranchPlan
from lora_kernels.planning.measured import row_bucket
from lora_kernels.reference.philox import dropout_scale, keep_mask
from lora_kernels.testing import BranchInputs, make_branch_inputs, poisoned_allocation, run_branch, run_branch_plan
from tests import branch_cases
from tests.branch_cases import DTYPES, SUBSETS, TENSORS
from tests.linear_cases import LAYOUTS, assert_same_bits, assert_within_budget, with_layouts

CUDA = torch.device("cuda")
GIB = 1 << 30
BACKENDS = ("triton", "torch", "auto")
inputs_of = partial(branch_cases.inputs_of, device=CUDA)
problems = partial(branch_cases.problems, device=CUDA)
# Compilers warn about many things, differently in each release, and none of it is ours to mend.
quiet_compiler = pytest.mark.filterwarnings("ignore")


def plan_for(inputs: BranchInputs, **choices) -> BranchPlan:
    """The kernels' plan for this GPU; choices: splits and reads, on both sides."""
    i, (r, k) = inputs, inputs.lora_A.shape
    plan = BRANCH.plan_for(
        "triton", i.base_out.dtype, i.x.device, row_bucket(i.x.numel() // k), i.lora_B.shape[0], k, r, i.x.dtype,
        i.lora_A.dtype, i.dropout_p > 0, False,
    )  # fmt: skip
    return replace(plan, x_side=replace(plan.x_side, **choices), out_side=replace(plan.out_side, **choices))


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    "size",
    [(150, 200, 168), (37, 51, 45), (1000, 1030, 520), (1, 96, 80), (33, 1, 40), (40, 33, 1), (1, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_budget_of_every_backend(dtypes, backend, size, p):
    assert_within_budget(problems(size, dtypes, 16, dropout_p=p), partial(run_branch, backend=backend))


@pytest.mark.parametrize("r", [1, 5, 8, 64, 70, 128, 256, 512])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_budget_over_ranks(dtypes, p, r):
    assert_within_budget(inputs_of((200, 264, 136), dtypes, r, dropout_p=p), partial(run_branch, backend="triton"))


@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize("splits", [1, 2, 7, 64])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_budget_over_splits_and_reads(dtypes, splits, reads):
    i = inputs_of((700, 96, 1000), dtypes, 8, dropout_p=0.1)
    kinds = ("xa_splits", "dyb_splits", "d_lora_A_splits", "d_lora_B_splits", "dx_lora_A_splits")
    plan = plan_for(i, **dict.fromkeys(kinds, splits), dy_reads=reads)
    assert_within_budget(i, partial(run_branch_plan, plan=plan))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("tensor", [*TENSORS, "dy"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_layouts(backend, tensor, layout):
    i = with_layouts(inputs_of((72, 136, 104), "bf16-mixed", dropout_p=0.25), **{tensor: layout})
    assert_within_budget(i, partial(run_branch, backend=backend))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp16-mixed", "bf16-over-fp32"])
def test_every_subset_of_gradients(dtypes, p, backend):
    i = inputs_of((40, 48, 56), dtypes, dropout_p=p)
    full = run_branch(i, backend)
    for subset in SUBSETS:
        part = run_branch(i, backend, requires_grad=subset)
        assert set(part) == {"y", *(f"d_{name}" for name in subset)}
        # Under dropout dA shares a kernel with dx, and alone comes from another: two orders of the same sum.
        alone = backend == "triton" and p > 0 and "lora_A" in subset and "x" not in subset
        kept = [name for name in part if not (alone and name == "d_lora_A")]
        assert_same_bits({n: part[n] for n in kept}, {n: full[n] for n in kept})


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_unwritten_memory_does_not_show_and_bits_repeat(dtypes, p):
    i = inputs_of((333, 136, 520), dtypes, 24, dropout_p=p)
    plan = plan_for(i)
    expected = run_branch_plan(i, plan)
    for _ in range(5):
        assert_same_bits(run_branch_plan(i, plan), expected)
    with poisoned_allocation():
        assert_same_bits(run_branch_plan(i, plan), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_same_call_same_bits(backend, p):
    i = inputs_of((2048, 1024, 768), "bf16-mixed", 16, dropout_p=p)
    first = run_branch(i, backend)
    for _ in range(5):
        assert_same_bits(run_branch(i, backend), first)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_one_mask_in_forward_and_every_gradient(dtypes, backend):
    size, p, seed = 64, 0.5, 2**33 + 1
    x, adapters, out = DTYPES[dtypes]
    eye, ones = torch.eye(size, device=CUDA), torch.ones(size, size, device=CUDA)
    i = BranchInputs(
        base_out=0 * ones.to(out), x=ones.to(x), lora_A=eye.to(adapters), lora_B=eye.to(adapters), dy=eye.to(out),
        dropout_p=p, dropout_seed=seed,
    )  # fmt: skip
    diagonal, full = run_branch(i, backend), run_branch(replace(i, dy=ones.to(out)), backend)
    alone = run_branch(i, backend, requires_grad=("lora_A",))
    expected = dropout_scale(p) * keep_mask(torch.tensor([seed]), size, size, p).float()
    shown = {"y": diagonal["y"], "dA": diagonal["d_lora_A"], "dB": diagonal["d_lora_B"], "dx": full["d_x"]}
    for name, value in {**shown, "dA alone": alone["d_lora_A"]}.items():
        assert torch.equal(value.float().cpu(), expected), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_same_seed_is_lora_linears_mask(backend):
    x, zero, eye = torch.ones(200, 96, device=CUDA), torch.zeros(96, 96, device=CUDA), torch.eye(96, device=CUDA)
    options = {"dropout_p": 0.3, "dropout_seed": 7, "backend": backend}
    branch = lora_branch(torch.zeros(200, 96, device=CUDA), x, eye, eye, **options)
    assert torch.equal(branch != 0, lora_linear(x, zero, eye, eye, **options) != 0)


def test_nan_and_inf_propagate():
    i = inputs_of((40, 48, 56), "bf16", dropout_p=0.5, seed=3)
    i.x[5, 7], i.x[6, 9], i.dy[8, 3], i.base_out[9, 4] = float("nan"), float("inf"), float("-inf"), float("inf")
    expected = run_branch(i, "reference")
    for backend in BACKENDS:
        for name, value in run_branch(i, backend).items():
            assert torch.equal(value.isfinite(), expected[name].isfinite()), (backend, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(0,), (2, 0), (), (2, 3, 4)], ids=str)
def test_leading_dimensions(leading, backend):
    m = torch.Size(leading).numel()
    i = inputs_of((m, 40, 24), "bf16-mixed", 4, dropout_p=0.5)
    of = {"x": 24, "dy": 40, "base_out": 40}
    i = replace(i, **{name: getattr(i, name).view(*leading, size) for name, size in of.items()})
    results = run_branch(i, backend)
    assert results["y"].shape == results["d_base_out"].shape == (*leading, 40)
    assert results["d_x"].shape == (*leading, 24)
    if m == 0:
        assert not any(gradient.any() for gradient in results.values())


@pytest.mark.slow
@pytest.mark.parametrize("wide", ["N", "K"])
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropout"])
def test_offsets_past_two_to_the_31(p, wide):
    m, large, small, r = (1 << 18) + 40, 8208, 64, 8
    n, k = (large, small) if wide == "N" else (small, large)
    assert m * large > 1 << 31
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * GIB:
        pytest.skip(f"needs 40 GiB of free GPU memory for tensors of 2^31 elements; {free / GIB:.0f} GiB are free")
    generator = torch.Generator(CUDA).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=CUDA, dtype=torch.bfloat16)
    x, dy, base_out = normal(m, k), normal(m, n), normal(m, n)
    lora_A, lora_B = normal(r, k) * k**-0.5, normal(n, r) * r**-0.5
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    y = lora_branch(base_out, x, lora_A, lora_B, scaling=2.0, dropout_p=p, dropout_seed=5, backend="triton")
    d_x, d_lora_A, d_lora_B = torch.autograd.grad(y, leaves, dy)

    with torch.no_grad():
        truth_A, truth_B = torch.zeros(r, k, device=CUDA).double(), torch.zeros(n, r, device=CUDA).double()
        wide_A, wide_B, alpha = lora_A.double(), lora_B.double(), 2.0 * dropout_scale(p)
        seed, step = torch.tensor([5], device=CUDA), 1 << 13
        for start in range(0, m, step):
            rows = slice(start, min(start + step, m))
            keep = keep_mask(seed, rows.stop - start, k, p, first_row=start)
            dropped = torch.where(keep, x[rows], 0).double()
            xa, dyb = alpha * dropped @ wide_A.T, alpha * dy[rows].double() @ wide_B
            truth_B += dy[rows].double().T @ xa
            truth_A += dyb.T @ dropped
            if start == 0 or rows.stop == m:  # the first rows, and those past 2^31
                truth_y, truth_x = base_out[rows].double() + xa @ wide_B.T, torch.where(keep, dyb @ wide_A, 0)
                for actual, truth in ((y[rows], truth_y), (d_x[rows], truth_x)):
                    # xa or dyb, and the sum: two roundings to bf16.
                    assert (actual.double() - truth).norm() <= 2 * 2**-9 * truth.norm()
    for actual, truth in ((d_lora_A, truth_A), (d_lora_B, truth_B)):
        assert (actual.double() - truth).norm() <= 2 * 2**-9 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16-mixed", "bf16-over-fp32"])
def test_cuda_graph_draws_a_new_mask_at_each_replay(dtypes, backend):
    size = 64
    x_dtype, adapters, out = DTYPES[dtypes]
    x = torch.ones(size, size, dtype=x_dtype, device=CUDA, requires_grad=True)
    base_out = torch.zeros(size, size, dtype=out, device=CUDA)
    lora_A, lora_B = (torch.eye(size, dtype=adapters, device=CUDA).requires_grad_() for _ in range(2))

    def step():
        y = lora_branch(base_out, x, lora_A, lora_B, dropout_p=0.5, backend=backend)
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


class Branched(nn.Module):
    """A layer whose base is computed elsewhere."""

    def __init__(self, backend: str = "auto"):
        super().__init__()
        self.base, self.backend = nn.Linear(72, 96, device=CUDA).requires_grad_(False), backend
        self.lora_A = nn.Parameter(torch.randn(8, 72, device=CUDA) / 8)
        self.lora_B = nn.Parameter(torch.randn(96, 8, device=CUDA) / 8)

    def forward(self, x):
        return lora_branch(self.base(x), x, self.lora_A, self.lora_B, dropout_p=0.5, backend=self.backend)


@quiet_compiler
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", ["bf16-mixed", "bf16-over-fp32"])
def test_compiled_function_is_the_eager_one(dtypes, backend):
    i = inputs_of((100, 96, 72), dtypes, dropout_p=0.5)
    torch.compiler.reset()
    compiled = torch.compile(lora_branch, fullgraph=True)
    assert_same_bits(run_branch(i, backend, function=compiled), run_branch(i, backend))


@quiet_compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layer_trains_with_dropout(mode):
    torch.compiler.reset()
    layer = Branched()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    seen = []
    for _ in range(4):
        # Gradients lie in the graph's memory, which the next replay writes to.
        layer.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.ones(64, 72, device=CUDA, requires_grad=True)
        compiled(x).square().sum().backward()
        assert layer.lora_A.grad.isfinite().all()
        seen.append(layer.lora_A.grad.clone())
    assert not any(torch.equal(a, b) for n, a in enumerate(seen) for b in seen[:n])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_the_mask(backend, reentrant):
    layer = Branched(backend)
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
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["base in x's dtype", "base in fp32"])
def test_autocast(dtype, out_dtype, backend):
    i = make_branch_inputs(64, 48, 72, 8, dtype=torch.float32, device=CUDA, dropout_p=0.25)
    i = replace(i, base_out=i.base_out.to(out_dtype or dtype), dy=i.dy.to(out_dtype or dtype))

    def under_autocast(*tensors, **options):
        with torch.autocast("cuda", dtype):
            return lora_branch(*tensors, **options)

    results = run_branch(i, backend, function=under_autocast)
    assert results["y"].dtype == i.base_out.dtype
    expected = run_branch(replace(i, x=i.x.to(dtype)), backend)
    assert_same_bits({n: t.float() for n, t in results.items()}, {n: t.float() for n, t in expected.items()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_stream(backend):
    i = inputs_of((512, 1024, 1024), "bf16", 16, dropout_p=0.5)
    expected = run_branch(i, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # A late input: a kernel that ran on another stream would read it before it is there.
        torch.cuda._sleep(20_000_000)
        late = replace(i, base_out=i.base_out * 1, x=i.x * 1, dy=i.dy * 1)
        actual = run_branch(late, backend)
    side.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_memory(backend, p):
    m, n, k, r = 8192, 4096, 4096, 16
    i = inputs_of((m, n, k), "bf16-mixed", r, dropout_p=p)
    x, lora_A, lora_B = (t.clone().requires_grad_() for t in (i.x, i.lora_A, i.lora_B))

    def step():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = lora_branch(i.base_out, x, lora_A, lora_B, dropout_p=p, backend=backend)
        forward_peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = torch.autograd.grad(y, (x, lora_A, lora_B), i.dy)
        return y, gradients, forward_peak, held, torch.cuda.max_memory_allocated() - before

    step()  # library workspaces and compiled kernels are made once
    y, (dx, *_), forward_peak, held, backward_peak = step()
    saved = m * r * lora_A.element_size() + (8 if p else 0)
    # x and base_out are the caller's; each allocation is rounded up to 512 bytes.
    assert y.nbytes + saved <= held <= y.nbytes + saved + 4 * 512
    # Nothing else of y's or dx's size at any time: less than one of them above the results.
    assert forward_peak < 2 * y.nbytes
    assert backward_peak < 2 * dx.nbytes


def test_plans_say_what_this_gpu_gets():
    for x, adapters, out in DTYPES.values():
        for p in (0.0, 0.1):
            for m in (16, 8192):
                plan = BRANCH.plan_for("auto", out, CUDA, m, 4096, 4096, 16, x, adapters, p > 0, False)
                assert plan.backend in ("torch", "triton")
                assert plan.reason


def test_no_gradient_is_asked_of_a_plan_that_needs_none():
    i = inputs_of((40, 48, 56), "bf16")
    assert set(run_branch_plan(i, plan_for(i), BranchNeeds(False, False, False))) == {"y"}


@pytest.mark.parametrize("wide", ["base_out", "every"])
def test_fp64_runs_on_the_cpu_only(wide):
    t = torch.ones(2, 2, device=CUDA)
    others = (t.double(),) * 3 if wide == "every" else (t,) * 3
    for backend in (*BACKENDS, "reference"):
        with pytest.raises(DtypeError, match=r"float32, float16 or bfloat16 on cuda; got float64"):
            lora_branch(t.double(), *others, backend=backend)


def test_operand_on_the_cpu():
    t = torch.ones(2, 2, device=CUDA)
    with pytest.raises(ValueError, match="base_out must be on x's device, cuda:0; got cpu"):
        lora_branch(t.cpu(), t, t, t)
