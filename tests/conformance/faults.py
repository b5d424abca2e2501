"""Ways to break the fused operation that PEFT's tests do not notice, to show that the comparison does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

from lora_kernels import ops
from lora_kernels.interop import _peft_layers


def _with_backward(change: Callable[[dict[str, Tensor], tuple[Any, ...]], None]) -> AbstractContextManager[Any]:
    """The registered backward, with its gradients changed by name."""
    backward = ops.LINEAR.backward

    def faulty(*args: Any) -> tuple[Tensor, ...]:
        gradients = dict(zip(("x", "weight", "lora_A", "lora_B", "bias"), backward(*args), strict=True))
        change(gradients, args)
        return tuple(gradients.values())

    return mock.patch.object(ops.LINEAR, "backward", faulty)


def twice_d_lora_A() -> AbstractContextManager[Any]:
    """dA comes out twice as large."""

    def change(gradients: dict[str, Tensor], args: tuple[Any, ...]) -> None:
        gradients["lora_A"] = 2 * gradients["lora_A"]

    return _with_backward(change)


def d_x_of_the_base_alone() -> AbstractContextManager[Any]:
    """dx lacks the LoRA term."""

    def change(gradients: dict[str, Tensor], args: tuple[Any, ...]) -> None:
        dy, _, weight = args[:3]
        if gradients["x"].numel():
            gradients["x"] = dy @ weight

    return _with_backward(change)


def no_dropout() -> AbstractContextManager[Any]:
    """The adapter's dropout is left out."""
    return mock.patch.object(_peft_layers, "_active_p", return_value=0.0)


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "twice-d-lora-A": twice_d_lora_A,
    "d-x-of-the-base-alone": d_x_of_the_base_alone,
    "no-dropout": no_dropout,
}
