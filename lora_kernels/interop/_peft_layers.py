"""PEFT's LoRA layers with another forward, and the rules that decide at each call what that forward does.

Importing this imports peft; `patch_peft` does so when it is called. The classes lie at module level under their PEFT
names, so that a patched model can be pickled and copied. The rules read the layer's state and keep none of their own: a
counter or a cached decision on the layer would make torch.compile trace again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear as StockAqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear as StockAwqLoraLinear
from peft.tuners.lora.te import TeLinear as StockTeLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear as StockTorchaoLoraLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from lora_kernels import validation
from lora_kernels.functional.branch import lora_branch
from lora_kernels.functional.linear import lora_linear
from lora_kernels.nn.sharding import dtensors, is_sharded
from lora_kernels.planning.tiles import MAX_RANK

LINEAR, BRANCH = "lora_linear", "lora_branch"

# Under torch.export and in shape inference, parameters are FakeTensors, which behave as plain ones.
_PLAIN: tuple[type, ...] = (Tensor, nn.Parameter, FakeTensor)

_OWN_FORWARD = "has a forward of its own"

# On a CPU, a call whose base product has fewer multiply-adds than this runs PEFT's forward: PyTorch's small operations
# then cost less than the Python of one of ours, and masks are drawn once instead of computed twice. By the bits of the
# dtype and whether x is dropped; python -m bench.peft_step prints the ratios on both sides.
SMALL_CALL = {(32, False): 1 << 26, (32, True): 1 << 28, (16, False): 1 << 22, (16, True): 1 << 24}
_LARGEST = sys.float_info.max
_SMALL_IN_ANY_CASE, _LARGE_IN_ANY_CASE = min(SMALL_CALL.values()), max(SMALL_CALL.values())


class FusedLayer:
    """Mixed into a LoRA layer class of PEFT: forward as one operation where that is possible, PEFT's where not."""

    _stock_class: ClassVar[Any]
    _base: ClassVar[str] = "base_layer"
    # Whether PEFT's forward gives the wider of the base's dtype and CUDA autocast's; else it gives the base's.
    _promotes: ClassVar[bool] = False

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward; adapter_names and other arguments are left to it."""
        if not isinstance(self, FusedLayer):
            # accelerate keeps a layer's bound forward: it may outlive the patch.
            return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        if not args and not kwargs and not is_small(self, x):
            adapter, _ = servable_adapter(self)
            if adapter is not None:
                operation, _ = operation_for(self, adapter, x)
                if operation is not None:
                    return self._fused_forward(x, adapter, operation)
        return self._stock_class.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]

    def _fused_forward(self: Any, x: Tensor, adapter: str, operation: str) -> Tensor:
        """What replaces PEFT's forward: the whole layer's output with this adapter, in one operation."""
        modules = self._modules
        base, linear_B = modules[self._base], modules["lora_B"]._modules[adapter]
        lora_A, lora_B = _tensor(modules["lora_A"]._modules[adapter], "weight"), _tensor(linear_B, "weight")
        scaling, dropout_p = self.scaling[adapter], _active_p(modules["lora_dropout"]._modules[adapter])
        if torch.compiler.is_compiling() and _is_symbol(scaling):
            lora_B, scaling = lora_B * scaling, 1.0
        lora_bias = _tensor(linear_B, "bias")
        term = None if lora_bias is None else self.scaling[adapter] * lora_bias
        if operation == BRANCH:
            base_out: Tensor = base(x)
            dtype = base_out.dtype
            if self._promotes and x.is_cuda and torch.is_autocast_enabled("cuda"):
                dtype = torch.promote_types(dtype, torch.get_autocast_dtype("cuda"))
                base_out = base_out.to(dtype)
            if term is not None:
                base_out = base_out + term
            return lora_branch(base_out, x, lora_A, lora_B, scaling=scaling, dropout_p=dropout_p).to(dtype)
        weight, bias = _tensor(base, "weight"), _tensor(base, "bias")
        if type(base) is Conv1D:
            weight = weight.T
        if term is not None:
            bias = term if bias is None else bias + term
        return lora_linear(x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p)


class Linear(FusedLayer, lora.Linear):  # type: ignore[misc]
    """peft.tuners.lora.Linear, over torch.nn.Linear and Transformers' Conv1D."""

    _stock_class = lora.Linear


