"""A plain linear of a model turns into a LoRALinear in place, and back.

The module stays the same object, so everybody who holds it sees the change: a second place in the model, forward hooks
and their handles, a list in somebody's closure, the weight it shares with an embedding. A subclass of nn.Linear keeps
its methods beside LoRALinear's.
"""

from __future__ import annotations

import sys
from typing import Any, cast
from weakref import WeakValueDictionary

from torch import nn

from lora_kernels.nn import adapter
from lora_kernels.nn.adapter import child_name, merge_again, names_of, own_names
from lora_kernels.nn.linear import NUMBERS, LoRALinear


class LoRAConv1D(LoRALinear):
    """LoRA over the linear layer that GPT-2 keeps transposed, with a weight [K, N]."""

    fan_in_fan_out = True


# Attributes of a LoRALinear that a linear must not have already, in its class or itself.
_TAKEN = (names_of(LoRALinear) | {*NUMBERS, "mesh", "unmerged_weight"}) - names_of(nn.Linear)


def is_conv1d(module: object) -> bool:
    """Whether it is transformers' Conv1D, the linear of GPT-2, whose weight is [in, out]."""
    # A model made of it exists only where its module has been imported; here nothing is.
    found = sys.modules.get("transformers.pytorch_utils")
    return found is not None and type(module) is found.Conv1D


def is_linear(module: object) -> bool:
    """Whether PEFT counts it among the linears of a model."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def obstacle(module: Any) -> str | None:
    """Why a module cannot be adopted; None if it can."""
    conv1d = is_conv1d(module)
    found = adapter.weight_obstacle(module, (module.nx, module.nf)) if conv1d else adapter.obstacle(module)
    if found is not None:
        return found
    name = type(module).__name__
    if "forward" in vars(module):
        return f"{name} whose forward was replaced, as offloading does"
    if type(module.weight) is not nn.Parameter:
        return f"{name} whose weight is a {type(module.weight).__name__}"
    has = own_names(type(module)).union(vars(module), module._parameters, module._buffers, module._modules)
    taken = sorted(name for name in has if name in _TAKEN or name.startswith(child_name("")))
    return f"{name}, which has a {', '.join(taken[:3])} that LoRALinear needs" if taken else None


def features(module: Any) -> tuple[int, int]:
    """in_features and out_features of a LoRALinear, or of a module for which `obstacle` found nothing."""
    return (module.nx, module.nf) if is_conv1d(module) else (module.in_features, module.out_features)


def adopted_class(lora: type[LoRALinear], plain: type[nn.Module]) -> type[LoRALinear]:
    """The class of a layer that was a `plain`: `lora`; for a subclass of nn.Linear, one with its methods behind lora's.

    What LoRALinear passes on to nn.Linear by super(), as in reset_parameters, goes through that subclass then.
    """
    if plain is nn.Linear or not issubclass(plain, nn.Linear):
        return lora
    both = _BOTH.get((lora, plain))
    if both is None:
        members = {
            "__module__": plain.__module__, "__reduce_ex__": _reduce, "_made_of": (lora, plain), "_plain_class": plain,
        }  # fmt: skip
        both = _BOTH.setdefault((lora, plain), type(f"LoRA{plain.__name__}", (lora, plain), members))
    return both


_BOTH: WeakValueDictionary[tuple[type[LoRALinear], type[nn.Module]], type[LoRALinear]] = WeakValueDictionary()


def _reduce(layer: Any, protocol: Any) -> Any:
    """For pickle and copy, which find a class by its name: that of a layer with two classes cannot be imported."""
    found = object.__reduce_ex__(layer, protocol)
    # fully_shard and parametrizations put classes of theirs on top, and say themselves what of them is copied.
    return (_empty, layer._made_of, *found[2:]) if "_made_of" in vars(type(layer)) else found


def _empty(lora: type[LoRALinear], plain: type[nn.Module]) -> LoRALinear:
    both = adopted_class(lora, plain)
    return both.__new__(both)


def adopt(linear: nn.Module) -> LoRALinear:
    """Turns a linear for which `obstacle` found nothing into a LoRALinear that has no adapter yet."""
    conv1d, plain = is_conv1d(linear), type(linear)
    linear.__dict__["_plain_class"] = plain
    linear.__class__ = adopted_class(LoRAConv1D if conv1d else LoRALinear, plain)
    layer = cast(LoRALinear, linear)
    if conv1d:
        layer.in_features, layer.out_features = layer.weight.shape
    layer._start()
    return layer


def release(layer: LoRALinear) -> None:
    """Turns a LoRALinear into the linear it was: without adapters, with the sum as its weight if it is merged."""
    if layer.merged:
        del layer._parameters["unmerged_weight"]
        layer._merged = False
    for adapter_name in layer.adapters:
        layer.delete_adapter(adapter_name)
    hooks = layer._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is merge_again]:
        del hooks[key]
    plain = layer._plain_class
    if layer.fan_in_fan_out:
        del layer.in_features, layer.out_features
    for name in ("active_adapter", "_named", "_settings", "_merged", "_plain_class", "batch_shard", "mesh", *NUMBERS):
        layer.__dict__.pop(name, None)
    cast(Any, layer).__class__ = plain
