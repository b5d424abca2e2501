"""dA on a second stream beside dx: the bits of one stream, whatever else is launched and freed around it."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.kernels import launch, replay
from lora_kernels.testing import run_linear_plan
from tests.gpu.test_linear import CUDA, inputs_of, plan_for
from tests.linear_cases import assert_same_bits, assert_within_budget

DTYPES = ["bf16", "fp16", "bf16-mixed"]
SIZES = [(304, 264, 520), (2048, 1024, 1024)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_and_bits(dtype, size):
    several = [inputs_of(size, dtype, seed=seed, bias=True) for seed in range(2)]
    plan = plan_for(several[0], "persistent")
    # Each launch anew: a first one takes the host so long that a wait that is missing shows.
    launch._compiled.clear()
    replay._recipes.clear()
    assert_within_budget(several, lambda inputs: run_linear_plan(inputs, replace(plan, beside=True)))
    for inputs in several:
        expected = run_linear_plan(inputs, replace(plan, beside=False))
        for _ in range(4):  # as written, recorded, repeated
            assert_same_bits(run_linear_plan(inputs, replace(plan, beside=True)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_steps_amid_allocations(dtype):
    # What a call frees when it ends is written over at once, on the stream that waited for both.
    inputs = inputs_of((8192, 4096, 4096), dtype)
    plan = plan_for(inputs, "persistent")
    assert plan.beside
    expected = run_linear_plan(inputs, replace(plan, beside=False))
    replay._recipes.clear()
    for turn in range(60):
        actual = run_linear_plan(inputs, plan)
        for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
            torch.full((size + turn,), torch.nan, device=CUDA)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_another_stream_and_in_a_graph(dtype):
    inputs = inputs_of(SIZES[1], dtype)
    plan = replace(plan_for(inputs, "persistent"), beside=True)
    expected = run_linear_plan(inputs, replace(plan, beside=False))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            actual = run_linear_plan(inputs, plan)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(actual, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_linear_plan(inputs, plan)
    for _ in range(20):
        for tensor in captured.values():
            tensor.zero_()
        graph.replay()
        assert_same_bits(captured, expected)
