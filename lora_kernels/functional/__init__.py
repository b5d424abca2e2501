"""The operations as functions: validate, hand over to an autograd.Function."""

from lora_kernels.functional.branch import lora_branch as lora_branch
from lora_kernels.functional.linear import lora_linear as lora_linear
from lora_kernels.functional.plan import explain_plan as explain_plan
