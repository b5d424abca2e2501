"""From a problem to a plan: which backend, which strategy, which tiles, and why. Never imports kernels."""

from lora_kernels.planning.branch import BranchPlan as BranchPlan, make_branch_plan as make_branch_plan
from lora_kernels.planning.plan import Plan as Plan, make_plan as make_plan
from lora_kernels.planning.problem import Backend as Backend, Problem as Problem, Way as Way
