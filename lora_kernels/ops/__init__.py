"""torch.library contracts: schema, fake and implementation of each operation, registered when this package is imported.

Torch-only at import time; Triton is imported by the first call that a plan sends to it.
"""

from lora_kernels.ops._needs import BranchNeeds as BranchNeeds, Needs as Needs
from lora_kernels.ops.branch import (
    branch_backward as branch_backward,
    branch_forward as branch_forward,
    branch_implementation as branch_implementation,
    branch_plan_of as branch_plan_of,
)
from lora_kernels.ops.linear import (
    forget_plans as forget_plans,
    linear_backward as linear_backward,
    linear_forward as linear_forward,
    linear_implementation as linear_implementation,
    plan_of as plan_of,
    problem_of as problem_of,
)
