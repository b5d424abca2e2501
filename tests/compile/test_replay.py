"""Repeated launches, against a driver that records them: what the same call as written launches, with its tensors."""

import gc
import subprocess
import sys
import threading
import weakref
from collections import deque

import pytest
import torch
import triton
import triton.language as tl
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lora_kernels.kernels import replay
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.replay import Recipe, replayed
from lora_kernels.ops import Needs, _branch_triton, _linear_triton, low_rank_triton
from lora_kernels.ops._needs import BranchNeeds
from lora_kernels.planning import make_branch_plan, make_plan
from lora_kernels.planning.plan import paired, ways_of
from lora_kernels.planning.tiles import WIDTHS
from lora_kernels.testing import make_branch_inputs, make_linear_inputs
from tests.compile.test_launch import SERVED, WIDTH_DTYPES, problem_of


@triton.jit
def add_one_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + 1)


def add_one(x, out):
    launch(add_one_kernel, (1,), x, out, BLOCK=64, num_warps=1)


@pytest.fixture(autouse=True)
def forgotten():
    add_one_kernel.device_caches.clear()
    yield
    add_one_kernel.device_caches.clear()


def roles(launches, inputs):
    """Each launch with, for a tensor, whose memory it is: an input's name, or which of the call's own it is."""
    names = {t.data_ptr(): name for name, t in inputs.items() if isinstance(t, torch.Tensor)}

    def role(tensor):
        return names.setdefault(tensor.data_ptr(), f"own {len(names)}"), tensor.dtype

    def seen(arg):
        if isinstance(arg, torch.Tensor):
            return role(arg)
        if type(arg).__name__ == "TensorDescriptor":
            return role(arg.base), list(arg.shape), list(arg.strides), list(arg.block_shape), type(arg)
        return arg

    return [(binary, grid, [seen(arg) for arg in args]) for binary, grid, args in launches]


def assert_repeats(driver, monkeypatch, call, fresh):
    """call(inputs) launches the same for other inputs, as written, while it is recorded, and repeated."""
    seen, kept = [], []
    for turn in range(4):
        inputs = fresh()
        kept.append(inputs)  # alive, so that no address comes back
        driver.raw.clear()
        if turn == 2:
            assert any(isinstance(recipe, Recipe) for recipe in replay._recipes.values())
            assert replay.UNREPEATABLE not in replay._recipes.values()
            monkeypatch.setattr(replay, "_recorded", lambda *_: pytest.fail("recorded again"))
            for module in (_linear_triton, _branch_triton, low_rank_triton):
                for name in ("shrink", "bwd_lora_a", "from_dy", "bwd_dx_lora_a"):
                    monkeypatch.setattr(module, name, lambda **_: pytest.fail("ran as written"), raising=False)
        outputs = call(inputs)
        of_outputs = [t if t is None else (t.shape, t.dtype, t.is_contiguous()) for t in outputs]
        addresses = {t.data_ptr() for t in outputs if t is not None}
        seen.append((roles(driver.raw, inputs), of_outputs, len(addresses)))
        kept += [outputs, list(driver.raw)]
    as_written, recorded, repeated, again = seen
    assert as_written == recorded == repeated == again
    assert len(as_written[0]) >= 3


