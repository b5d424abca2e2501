"""From a problem to a plan: which backend, which strategy, which tiles, and why. Never imports kernels."""

from lora_kernels.planning.plan import Plan as Plan
from lora_kernels.planning.plan import Problem as Problem
from lora_kernels.planning.plan import make_plan as make_plan
