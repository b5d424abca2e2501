"""`lora_linear` declared: y = x W^T + b + scaling (drop(x) A^T) B^T over a dense weight."""

from __future__ import annotations

import torch

from lora_kernels.ops import _linear_torch
from lora_kernels.ops._needs import Needs
from lora_kernels.ops.operation import Implementation, Operand, Operation
from lora_kernels.planning import Plan, Problem, make_plan
from lora_kernels.planning.device import device_traits, triton_available
from lora_kernels.planning.measured import table_of


def plan_of(problem: Problem, backend: str, device: torch.device) -> Plan:
    """The plan for a problem on a device that is here, with what has been measured on it."""
    measured = table_of(device_traits(device.type, device.index).name)
    return make_plan(problem, backend, triton_available=triton_available(), measured=measured)


def _triton() -> Implementation:
    from lora_kernels.ops import _linear_triton

    return _linear_triton


LINEAR = Operation(
    "linear",
    (
        Operand("x", "*K", saved_for=("weight", "lora_A")),
        Operand("weight", "NK", saved_for=("x",)),
        Operand("lora_A", "RK", gradient="adapters"),
        Operand("lora_B", "NR", gradient="adapters"),
        Operand("bias", "N", optional=True, gradient="widest"),
    ),
    out="x",
    needs=Needs,
    plan=lambda problem, _, backend, device: plan_of(problem, backend, device),
    backends={"torch": lambda: _linear_torch, "triton": _triton},
)