@pytest.mark.parametrize(("width", "p", "strategy"), SERVED)
def test_a_linear(driver, monkeypatch, width, p, strategy):
    dtype, adapters = WIDTH_DTYPES[width]
    problem = problem_of(width, p)
    plan = paired(problem, make_plan(problem, "triton", triton_available=True), strategy)

    def fresh():
        i = make_linear_inputs(16, 64, 80, 16, dtype=dtype, adapter_dtype=adapters)
        seed = torch.tensor([1]) if p else None
        return vars(i) | {"seed": seed, "xa": torch.randn(16, 16, dtype=adapters)}

    def call(i):
        y, xa = _linear_triton.forward(
            i["x"], i["weight"], i["lora_A"], i["lora_B"], i["bias"], i["seed"], 2.0, p, plan
        )
        needs = Needs(x=True, weight=False, lora_A=True, lora_B=True, bias=True)
        gradients = _linear_triton.backward(
            i["dy"], i["x"], i["weight"], i["lora_A"], i["lora_B"], i["xa"], i["seed"], 2.0, p, needs, plan
        )
        return y, xa, *gradients

    assert_repeats(driver, monkeypatch, call, fresh)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_branch(driver, monkeypatch, width, p):
    dtype, adapters = WIDTH_DTYPES[width]
    plan = make_branch_plan(problem_of(width, p), torch.float32, "triton", triton_available=True)

    def fresh():
        i = make_branch_inputs(
            16, 64, 80, 16, dtype=dtype, adapter_dtype=adapters, out_dtype=torch.float32, dropout_p=p
        )
        seed = torch.tensor([1]) if p else None
        return vars(i) | {"seed": seed, "xa": torch.randn(16, 16, dtype=adapters)}

    def call(i):
        y, xa = _branch_triton.forward(i["base_out"], i["x"], i["lora_A"], i["lora_B"], i["seed"], 2.0, p, plan)
        needs = BranchNeeds(x=True, lora_A=True, lora_B=True)
        gradients = _branch_triton.backward(
            i["dy"], i["x"], i["lora_A"], i["lora_B"], i["xa"], i["seed"], 2.0, p, dtype, needs, plan
        )
        return y, xa, *gradients

    assert_repeats(driver, monkeypatch, call, fresh)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.randn(17, 80)},
        {"x": torch.randn(80, 16).T},
        {"x": torch.randn(16, 80, dtype=torch.float64).float().half()},
        {"x": torch.randn(16 * 80 + 1)[1:].view(16, 80)},
        {"scaling": 3.0},
        {"bias": torch.randn(64)},
        {"needs": Needs(x=False, weight=False, lora_A=True, lora_B=True, bias=False)},
        {"plan": "one_pass"},
    ],
    ids=["rows", "strides", "dtype", "alignment", "scaling", "bias", "needs", "plan"],
)
def test_what_differs_has_a_recipe_of_its_own(driver, other):
    problem = problem_of("32", 0.0)
    assert {way.strategy for way in ways_of(problem, "forward", ("triton",))} >= {"shrink_fused", "one_pass"}
    plans = {name: paired(problem, make_plan(problem, "triton", triton_available=True), name) for name in
             ("shrink_fused", "one_pass")}  # fmt: skip
    i = make_linear_inputs(16, 64, 80, 16, dtype=torch.float32, adapter_dtype=torch.float32)
    needs = Needs(x=True, weight=False, lora_A=True, lora_B=True, bias=False)

    def call(x=i.x, scaling=2.0, bias=None, needs=needs, plan="shrink_fused"):
        weight, lora_A, lora_B = (t.to(x.dtype) for t in (i.weight, i.lora_A, i.lora_B))
        y, xa = _linear_triton.forward(x, weight, lora_A, lora_B, bias, None, scaling, 0.0, plans[plan])
        dy = torch.randn_like(y)
        _linear_triton.backward(dy, x, weight, lora_A, lora_B, xa, None, scaling, 0.0, needs, plans[plan])

    for _ in range(3):
        call()
    before = dict(replay._recipes)
    call(**other)
    added = [recipe for key, recipe in replay._recipes.items() if key not in before]
    assert added
    assert set(added) == {replay.SEEN}


def add_two(x, plan):
    between, out = torch.empty(64), torch.empty(64)
    add_one(x, between)
    add_one(between, out)
    return (out,)


def turns(run, count=4, **kwargs):
    for _ in range(count):
        x = torch.randn(64)
        outputs = replayed(run, (x,), (), "plan")
    return outputs


def found(run):
    (recipe,) = [recipe for key, recipe in replay._recipes.items() if key[0] is run]
    return recipe


