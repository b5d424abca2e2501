"""Seeded inputs of a LoRA linear, and one run of it: y and every gradient by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels import ops
from lora_kernels.functional._checks import seed_tensor
from lora_kernels.functional.linear import lora_linear
from lora_kernels.planning import Plan


@dataclass(frozen=True)
class LinearInputs:
    """Arguments of one call and the gradient that flows back; no tensor requires a gradient yet."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float = 1.0
    dropout_p: float = 0.0
    dropout_seed: int = 0
    dropout_offset: tuple[int, int] | None = None

    def double(self) -> LinearInputs:
        """The same numbers in fp64, on the CPU: what the truth is computed from."""

        def wide(t: Tensor) -> Tensor:
            return t.detach().cpu().double()

        bias = None if self.bias is None else wide(self.bias)
        x, weight, lora_A, lora_B, dy = map(wide, (self.x, self.weight, self.lora_A, self.lora_B, self.dy))
        return replace(self, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, dy=dy)


def make_linear_inputs(
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    bias_dtype: torch.dtype | None = None,
    scaling: float = 2.0,
    dropout_p: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LinearInputs:
    """Normal random inputs of [m, k] → [m, n] at rank r, scaled so that base and low-rank term are comparable.

    Drawn in fp64 on the CPU and rounded once, so that a seed means the same numbers on every device and in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = dtype if adapter_dtype is None else adapter_dtype

    def normal(*shape: int, std: float, to: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device, to)

    return LinearInputs(
        x=normal(m, k, std=1.0, to=dtype),
        weight=normal(n, k, std=k**-0.5, to=dtype),
        lora_A=normal(r, k, std=k**-0.5, to=adapter_dtype),
        lora_B=normal(n, r, std=r**-0.5, to=adapter_dtype),
        bias=normal(n, std=1.0, to=bias_dtype or dtype) if bias else None,
        dy=normal(m, n, std=1.0, to=dtype),
        scaling=scaling,
        dropout_p=dropout_p,
        dropout_seed=seed,
    )


ALL_PARAMETERS = ("x", "weight", "lora_A", "lora_B", "bias")


def run_linear(
    inputs: LinearInputs,
    backend: str,
    *,
    requires_grad: tuple[str, ...] = ALL_PARAMETERS,
    function: Callable[..., Tensor] = lora_linear,
) -> dict[str, Tensor]:
    """One forward and backward: {"y": ..., "d_x": ..., "d_lora_A": ..., ...} for the parameters in requires_grad.

    `function` is called as lora_linear is; pass a compiled or wrapped one to hold it against the plain call.
    """
    leaves = {
        name: tensor.detach().requires_grad_(name in requires_grad)
        for name in ALL_PARAMETERS
        if (tensor := getattr(inputs, name)) is not None
    }
    y = function(
        leaves["x"],
        leaves["weight"],
        leaves["lora_A"],
        leaves["lora_B"],
        leaves.get("bias"),
        scaling=inputs.scaling,
        dropout_p=inputs.dropout_p,
        dropout_seed=inputs.dropout_seed if inputs.dropout_p > 0 else None,
        dropout_offset=inputs.dropout_offset,
        backend=backend,
    )
    results = {"y": y.detach()}
    if y.requires_grad:
        y.backward(inputs.dy)
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            results[f"d_{name}"] = leaf.grad
    return results


def run_linear_plan(inputs: LinearInputs, plan: Plan) -> dict[str, Tensor]:
    """One forward and backward as `plan` says, whatever the planner would choose: names as in `run_linear`."""
    i, p = inputs, inputs.dropout_p
    seed = seed_tensor(i.dropout_seed, i.dropout_offset, i.x.device) if p > 0 else None
    y, xa = ops.LINEAR.implementation(plan.backend).forward(
        i.x, i.weight, i.lora_A, i.lora_B, i.bias, seed, i.scaling, p, plan
    )
    needs = ops.Needs(x=True, weight=True, lora_A=True, lora_B=True, bias=i.bias is not None)
    backward = ops.LINEAR.implementation(plan.backward_way.backend).backward
    gradients = backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, xa, seed, i.scaling, p, needs, plan)
    found = {
        f"d_{name}": gradient.to(getattr(i, name).dtype)  # the bias's comes in the wider dtype it may have
        for name, gradient in zip(ALL_PARAMETERS, gradients, strict=True)
        if gradient is not None
    }
    return {"y": y} | found
