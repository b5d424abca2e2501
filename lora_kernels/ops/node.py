"""The autograd node of an operation, made from its declaration: with a twin for torch.func, differentiable once.

A node saves what the needed gradients read, and besides lora_A and lora_B, with whose sizes theirs are made: of the
low-rank half that is x, xa [*, R] and the seed, from which the mask is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import UnsupportedError
from lora_kernels.ops.operation import CALL, Operation


def differentiable(operation: Operation) -> Callable[[tuple[Any, ...]], Tensor]:
    """A function of the forward op's arguments that returns y, recorded where gradients are.

    Through the node's twin in torch.func, through no node where no gradient is recorded, else through the node. Not the
    twin for every call: PyTorch inspects its signature each time, and a node takes 2.8 times as long to make
    (`bench.choices`).
    """
    node = _node(operation)
    twin = _twin(operation, node)

    def call(inputs: tuple[Any, ...]) -> Tensor:
        y: Tensor
        if torch._C._are_functorch_transforms_active():
            y = _apply_transformed(twin, inputs)
        elif not torch.is_grad_enabled():
            y, _ = operation.forward(*inputs)
        else:
            y = node.apply(*inputs)
        return y

    return call


def _node(operation: Operation) -> type[torch.autograd.Function]:
    nothing = (None,) * (len(operation.operands) + len(CALL))
    once = _first_order_only(operation)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            y: Tensor
            y, xa = operation.forward(*inputs)
            _save(operation, ctx, inputs, xa)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
            if dy is None:
                return nothing
            flow, own_dtypes, rounded, scaling, dropout_p, backend = ctx.call
            found: tuple[Tensor, ...] = ()
            if flow.saved:
                run: Callable[..., tuple[Tensor, ...]] = once.apply if torch.is_grad_enabled() else operation.backward
                found = run(dy, *ctx.saved_tensors, scaling, dropout_p, *own_dtypes, flow.needs, backend)
            gradients = [*found, dy, None]
            for index, dtype in rounded:
                gradients[index] = found[index].to(dtype)
            return tuple([gradients[index] for index in flow.returned])

    # What a profiler shows, and grad_fn: PyTorch takes it when a class is made.
    return type(f"LoRA{operation.name.title().replace('_', '')}Function", (Node,), {})


def _save(operation: Operation, ctx: Any, inputs: tuple[Any, ...], xa: Tensor) -> None:
    flow = operation.flows[ctx.needs_input_grad]
    own, rounded = operation.own_dtypes, flow.rounded  # most often none: a comprehension is a call
    ctx.call = (
        flow,
        [inputs[place].dtype for place in own] if own else own,
        [(index, inputs[place].dtype) for index, place in rounded] if rounded else rounded,
        *inputs[-3:],
    )
    ctx.set_materialize_grads(False)
    if flow.saved:
        values = (*inputs, xa, None)
        ctx.save_for_backward(*[values[place] for place in flow.saved])


def _twin(operation: Operation, node: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """A node's twin for torch.func, which wants `setup_context`; xa is an output only so that it can be saved."""

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
            y, xa = operation.forward(*inputs)
            return y, xa

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.mark_non_differentiable(output[1])
            _save(operation, ctx, inputs, output[1])

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None, _d_xa: None) -> Any:
            return node.backward(ctx, dy)

    return Transformable


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


def _first_order_only(operation: Operation) -> type[torch.autograd.Function]:
    """The backward op as a node whose own backward is an error.

    With create_graph the gradients are handed out through it: calling the op directly would return gradients that are
    silently constant.
    """

    class FirstOrderOnly(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return tuple(operation.backward(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            """Nothing is saved: there is no second derivative to compute."""

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            raise UnsupportedError(
                f"lora_{operation.name} is differentiable once; a second derivative (create_graph=True and another "
                "backward) was asked of it. Use backend='reference', which is plain differentiable PyTorch."
            )

    return FirstOrderOnly
