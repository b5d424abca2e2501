"""From a problem to a plan: which backend, which strategy, which tiles, and why. Never imports kernels."""

from lora_kernels.planning.plan import Plan as Plan, Problem as Problem, make_plan as make_plan
