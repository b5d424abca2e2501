"""`lora_branch` declared: y = base_out + scaling (drop(x) A^T) B^T over a base that is computed elsewhere."""

from __future__ import annotations

import torch

from lora_kernels.ops import _branch_torch
from lora_kernels.ops._needs import BranchNeeds
from lora_kernels.ops.operation import Implementation, Operand, Operation
from lora_kernels.planning import BranchPlan, Problem, make_branch_plan
from lora_kernels.planning.device import triton_available


def _plan(problem: Problem, out_dtype: torch.dtype, backend: str, _: torch.device) -> BranchPlan:
    return make_branch_plan(problem, out_dtype, backend, triton_available=triton_available())


def _triton() -> Implementation:
    from lora_kernels.ops import _branch_triton

    return _branch_triton


BRANCH = Operation(
    "branch",
    (
        Operand("base_out", "*N"),
        Operand("x", "*K", saved_for=("lora_A",), gradient="own"),
        Operand("lora_A", "RK", gradient="adapters"),
        Operand("lora_B", "NR", gradient="adapters"),
    ),
    out="base_out",
    passes_dy=("base_out",),
    needs=BranchNeeds,
    plan=_plan,
    backends={"torch": lambda: _branch_torch, "triton": _triton},
)
