"""Which adapter a model computes with, and whether it is added into the weights."""

from __future__ import annotations

from torch import nn

from lora_kernels.adapters.inject import check_not_wrapped, restore_fast_paths
from lora_kernels.adapters.tree import adapter_names, lora_layers, lora_places
from lora_kernels.errors import ArgumentError
from lora_kernels.nn import LoRALinear
from lora_kernels.nn.adopt import release
from lora_kernels.nn.sharding import ADD_FIRST, MERGE_ELSEWHERE, check_not_sharded, reshard


def set_adapter(model: nn.Module, adapter_name: str | None) -> None:
    """Makes an adapter the active one everywhere in a model; nothing is loaded, and the base is not touched.

    Layers that lack this adapter compute their base, and so do all of them with None. The adapter that was active
    requires no gradient while it waits; what it required before comes back with it. Every parameter stays the same
    object under the same name, so optimisers and state_dicts see no change. A merged model is merged anew with the
    adapter; with None it is unmerged.

    A compiled model is not compiled again for an adapter of the same shapes, with one exception: "default" on one hand
    and all other adapters on the other have a graph each.

    Args:
        model: with LoRA layers.
        adapter_name: one of its adapters, or None.

    Raises:
        ArgumentError: the model has no adapter of this name, or no LoRA layers; or it is wrapped in
            DistributedDataParallel, which would not synchronise an adapter that waited when it was wrapped.
        UnsupportedError: the model is merged and sharded; or it is a part of a sharded model, gathered just now.

    Example:
        >>> import torch
        >>> from lora_kernels import add_lora, set_adapter
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> for name, r in (("english", 2), ("french", 4)):
        ...     report = add_lora(model, r=r, target_modules=["0"], adapter_name=name)
        >>> set_adapter(model, "english")
        >>> model[0].lora_A.shape
        torch.Size([2, 8])
    """
    layers = lora_layers(model)
    if adapter_name is not None:
        _check_has(layers, adapter_name)
        check_not_wrapped(model, [layer for layer in layers if adapter_name in layer.adapters], adapter_name)
    merged = any(layer.merged for layer in layers)
    if merged:
        check_layers_not_sharded(model, "set_adapter of a merged model", MERGE_ELSEWHERE)
    reshard(model)  # what a gathered copy requires, FSDP would forget
    for layer in layers:
        layer.set_adapter(adapter_name if adapter_name in layer.adapters else None)
    # Layers that had no adapter until now were not merged and would not be.
    if merged and adapter_name is not None:
        merge_lora(model)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Removes an adapter from a model; if it was the active one, none is active then.

    Args:
        model: with LoRA layers.
        adapter_name: one of its adapters.

    Raises:
        ArgumentError: the model has no adapter of this name, or no LoRA layers.
        UnsupportedError: the model is sharded by FSDP, which would put the parameters back.
    """
    layers = lora_layers(model)
    _check_has(layers, adapter_name)
    check_layers_not_sharded(model, "delete_adapter", ADD_FIRST)
    for layer in layers:
        if adapter_name in layer.adapters:
            layer.delete_adapter(adapter_name)


def merge_lora(model: nn.Module) -> None:
    """Adds the active adapter into the weights, in fp32 and rounded once: a plain linear's speed from then on.

    The base weights are kept aside, so that `unmerge_lora` restores them to the bit; that costs their size in memory.
    Layers that are merged already stay so. A merged layer gives its adapter no gradient; `state_dict` and `save_lora`
    see base and adapter, never the sum.

    Args:
        model: with LoRA layers, and an active adapter.

    Raises:
        ArgumentError: the model has no LoRA layers, or no adapter is active.
        DeviceError: a weight is on the meta device.
        UnsupportedError: the model is sharded by FSDP, which would put the base weights back at the next forward.
            After any error no layer is merged that was not before.

    Example:
        >>> import torch
        >>> from lora_kernels import add_lora, merge_lora, unmerge_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = add_lora(model, target_modules=["0"])
        >>> merge_lora(model)
        >>> model[0].merged
        True
        >>> unmerge_lora(model)
    """
    layers = lora_layers(model)
    if all(layer.active_adapter is None for layer in layers):
        raise ArgumentError(
            f"model must have an active adapter to merge; got one with {adapter_names(layers)}, none of them active. "
            "Call set_adapter first."
        )
    check_layers_not_sharded(model, "merge_lora", MERGE_ELSEWHERE)
    fresh = [layer for layer in layers if not layer.merged]
    try:
        for layer in fresh:
            layer.merge()
    except BaseException:
        for layer in fresh:
            layer.unmerge()
        raise


def unmerge_lora(model: nn.Module) -> None:
    """Puts the base weights back, the same tensors as before `merge_lora`; no-op for layers that are not merged.

    Args:
        model: with LoRA layers.

    Raises:
        ArgumentError: the model has no LoRA layers.
        UnsupportedError: the model was merged and then sharded by FSDP.
    """
    layers = lora_layers(model)
    if any(layer.merged for layer in layers):
        check_layers_not_sharded(model, "unmerge_lora", MERGE_ELSEWHERE)
    for layer in layers:
        layer.unmerge()


def unload_lora(model: nn.Module) -> None:
    """Turns the LoRA layers back into the plain linears they were, in place, and drops all adapters.

    A merged layer keeps the sum as its weight, another its base weight: `merge_lora` and then `unload_lora` make a
    model that needs this package no more. Parameters stay frozen.

    Args:
        model: with LoRA layers below it.

    Raises:
        ArgumentError: the model has no LoRA layers.
        UnsupportedError: the model is sharded by FSDP, which would put the adapters back.

    Example:
        >>> import torch
        >>> from lora_kernels import add_lora, merge_lora, unload_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = add_lora(model, target_modules=["0"])
        >>> merge_lora(model)
        >>> unload_lora(model)
        >>> model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    layers = lora_layers(model)
    check_layers_not_sharded(model, "unload_lora", MERGE_ELSEWHERE)
    restore_fast_paths(model, layers)
    for layer in layers:
        release(layer)


def check_layers_not_sharded(model: nn.Module, call: str, remedy: str) -> None:
    """FSDP holds the parameters of no LoRA layer.

    Raises:
        UnsupportedError: naming the first whose parameters it holds.
    """
    for place, layer in lora_places(model):
        check_not_sharded(layer, call, remedy, place.name)


def _check_has(layers: list[LoRALinear], adapter_name: str) -> None:
    names = adapter_names(layers)
    if adapter_name not in names:
        raise ArgumentError(f"adapter_name must be one of the model's adapters, {names}; got {adapter_name!r}.")