class TorchaoLoraLinear(FusedLayer, StockTorchaoLoraLinear):  # type: ignore[misc]
    """peft.tuners.lora.torchao.TorchaoLoraLinear: its base is an nn.Linear whose weight is a tensor subclass."""

    _stock_class = StockTorchaoLoraLinear


class TeLinear(FusedLayer, StockTeLinear):  # type: ignore[misc]
    """peft.tuners.lora.te.TeLinear, over TransformerEngine's layers."""

    _stock_class = StockTeLinear


class GPTQLoraLinear(FusedLayer, lora.GPTQLoraLinear):  # type: ignore[misc]
    """peft.tuners.lora.gptq.GPTQLoraLinear."""

    _stock_class = lora.GPTQLoraLinear
    _base = "quant_linear_module"


class AwqLoraLinear(FusedLayer, StockAwqLoraLinear):  # type: ignore[misc]
    """peft.tuners.lora.awq.AwqLoraLinear."""

    _stock_class = StockAwqLoraLinear
    _base = "quant_linear_module"
    _promotes = True


class AqlmLoraLinear(FusedLayer, StockAqlmLoraLinear):  # type: ignore[misc]
    """peft.tuners.lora.aqlm.AqlmLoraLinear."""

    _stock_class = StockAqlmLoraLinear
    _promotes = True


FUSED: dict[type, type] = {
    fused._stock_class: fused
    for fused in (Linear, TorchaoLoraLinear, TeLinear, GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear)
}


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
    if "forward" in layer.__dict__:
        return None, f"the layer {_OWN_FORWARD}"
    # The units of fully_shard show DTensors between calls, and in a call what they have gathered.
    plain = (*_PLAIN, *dtensors()) if is_sharded(layer) else _PLAIN
    adapter, why = servable_adapter(layer, plain)
    return (None, why) if adapter is None else operation_for(layer, adapter, None, plain)


# What follows runs at each call. It reads _modules and _parameters, since a module finds its attributes only after a
# search that failed (`__getattr__`), and a call reads thirty of them.


def is_small(layer: Any, x: Tensor) -> bool:
    """Whether PEFT's forward is the faster one by the size of the call. A compiled call has no Python to save."""
    if torch.compiler.is_compiling() or not x.is_cpu:
        return False
    work: int = x.numel() * layer.out_features
    if not _SMALL_IN_ANY_CASE <= work < _LARGE_IN_ANY_CASE:
        return work < _SMALL_IN_ANY_CASE
    bits = 16 if x.dtype in validation.HALF or torch.is_autocast_enabled("cpu") else 32
    drops = layer.training and any(type(dropout) is nn.Dropout for dropout in layer.lora_dropout.values())
    return work < SMALL_CALL[bits, drops]


def servable_adapter(layer: Any, plain: tuple[type, ...] = _PLAIN) -> tuple[str | None, str]:
    """(name, "") of the one active adapter where its term is scaling * B(A(drop(x))); else (None, why not)."""
    if layer._disable_adapters:
        return None, "adapters are disabled"
    if layer.merged_adapters:
        return None, "the adapter is merged"
    modules = layer._modules
    of_A = modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in of_A]
    if len(names) != 1:
        return None, f"{len(names) or 'no'} adapters are active"
    name = names[0]
    if name in layer.lora_variant:
        return None, f"the adapter is a {type(layer.lora_variant[name]).__name__}"
    if _has_any_global_hook():
        return None, "torch has global module hooks"
    linear_A, linear_B = of_A[name], modules["lora_B"]._modules[name]
    for part, module in (("lora_A", linear_A), ("lora_B", linear_B)):
        if type(module) is not nn.Linear:
            return None, f"{part} is a {type(module).__name__}"
        if why := _own_call(module):
            return None, f"{part} {why}"
        if type(weight := _tensor(module, "weight")) not in plain:
            return None, f"{part} holds a {type(weight).__name__}"
    if _tensor(linear_A, "bias") is not None:
        return None, "lora_A has a bias"
    if _tensor(linear_A, "weight").shape[0] > MAX_RANK:
        return None, f"its rank is above {MAX_RANK}"
    dropout = modules["lora_dropout"]._modules[name]
    if type(dropout) is nn.Dropout:
        if dropout.inplace or dropout.p >= 1:
            return None, "its dropout works in place or drops everything"
    elif type(dropout) is not nn.Identity:
        return None, f"its dropout is a {type(dropout).__name__}"
    if why := _own_call(dropout):
        return None, f"its dropout {why}"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0 or not scaling.is_floating_point():
            return None, "its scaling is a tensor that is not one floating-point number"
    elif type(scaling) not in (float, int) or not -_LARGEST <= scaling <= _LARGEST:
        return None, "its scaling is not a finite number"
    return name, ""