def test_a_recipe_holds_no_tensor_and_lets_go_of_what_is_not_needed_any_more(driver):
    def run(x, plan):
        first, second, third = torch.empty(64), torch.empty(64), torch.empty(64)
        add_one(x, first)
        add_one(first, second)
        add_one(second, third)
        return (third,)

    turns(run, 2)
    first, second, third = found(run).steps
    assert (first.last, second.last, third.last) == ((), (1,), (2,))
    assert not any(isinstance(arg, torch.Tensor) for step in found(run).steps for arg in step.launch.args)


def test_a_recorded_call_lets_go_of_memory_as_it_does_unrecorded(driver, monkeypatch):
    alive, freed = [], []

    def run(x, plan):
        first, second = torch.empty(64), torch.empty(64)
        add_one(x, first)
        add_one(first, second)
        memory = StorageWeakRef(first.untyped_storage())
        freed.append(first.data_ptr())
        del first
        alive.append(not memory.expired())
        third = torch.empty(65)
        add_one(second, third)
        return (third,)

    # Where memory was let go, the next tensor may be: not only by the chance of this allocator.
    address = torch.Tensor.data_ptr
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: freed[-1] if t.shape == (65,) else address(t))
    monkeypatch.setattr(driver, "raw", deque(maxlen=0))  # or the driver would hold the arguments
    turns(run, 2)
    assert alive == [False, False]
    assert [step.tensors for step in found(run).steps] == [((0, 0), (1, 1)), ((0, 1), (1, 2)), ((0, 2), (1, 3))]


def test_empty_tensors_are_not_told_apart(driver):
    def run(x, plan):
        first, second = torch.empty(0, 64), torch.empty(0, 64)
        add_one(first, second)
        return (second,)

    turns(run, 2)
    assert found(run) == replay.UNREPEATABLE


def test_memory_that_nothing_needs_any_more_is_free_before_the_next_allocation(driver, monkeypatch):
    def run(x, plan):
        for _ in range(4):
            out = torch.empty(64)
            add_one(x, out)
            x = out
        return (out,)

    turns(run, 2)
    empty_strided, made, alive = torch.empty_strided, [], []

    def watched(*args, **kwargs):
        alive.append([index for index, tensor in enumerate(made) if tensor() is not None])
        out = empty_strided(*args, **kwargs)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(driver, "raw", deque(maxlen=0))  # or the driver would hold the arguments
    monkeypatch.setattr(torch, "empty_strided", watched)
    turns(run, 1)
    assert alive == [[], [0], [1], [2]]


def test_any_other_operation_makes_a_call_unrepeatable(driver):
    def run(x, plan):
        (out,) = add_two(x, plan)
        return (out.add_(1),)

    turns(run)
    assert found(run) == replay.UNREPEATABLE
    assert len(driver.raw) == 8


def test_a_view_of_an_input_is_the_input_only_from_its_beginning(driver):
    def from_its_beginning(x, plan):
        out = torch.empty(64)
        add_one(x.view(8, 8).T, out)
        return (out,)

    def from_elsewhere(x, plan):
        out = torch.empty(64)
        add_one(x[16:], out)
        return (out,)

    turns(from_its_beginning)
    turns(from_elsewhere)
    assert isinstance(found(from_its_beginning), Recipe)
    assert found(from_elsewhere) == replay.UNREPEATABLE


def test_inputs_in_one_place_are_not_told_apart(driver):
    def run(x, y, plan):
        out = torch.empty(64)
        add_one(y, out)
        return (out,)

    for _ in range(3):
        x = torch.randn(64)
        replayed(run, (x, x), (), "plan")
    assert found(run) == replay.UNREPEATABLE


