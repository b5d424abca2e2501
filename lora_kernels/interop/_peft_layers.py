"""PEFT's LoRA layers with another forward, and the rules that decide at each call what that forward does.

Importing this imports peft; `patch_peft` does so when it is called. The classes lie at module level under their PEFT
names, so that a patched model can be pickled and copied. The rules read the layer's state and keep none of their own: a
counter or a cached decision on the layer would make torch.compile trace again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from lora_kernels.functional import _checks
from lora_kernels.functional.linear import lora_linear
from lora_kernels.planning.tiles import MAX_RANK

LINEAR = "lora_linear"

# Under torch.export and in shape inference, parameters are FakeTensors, which behave as plain ones.
_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_HALF_OR_SINGLE = _checks.COMPUTED


class FusedLayer:
    """Mixed into a LoRA layer class of PEFT: forward as one operation where that is possible, PEFT's where not."""

    _stock_class: ClassVar[Any]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward; adapter_names and other arguments are left to it."""
        # accelerate keeps a layer's bound forward: it may outlive the patch.
        stock = self._stock_class if isinstance(self, FusedLayer) else type(self)
        if not args and not kwargs:
            adapter, _ = servable_adapter(self)
            if adapter is not None:
                operation, _ = operation_for(self, adapter, x)
                if operation is not None:
                    return self._fused_forward(x, adapter, operation)  # type: ignore[no-any-return]
        return stock.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]

    def _fused_forward(self: Any, x: Tensor, adapter: str, operation: str) -> Tensor:
        """What replaces PEFT's forward: the whole layer's output with `adapter`, in one operation."""
        lora_A, lora_B, dropout = self.lora_A[adapter], self.lora_B[adapter], self.lora_dropout[adapter]
        base, scaling = self.base_layer, self.scaling[adapter]
        weight, bias = base.weight.T if type(base) is Conv1D else base.weight, base.bias
        if lora_B.bias is not None:
            term = scaling * lora_B.bias
            bias = term if bias is None else bias + term
        return lora_linear(x, weight, lora_A.weight, lora_B.weight, bias, scaling=scaling, dropout_p=_active_p(dropout))


class Linear(FusedLayer, lora.Linear):  # type: ignore[misc]
    """peft.tuners.lora.Linear, over torch.nn.Linear and Transformers' Conv1D."""

    _stock_class = lora.Linear


def fused_class(stock: type) -> type | None:
    """Our class for one of PEFT's; None for every other."""
    return Linear if stock is lora.Linear else None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """(name, LoRA layer, the name of a lora.MultiheadAttention that it lies in or "") throughout the model."""
    attention = ""
    for name, module in model.named_modules():
        if isinstance(module, lora.LoraLayer):
            within = attention if attention and name.startswith(attention + ".") else ""
            if isinstance(module, lora.layer.MultiheadAttention):
                attention = name
            yield name, module, within


def outlook(layer: Any, within: str) -> tuple[str | None, str]:
    """(operation, why not lora_linear) for the layer's next call, with x in the weight's dtype."""
    if not issubclass(type(layer), FusedLayer):
        return None, f"lora.{type(layer).__name__} is not a layer that can be fused"
    if within:
        return None, f"{within} merges its weight and does not call it"
    if why := _own_call(layer):
        return None, f"the layer {why}"
    adapter, why = servable_adapter(layer)
    return (None, why) if adapter is None else operation_for(layer, adapter, None)