def operation_for(
    layer: Any, adapter: str, x: Tensor | None, plain: tuple[type, ...] = _PLAIN
) -> tuple[str | None, str]:
    """(operation, why not lora_linear) for x; without x, for one in the weight's dtype."""
    modules = layer._modules
    base = modules[layer._base]
    lora_A, lora_B = (_tensor(modules[part]._modules[adapter], "weight") for part in ("lora_A", "lora_B"))
    why_not_linear = _own_base(base, plain)
    if x is None:
        x = lora_A if why_not_linear else _tensor(base, "weight")
    if type(x) not in plain:
        return None, f"x is a {type(x).__name__}"
    device, dtype, adapter_dtype = x.device, x.dtype, lora_A.dtype
    if x.is_meta or not device == lora_A.device == lora_B.device:
        return None, "x and the adapter are on several devices, or on meta"
    if lora_B.dtype != adapter_dtype:
        return None, "lora_A and lora_B are of two dtypes"
    autocast = torch.is_autocast_enabled(device.type) and dtype != torch.float64
    if autocast:
        if dtype not in validation.COMPUTED or adapter_dtype not in validation.COMPUTED:
            return None, f"autocast leaves one of {_name(dtype)} x and {_name(adapter_dtype)} adapter as it is"
    elif dtype not in (validation.LAYER_DTYPES if device.type == "cpu" else validation.COMPUTED):
        return None, f"x is {_name(dtype)}"
    elif adapter_dtype != dtype and (adapter_dtype != torch.float32 or not layer.cast_input_dtype_enabled):
        return None, f"x is {_name(dtype)}, the adapter {_name(adapter_dtype)}"
    if not why_not_linear:
        weight, bias = _tensor(base, "weight"), _tensor(base, "bias")
        base_dtype = weight.dtype
        if weight.device != device or (bias is not None and bias.dtype != base_dtype):
            why_not_linear = "the base layer is on another device, or of two dtypes"
        elif base_dtype not in validation.COMPUTED if autocast else base_dtype != dtype:
            why_not_linear = f"x is {_name(dtype)}, the base layer {_name(base_dtype)}"
    return (BRANCH, why_not_linear) if why_not_linear else (LINEAR, "")


def _own_base(base: nn.Module, plain: tuple[type, ...]) -> str:
    """Why the base layer is not x W^T + b of plain tensors, or ""."""
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {type(base).__name__}"
    if why := _own_call(base):
        return f"the base layer {why}"
    if type(weight := _tensor(base, "weight")) not in plain:
        return f"the base layer holds a {type(weight).__name__}"
    return ""


def _own_call(module: nn.Module) -> str:
    """What calling the module would do besides its class's forward, or ""."""
    if "forward" in module.__dict__:
        return _OWN_FORWARD
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return "has hooks"
    return ""


def _active_p(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def _is_symbol(scaling: Any) -> bool:
    """Whether torch.compile has seen this float change: a product keeps it a symbol, an op's argument would fix it."""
    if isinstance(scaling, Tensor):
        return False
    return not (statically_known_true(scaling == 0) or statically_known_true(scaling != 0))


def _tensor(module: nn.Module, name: str) -> Any:
    """module.weight or module.bias; FSDP keeps its views of a flat parameter outside _parameters."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
