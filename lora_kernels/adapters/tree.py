"""The modules of a model under the names that a user, and an adapter file, call them by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lora_kernels.errors import ArgumentError
from lora_kernels.nn import LoRALinear

# What torch.compile, FSDP and activation checkpointing put between a module and its child: no part of a name.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True)
class Place:
    """A module, and where in the model it is used."""

    module: nn.Module
    names: tuple[str, ...]
    parents: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """The first of its names: the one that `named_modules` gives it."""
        return self.names[0]


def places(model: nn.Module) -> list[Place]:
    """Every module below the model, each once, in the order of `named_modules`; not what is inside a LoRALinear."""
    found: dict[int, tuple[nn.Module, list[str], list[nn.Module]]] = {}
    for name, module, parent in _walk(model, "", frozenset()):
        _, names, parents = found.setdefault(id(module), (module, [], []))
        if name not in names:
            names.append(name)
            parents.append(parent)
    return [Place(module, tuple(names), tuple(parents)) for module, names, parents in found.values()]


def _walk(module: nn.Module, prefix: str, above: frozenset[int]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    if isinstance(module, LoRALinear):
        return
    above |= {id(module)}
    parallel = isinstance(module, (DataParallel, DistributedDataParallel))
    for key, child in module._modules.items():
        if child is None or id(child) in above:
            continue
        if key in _WRAPPERS or (parallel and key == "module"):
            yield from _walk(child, prefix, above)
        else:
            yield prefix + key, child, module
            yield from _walk(child, f"{prefix}{key}.", above)


def lora_places(model: nn.Module) -> list[tuple[Place, LoRALinear]]:
    """The LoRALinear layers of a model; the model itself may be one."""
    if isinstance(model, LoRALinear):
        return [(Place(model, ("",), ()), model)]
    return [(place, place.module) for place in places(model) if isinstance(place.module, LoRALinear)]


def lora_layers(model: nn.Module) -> list[LoRALinear]:
    """The LoRALinear layers of a model, of which there is at least one.

    Raises:
        ArgumentError: there is none.
    """
    layers = [layer for _, layer in lora_places(model)]
    if not layers:
        raise ArgumentError(
            f"model must have LoRA layers of this package; got {type(model).__name__} without any. Call add_lora or "
            "load_lora first."
        )
    return layers


def adapter_names(layers: list[LoRALinear]) -> list[str]:
    """The adapters that at least one of the layers has, in the order in which they are met."""
    return list(dict.fromkeys(name for layer in layers for name in layer.adapters))
