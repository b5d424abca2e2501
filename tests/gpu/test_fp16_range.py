"""fp16 on a GPU where a scaling inside the stored products would leave its range: every strategy, against fp64."""

from functools import partial

import pytest

from lora_kernels.testing import run_linear, run_linear_plan
from tests.gpu.test_linear import STRATEGIES, inputs_of, plan_for
from tests.linear_cases import SCALINGS, assert_in_range, far_from_one, over_fp16s_range


@over_fp16s_range(SCALINGS[0], SCALINGS[-1])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "torch"])
def test_fp16_stays_in_range(strategy, stored, scaling, p):
    problem = far_from_one(inputs_of((150, 200, 168), "fp16", 8, scaling=scaling, dropout_p=p), stored)
    run = (
        partial(run_linear, backend="torch")
        if strategy == "torch"
        else partial(run_linear_plan, plan=plan_for(problem, strategy))
    )
    assert_in_range(problem, stored, run(problem))
