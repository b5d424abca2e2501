"""What a correctness test of LoRA kernels needs, here and downstream: inputs, fp64 truth, error budgets, poisoned memory."""

from lora_kernels.testing.budget import ERROR_FACTOR as ERROR_FACTOR
from lora_kernels.testing.budget import BudgetRow as BudgetRow
from lora_kernels.testing.budget import budget_rows as budget_rows
from lora_kernels.testing.budget import relative_error as relative_error
from lora_kernels.testing.linear import LinearInputs as LinearInputs
from lora_kernels.testing.linear import make_linear_inputs as make_linear_inputs
from lora_kernels.testing.linear import run_linear as run_linear
from lora_kernels.testing.poison import poisoned_allocation as poisoned_allocation
