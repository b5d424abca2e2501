"""From a problem to a plan: which backend, which strategy, which tiles, and why. Never imports kernels."""

from lora_kernels.planning.branch import BranchPlan as BranchPlan, make_branch_plan as make_branch_plan
from lora_kernels.planning.plan import (
    Backend as Backend,
    Plan as Plan,
    Problem as Problem,
    Way as Way,
    make_plan as make_plan,
)
