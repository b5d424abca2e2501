"""What a correctness test of LoRA kernels needs, here and downstream: inputs, fp64 truth, budgets, poisoned memory."""

from lora_kernels.reference.budget import (
    ERROR_FACTOR as ERROR_FACTOR,
    BudgetRow as BudgetRow,
    budget_rows as budget_rows,
    relative_error as relative_error,
)
from lora_kernels.testing.branch import (
    BranchInputs as BranchInputs,
    make_branch_inputs as make_branch_inputs,
    run_branch as run_branch,
    run_branch_plan as run_branch_plan,
)
from lora_kernels.testing.linear import (
    LinearInputs as LinearInputs,
    make_linear_inputs as make_linear_inputs,
    run_linear as run_linear,
    run_linear_plan as run_linear_plan,
)
from lora_kernels.testing.order import order_errors as order_errors
from lora_kernels.testing.poison import poisoned_allocation as poisoned_allocation
