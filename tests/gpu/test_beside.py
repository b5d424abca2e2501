"""dA on a second stream beside dx: the bits of one stream, whatever else is launched and freed around it."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.kernels import replay
from tests.gpu.test_linear import CUDA, inputs_of, plan_for, run_under
from tests.linear_cases import DTYPES, assert_same_bits, assert_within_budget

STRATEGIES = ("pointers", "descriptors", "library", "persistent")
LARGE = (8192, 4096, 4096)


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_and_bits(dtype, strategy, p):
    several = [inputs_of((304, 264, 520), dtype, dropout_p=p, seed=seed, bias=True) for seed in range(2)]
    plan = plan_for(several[0], strategy)
    assert_within_budget(several, lambda inputs: run_under(replace(plan, beside=True), inputs))
    for inputs in several:
        expected = run_under(replace(plan, beside=False), inputs)
        for _ in range(4):  # as written, recorded, repeated
            assert_same_bits(run_under(replace(plan, beside=True), inputs), expected)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("strategy", ["library", "persistent"])
def test_large_steps_amid_allocations(strategy, p):
    # What one side of a fork frees, the other must not be given while it is read: freed memory is written over here.
    inputs = inputs_of(LARGE, "bf16", dropout_p=p)
    plan = plan_for(inputs, strategy)
    assert plan.beside
    expected = run_under(replace(plan, beside=False), inputs)
    replay._recipes.clear()
    for turn in range(60):
        actual = run_under(plan, inputs)
        for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
            torch.full((size + turn,), torch.nan, device=CUDA)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("strategy", ["library", "persistent"])
def test_on_another_stream_and_in_a_graph(strategy):
    inputs = inputs_of((2048, 1024, 1024), "bf16")
    plan = replace(plan_for(inputs, strategy), beside=True)
    expected = run_under(replace(plan, beside=False), inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            actual = run_under(plan, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(actual, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_under(plan, inputs)
    for _ in range(20):
        for tensor in captured.values():
            tensor.zero_()
        graph.replay()
        assert_same_bits(captured, expected)
