"""torch.library contracts: schema, fake and implementation of each operation, registered when this package is imported.

Torch-only at import time; Triton is imported by the first call that a plan sends to it.
"""

from lora_kernels.ops._needs import BranchNeeds as BranchNeeds, Needs as Needs
from lora_kernels.ops.branch import BRANCH as BRANCH
from lora_kernels.ops.linear import LINEAR as LINEAR, plan_of as plan_of
from lora_kernels.ops.operation import Operation as Operation, problem_of as problem_of

OPERATIONS: tuple[Operation, ...] = (LINEAR, BRANCH)