def test_an_output_must_be_a_whole_allocation(driver):
    def an_input(x, plan):
        add_one(x, torch.empty(64))
        return (x,)

    def a_part(x, plan):
        out = torch.empty(64)
        add_one(x, out)
        return (out[:8],)

    def the_other_way(x, plan):
        out = torch.empty(8, 8)
        add_one(x, out)
        return (out.T,)

    for run in (an_input, a_part, the_other_way):
        turns(run)
        assert found(run) == replay.UNREPEATABLE


def test_a_recipe_is_of_one_device(driver, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: driver.device)
    turns(add_two, 3)
    of_the_first = {binary for binary, *_ in driver.raw}
    driver.raw.clear()
    driver.device = 1
    turns(add_two, 1)
    assert of_the_first.isdisjoint(binary for binary, *_ in driver.raw)


def test_a_recipe_keeps_its_plan_so_that_no_other_gets_its_id(driver):
    class SomePlan:
        pass

    plan = SomePlan()
    kept = weakref.ref(plan)
    for _ in range(2):
        replayed(add_two, (torch.randn(64),), (), plan)
    del plan
    gc.collect()
    assert kept() is not None
    replay._recipes.clear()
    gc.collect()
    assert kept() is None


def test_a_full_table_is_emptied_and_goes_on(driver, monkeypatch):
    monkeypatch.setattr(replay, "MOST_RECIPES", 3)
    for size in range(64, 72):
        for _ in range(3):
            replayed(add_two, (torch.randn(size),), (), "plan")
        assert len(replay._recipes) <= 3
    assert len(driver.raw) == 8 * 3 * 2


def test_sizes_that_come_once_do_not_cost_the_usual_one_its_recipe(driver, monkeypatch):
    monkeypatch.setattr(replay, "MOST_RECIPES", 4)
    usual = torch.randn(64)
    for _ in range(3):
        replayed(add_two, (usual,), (), "plan")
    (recipe,) = replay._recipes.values()
    for size in range(65, 75):
        replayed(add_two, (torch.randn(size),), (), "plan")
        assert recipe in replay._recipes.values()
        assert len(replay._recipes) <= 4


def test_a_profiler_sees_every_launch(driver):
    turns(add_two)
    driver.hooks.clear()
    seen = []
    triton.knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        turns(add_two, 1)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(seen.append)
    assert driver.hooks == [triton.knobs.runtime.launch_enter_hook] * 2


def test_an_error_while_recording_ends_the_recording(driver):
    def run(x, plan):
        (out,) = add_two(x, plan)
        if failing:
            raise RuntimeError("out of memory")
        return (out,)

    failing = False
    turns(run, 1)
    failing = True
    with pytest.raises(RuntimeError, match="out of memory"):
        turns(run, 1)
    assert replay.observer.launched is None
    failing = False
    turns(run, 2)
    assert isinstance(found(run), Recipe)


def test_one_thread_records_at_a_time(driver):
    one_is_inside, other_is_inside, one_is_done = threading.Event(), threading.Event(), threading.Event()

    def one(x, plan):
        one_is_inside.set()
        other_is_inside.wait(10)
        return add_two(x, plan)

    def other(x, plan):
        other_is_inside.set()
        one_is_done.wait(10)
        return add_two(x, plan)

    def in_a_thread():
        turns(one, 1)
        one_is_done.set()

    one_is_done.set()
    other_is_inside.set()
    for run in (one, other):
        turns(run, 1)
    for event in (one_is_inside, other_is_inside, one_is_done):
        event.clear()
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    one_is_inside.wait(10)
    turns(other, 1)
    thread.join()
    assert not is_in_torch_dispatch_mode()
    assert isinstance(found(one), Recipe)
    assert found(other) == replay.SEEN
    turns(other, 1)
    assert isinstance(found(other), Recipe)


def test_recording_imports_no_compiler():
    script = """
import sys, torch
from lora_kernels.kernels import replay
outputs, recipe = replay._recorded(lambda x, plan: (torch.empty(4),), (torch.zeros(4),), (), None)
assert outputs[0].shape == (4,)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
