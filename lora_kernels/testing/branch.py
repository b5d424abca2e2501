"""Seeded inputs of a LoRA branch, and one run of it: y and every gradient by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels import ops
from lora_kernels.functional._checks import seed_tensor
from lora_kernels.functional.branch import lora_branch
from lora_kernels.planning import BranchPlan
from lora_kernels.testing.linear import make_linear_inputs

BRANCH_TENSORS = ("base_out", "x", "lora_A", "lora_B")


@dataclass(frozen=True)
class BranchInputs:
    """Arguments of one call and the gradient that flows back; no tensor requires a gradient yet."""

    base_out: Tensor
    x: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    scaling: float = 1.0
    dropout_p: float = 0.0
    dropout_seed: int = 0
    dropout_offset: tuple[int, int] | None = None

    def double(self) -> BranchInputs:
        """The same numbers in fp64, on the CPU: what the truth is computed from."""

        def wide(t: Tensor) -> Tensor:
            return t.detach().cpu().double()

        base_out, x, lora_A, lora_B, dy = map(wide, (self.base_out, self.x, self.lora_A, self.lora_B, self.dy))
        return replace(self, base_out=base_out, x=x, lora_A=lora_A, lora_B=lora_B, dy=dy)


def make_branch_inputs(
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    scaling: float = 2.0,
    dropout_p: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BranchInputs:
    """Normal random inputs of [m, k] → [m, n] at rank r, scaled so that base_out and the LoRA term are comparable.

    x, adapters and dy are those of `make_linear_inputs` for the same seed; base_out is drawn by itself. out_dtype is
    base_out's and dy's; None: x's.
    """
    out_dtype = dtype if out_dtype is None else out_dtype
    wide = make_linear_inputs(
        m, n, k, r, dtype=torch.float64, bias=False, scaling=scaling, dropout_p=dropout_p, seed=seed
    )
    base_out = torch.randn(m, n, generator=torch.Generator().manual_seed(~seed), dtype=torch.float64)
    adapter_dtype = dtype if adapter_dtype is None else adapter_dtype
    return BranchInputs(
        base_out=base_out.to(device, out_dtype),
        x=wide.x.to(device, dtype),
        lora_A=wide.lora_A.to(device, adapter_dtype),
        lora_B=wide.lora_B.to(device, adapter_dtype),
        dy=wide.dy.to(device, out_dtype),
        scaling=scaling,
        dropout_p=dropout_p,
        dropout_seed=seed,
    )


def run_branch(
    inputs: BranchInputs,
    backend: str,
    *,
    requires_grad: tuple[str, ...] = BRANCH_TENSORS,
    function: Callable[..., Tensor] = lora_branch,
) -> dict[str, Tensor]:
    """One forward and backward: {"y": ..., "d_x": ..., "d_lora_A": ..., ...} for the tensors in requires_grad.

    `function` is called as lora_branch is; pass a compiled or wrapped one to hold it against the plain call.
    """
    leaves = {name: getattr(inputs, name).detach().requires_grad_(name in requires_grad) for name in BRANCH_TENSORS}
    y = function(
        *leaves.values(),
        scaling=inputs.scaling,
        dropout_p=inputs.dropout_p,
        dropout_seed=inputs.dropout_seed if inputs.dropout_p > 0 else None,
        dropout_offset=inputs.dropout_offset,
        backend=backend,
    )
    results = {"y": y.detach()}
    if y.requires_grad:
        y.backward(inputs.dy)
    return results | {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def run_branch_plan(inputs: BranchInputs, plan: BranchPlan, needs: ops.BranchNeeds | None = None) -> dict[str, Tensor]:
    """One forward and backward as `plan` says, whatever the planner would choose: names as in `run_branch`.

    base_out's gradient is dy and no business of a plan: it is left out.
    """
    i, p = inputs, inputs.dropout_p
    seed = seed_tensor(i.dropout_seed, i.dropout_offset, i.x.device) if p > 0 else None
    needs = ops.BranchNeeds(x=True, lora_A=True, lora_B=True) if needs is None else needs
    y, xa = ops.BRANCH.implementation(plan.backend).forward(
        i.base_out, i.x, i.lora_A, i.lora_B, seed, i.scaling, p, plan
    )
    gradients = ops.BRANCH.implementation(plan.backward.backend).backward(
        i.dy, i.x, i.lora_A, i.lora_B, xa, seed, i.scaling, p, i.x.dtype, needs, plan
    )
    found = {f"d_{name}": gradient for name, gradient in zip(BRANCH_TENSORS[1:], gradients, strict=True)}
    return {"y": y} | {name: gradient for name, gradient in found.items() if gradient is not None}