def servable_adapter(layer: Any) -> tuple[str | None, str]:
    """(name, "") of the one active adapter, where its term is scaling * B(A(drop(x))); else (None, why not)."""
    if layer._disable_adapters:
        return None, "adapters are disabled"
    if layer.merged_adapters:
        return None, "the adapter is merged"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return None, f"{len(names) or 'no'} adapters are active"
    name = names[0]
    if name in layer.lora_variant:
        return None, f"the adapter is a {type(layer.lora_variant[name]).__name__}"
    if _has_any_global_hook():
        return None, "torch has global module hooks"
    lora_A, lora_B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    for part, module in (("lora_A", lora_A), ("lora_B", lora_B)):
        if type(module) is not nn.Linear:
            return None, f"{part} is a {type(module).__name__}"
        if why := _own_call(module):
            return None, f"{part} {why}"
        if type(module.weight) not in _PLAIN:
            return None, f"{part} holds a {type(module.weight).__name__}"
    if lora_A.bias is not None:
        return None, "lora_A has a bias"
    if lora_A.weight.shape[0] > MAX_RANK:
        return None, f"its rank is above {MAX_RANK}"
    if type(dropout) is nn.Dropout:
        if dropout.inplace or dropout.p >= 1:
            return None, "its dropout works in place or drops everything"
    elif type(dropout) is not nn.Identity:
        return None, f"its dropout is a {type(dropout).__name__}"
    if why := _own_call(dropout):
        return None, f"its dropout {why}"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor) and (scaling.dim() != 0 or scaling.requires_grad):
        return None, "its scaling is trained, or more than one number"
    return name, ""


def operation_for(layer: Any, adapter: str, x: Tensor | None) -> tuple[str | None, str]:
    """(operation, why not lora_linear) for x; without x, for one in the weight's dtype."""
    base = layer.base_layer
    if why := _base_obstacle(base):
        return None, why
    weight, bias = base.weight, base.bias
    lora_A, lora_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    x = weight if x is None else x
    if type(x) not in _PLAIN:
        return None, f"x is a {type(x).__name__}"
    if x.is_meta or not x.device == weight.device == lora_A.device == lora_B.device:
        return None, "its tensors are on several devices, or on meta"
    if why := _dtype_obstacle(layer, x, weight, bias, lora_A, lora_B):
        return None, why
    return LINEAR, ""


def _base_obstacle(base: Any) -> str:
    """Why the base layer is not x W^T + b of plain tensors, or ""."""
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {type(base).__name__}"
    if why := _own_call(base):
        return f"the base layer {why}"
    if type(base.weight) not in _PLAIN:
        return f"the base layer holds a {type(base.weight).__name__}"
    if base.bias is not None and type(base.bias) not in _PLAIN:
        return f"the base layer holds a {type(base.bias).__name__}"
    return ""


def _dtype_obstacle(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> str:
    """Why lora_linear does not take these dtypes as PEFT does, or ""."""
    device_type, dtype = x.device.type, x.dtype
    autocast = torch.is_autocast_enabled(device_type) and dtype != torch.float64
    if lora_A.dtype != lora_B.dtype:
        return f"lora_A is {_name(lora_A)} and lora_B {_name(lora_B)}"
    if autocast:
        if not (
            dtype in _HALF_OR_SINGLE
            and weight.dtype in _HALF_OR_SINGLE
            and lora_A.dtype in _HALF_OR_SINGLE
            and (bias is None or bias.dtype in _HALF_OR_SINGLE)
        ):
            return f"{_name(x)} x, {_name(weight)} weight and {_name(lora_A)} adapters under autocast"
        return ""
    if dtype not in (_checks.LAYER_DTYPES if device_type == "cpu" else _HALF_OR_SINGLE):
        return f"x is {_name(x)}"
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return f"x is {_name(x)} and the base layer {_name(weight)}"
    if lora_A.dtype not in (dtype, torch.float32):
        return f"x is {_name(x)} and the adapter {_name(lora_A)}"
    if lora_A.dtype != dtype and not layer.cast_input_dtype_enabled:
        return f"casting x from {_name(x)} to the adapter's {_name(lora_A)} is switched off"
    return ""


def _own_call(module: nn.Module) -> str:
    """What calling the module would do besides its class's forward, or ""."""
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return "has hooks"
    return ""


def _active_p(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
