"""What the autograd nodes of the operations share: which of them a call takes, and a backward that is the last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import UnsupportedError


def apply(
    node: type[torch.autograd.Function],
    twin: type[torch.autograd.Function],
    forward: Callable[..., Any],
    inputs: tuple[Any, ...],
) -> Tensor:
    """y: through the `transformable` twin in torch.func, through no node where no gradient is recorded, else `node`.

    Not the twin for every call: PyTorch inspects its signature each time, and a node takes 2.8 times as long to make
    (`bench.choices`).
    """
    y: Tensor
    if torch._C._are_functorch_transforms_active():
        y = _apply_transformed(twin, inputs)
    elif not torch.is_grad_enabled():
        y, _ = forward(*inputs)
    else:
        y = node.apply(*inputs)
    return y


def _apply_transformed(twin: type[torch.autograd.Function], inputs: tuple[Any, ...]) -> Tensor:
    if torch.compiler.is_compiling():
        # Dynamo traces the forward alone where torch.func takes the gradient, and has no vmap rule for a node.
        raise UnsupportedError(
            "torch.func must not be traced by torch.compile over this package's operations: PyTorch's tracer loses "
            "their gradient there. Leave out fullgraph=True, and PyTorch runs this part uncompiled; or use "
            "backend='reference', which is plain differentiable PyTorch."
        )
    y: Tensor
    try:
        y, _ = twin.apply(*inputs)
    except NotImplementedError as error:
        if isinstance(error, UnsupportedError) or "jvp" not in str(error):
            raise
        raise UnsupportedError(
            "x, or a parameter, must not carry a forward-mode tangent (torch.func.jvp, jacfwd, hessian): this "
            "package's operations have derivatives in reverse mode only. Use torch.func.vjp or jacrev, or "
            "backend='reference', which is plain differentiable PyTorch."
        ) from error
    return y


def transformable(
    node: type[torch.autograd.Function], forward: Callable[..., Any], save: Callable[..., None]
) -> type[torch.autograd.Function]:
    """A node's twin for torch.func, which wants `setup_context`.

    Args:
        node: whose backward it has.
        forward: the op; returns (y, xa), xa being an output only so that setup_context can save it.
        save: save(ctx, inputs, xa).
    """

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
            y, xa = forward(*inputs)
            return y, xa

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.mark_non_differentiable(output[1])
            save(ctx, inputs, output[1])

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None, _d_xa: None) -> Any:
            return node.backward(ctx, dy)

    return Transformable


def first_order_only(operation: str, backward: Callable[..., Any]) -> type[torch.autograd.Function]:
    """A backward op as a node whose own backward is an error.

    With create_graph the gradients are handed out through it: calling the op directly would return gradients that are
    silently constant.
    """

    class FirstOrderOnly(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return tuple(backward(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            """Nothing is saved: there is no second derivative to compute."""

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            raise UnsupportedError(
                f"{operation} is differentiable once; a second derivative (create_graph=True and another backward) was "
                "asked of it. Use backend='reference', which is plain differentiable PyTorch."
            )

    return FirstOrderOnly


def cast_input(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast that F.linear makes under autocast, which leaves float64 alone."""
    return t if t.dtype == torch.float64 else t.to(dtype)


def cast_adapter(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, but float32 adapters stay as they are."""
    return t if t.dtype == torch.float32 else cast_input(t, dtype)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast switched off, where it is on."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
