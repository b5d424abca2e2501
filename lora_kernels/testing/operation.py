"""One run of any declared operation: y and every gradient by name, through its function or under a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from lora_kernels.ops import Operation
from lora_kernels.validation import seed_tensor

Inputs = TypeVar("Inputs", bound="CallInputs")


@dataclass(frozen=True, kw_only=True)
class CallInputs:
    """Arguments of one call and the gradient that flows back; no tensor requires a gradient yet.

    An operation's own have a field for each of its operands.
    """

    dy: Tensor
    scaling: float = 1.0
    dropout_p: float = 0.0
    dropout_seed: int = 0
    dropout_offset: tuple[int, int] | None = None

    def double(self: Inputs) -> Inputs:
        """The same numbers in fp64, on the CPU: what the truth is computed from."""
        wide: dict[str, Any] = {
            name: value.detach().cpu().double() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **wide)


def run_operation(
    operation: Operation,
    function: Callable[..., Tensor],
    inputs: CallInputs,
    backend: str,
    requires_grad: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """One forward and backward: {"y": ..., "d_x": ..., "d_lora_A": ..., ...}.

    Args:
        operation: whose operands `inputs` has.
        function: called as the operation's function is.
        inputs: of the call.
        backend: as the function takes it.
        requires_grad: operands that get a gradient; None: all.
    """
    leaves: dict[str, Tensor | None] = {}
    for operand in operation.operands:
        tensor: Tensor | None = getattr(inputs, operand.name)
        needed = requires_grad is None or operand.name in requires_grad
        leaves[operand.name] = None if tensor is None else tensor.detach().requires_grad_(needed)
    y = function(
        *leaves.values(),
        scaling=inputs.scaling,
        dropout_p=inputs.dropout_p,
        dropout_seed=inputs.dropout_seed if inputs.dropout_p > 0 else None,
        dropout_offset=inputs.dropout_offset,
        backend=backend,
    )
    if y.requires_grad:
        y.backward(inputs.dy)
    gradients = {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    return {"y": y.detach(), **gradients}


def run_plan(operation: Operation, inputs: CallInputs, plan: Any, needs: Any = None) -> dict[str, Tensor]:
    """One forward and backward as `plan` says, whatever the planner would choose: names as in `run_operation`.

    needs: the operation's own; None asks for every operand that is there. Gradients that are dy itself are left out.
    """
    given = [getattr(inputs, operand.name) for operand in operation.operands]
    own_dtypes = [given[place].dtype for place in operation.own_dtypes]
    saved = [getattr(inputs, operand.name) for operand in operation.saved]
    p = inputs.dropout_p
    seed = seed_tensor(inputs.dropout_seed, inputs.dropout_offset, inputs.dy.device) if p > 0 else None
    there = operation.needs(*(getattr(inputs, operand.name) is not None for operand in operation.gradients))
    needs = there if needs is None else operation.needs(*map(min, needs, there))
    y, xa = operation.implementation(plan.backend).forward(*given, seed, inputs.scaling, p, plan)
    gradients = operation.implementation(plan.backward_way.backend).backward(
        inputs.dy, *saved, xa, seed, inputs.scaling, p, *own_dtypes, needs, plan
    )
    results = {"y": y}
    for operand, gradient in zip(operation.gradients, gradients, strict=True):
        if gradient is not None:
            # What the node rounds is rounded here; any other dtype is the backend's to get right.
            dtype = getattr(inputs, operand.name).dtype if operand.gradient == "widest" else gradient.dtype
            results[f"d_{operand.name}"] = gradient.to(dtype)
    return results
