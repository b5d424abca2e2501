"""Repeated launches on a GPU: with other tensors, the bits that launches as written give."""

import pytest

from lora_kernels.kernels import replay
from lora_kernels.testing import run_linear_plan
from tests.gpu.test_linear import STRATEGIES, inputs_of, plan_for
from tests.linear_cases import DTYPES, assert_same_bits


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_launches_give_the_bits_of_new_ones(dtype, strategy, p):
    plan = plan_for(inputs_of((200, 264, 136), dtype, 8, dropout_p=p), strategy)
    replay._recipes.clear()
    for seed in range(5):  # as written, recorded, and three times repeated, always with other tensors
        inputs = inputs_of((200, 264, 136), dtype, 8, dropout_p=p, seed=seed)
        actual = run_linear_plan(inputs, plan)
        before = dict(replay._recipes)
        replay._recipes.clear()
        assert_same_bits(actual, run_linear_plan(inputs, plan))
        replay._recipes.update(before)
    assert {type(recipe) for recipe in before.values()} == {replay.Recipe}
