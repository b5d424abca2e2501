"""`load_lora`: an adapter from PEFT's two files into a model, all of it or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels.adapters import config as config_file
from lora_kernels.adapters.config import LoRAConfig, read_config
from lora_kernels.adapters.inject import (
    NewAdapter,
    attach,
    base_weight,
    check_adaptable,
    check_model,
    check_not_wrapped,
    resolve_for,
)
from lora_kernels.adapters.ranks import in_parts, unanimous
from lora_kernels.adapters.report import AdapterReport, report_on
from lora_kernels.adapters.switch import check_layers_not_sharded, merge_lora, set_adapter
from lora_kernels.adapters.tree import Place, lora_places, places
from lora_kernels.adapters.weights import PARTS, WeightsFile, check_present, key_of, open_weights
from lora_kernels.errors import AdapterFileError, DeviceError
from lora_kernels.nn import LoRALinear
from lora_kernels.nn.adapter import AdapterSettings, check_adapter_name
from lora_kernels.nn.adopt import features
from lora_kernels.nn.sharding import MERGE_ELSEWHERE, reshard


@dataclass(frozen=True)
class _Stored:
    """One module's share of a file."""

    place: Place
    settings: AdapterSettings
    keys: Mapping[str, Sequence[str]]  # lora_A and lora_B, under each of the names that the file calls the module by


def load_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> AdapterReport:
    """Loads an adapter that `save_lora` or PEFT has written, and makes it the active one.

    Where the model has an adapter of this name, its parameters are written in place, so optimisers keep theirs, and a
    compiled model is not compiled again; modules and ranks must be those of the file, alpha and scaling become the
    file's. Otherwise the adapter is added as `add_lora` would add it, with the config's dropout; a model that had none
    is frozen. A merged model is merged with what was loaded.

    Into a model with sharded parameters, all ranks of the default process group have to call this; each of them reads
    the files, and an error on one rank is raised on all, before anything is written. Under FSDP the model must have an
    adapter of this name; under tensor parallel a new one is sharded as the layer is.

    Args:
        model: the base model the adapter was trained on, with or without LoRA layers.
        directory: with adapter_config.json and adapter_model.safetensors.
        adapter_name: what the adapter is called in the model; names in the file do not matter.
        adapter_dtype: of new parameters; None for the file's, where the layer can compute in it, else float32.
        backend: of new layers, as for `lora_linear`.

    Returns:
        As `add_lora` does.

    Raises:
        AdapterFileError: the files are missing, damaged, of another method or another model, or do not fit; it names
            file, key, what was expected and what was found.
        ArgumentError, UnsupportedError: as for `add_lora`. After any error the model is as it was.

    Example:
        >>> import tempfile, torch
        >>> from lora_kernels import add_lora, load_lora, save_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128))
        >>> report = add_lora(model, r=4, target_modules=["0"])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_lora(model, directory)
        ...     report = load_lora(torch.nn.Sequential(torch.nn.Linear(64, 128)), directory)
        >>> report.modules[0].r
        4
    """
    check_adapter_name(adapter_name)
    modules = places(model)
    layers = lora_places(model)
    owners = {place.name: layer for place, layer in layers if adapter_name in layer.adapters}
    merged = any(layer.merged for _, layer in layers)
    if merged:
        check_layers_not_sharded(model, "load_lora into a merged model", MERGE_ELSEWHERE)
    if owners:
        reshard(model)
    with unanimous(in_parts(model)), _opened(Path(directory)) as (config_path, config, weights):
        stored = _stored(modules, config, weights, backend)
        if owners:
            check_not_wrapped(model, list(owners.values()), adapter_name)
            _check_same_modules(owners, stored, weights, f"the model's adapter {adapter_name!r} has")
            tensors = [_for_layer(owners[one.place.name], one, weights, adapter_name) for one in stored]
        else:
            if config.targets is not None:
                chosen = {place.name: place for place in config.targets.choose(model, modules)}
                _check_same_modules(chosen, stored, weights, f"{config_path.name} chooses")
            check_model(model, modules)
            check_adaptable([one.place for one in stored])
            made = [_new(one, weights, adapter_dtype) for one in stored]
    # From here on nothing in the file can be wrong.
    if owners:
        for one, pair in zip(stored, tensors, strict=True):
            owners[one.place.name].load_adapter(adapter_name, one.settings, *pair)
    else:
        attach(model, adapter_name, made)
    set_adapter(model, adapter_name)
    if merged:
        merge_lora(model)
    return report_on(model, adapter_name)


@contextmanager
def _opened(directory: Path) -> Iterator[tuple[Path, LoRAConfig, WeightsFile]]:
    """Both files of an adapter."""
    config_path, weights_path = check_present(directory, config_file.NAME)
    config = read_config(config_path)
    with open_weights(weights_path) as weights:
        yield config_path, config, weights


def _stored(modules: Sequence[Place], config: LoRAConfig, weights: WeightsFile, backend: str) -> list[_Stored]:
    """What the file holds, by module of the model; shapes are those that the config and the modules say."""
    by_name = {name: place for place in modules for name in place.names}
    keys: dict[str, dict[str, list[str]]] = {}
    for name, pair in weights.modules(by_name).items():
        found = keys.setdefault(by_name[name].name, {part: [] for part in PARTS})
        for part in PARTS:
            found[part].append(pair[part])
    stored = []
    for place in modules:
        parts = keys.get(place.name)
        if parts is None:
            continue
        check_adaptable([place])
        settings = config.settings(place.name, backend)
        k, n = features(place.module)
        for part, shape in zip(PARTS, ((settings.r, k), (n, settings.r)), strict=True):
            for key in parts[part]:
                weights.check_shape(
                    key, shape, f"from r = {settings.r} in {config_file.NAME} and the module's features"
                )
        stored.append(_Stored(place, settings, parts))
    return stored


def _check_same_modules(
    expected: Mapping[str, object], stored: Sequence[_Stored], weights: WeightsFile, who: str
) -> None:
    """The file holds an adapter for each expected module and for no other.

    Raises:
        AdapterFileError: a key is missing, or one too many.
    """
    found = {one.place.name: one for one in stored}
    for name in expected:
        if name not in found:
            raise AdapterFileError(
                f"{weights.path}: key {key_of(name, PARTS[0])!r} is missing; expected lora_A and lora_B of all "
                f"{len(expected)} modules that {who}; found {len(found)}."
            )
    for name, one in found.items():
        if name not in expected:
            raise AdapterFileError(
                f"{weights.path}: unknown key {one.keys[PARTS[0]][0]!r}; expected only the {len(expected)} modules "
                f"that {who}; found {len(found)}."
            )


def _read(one: _Stored, weights: WeightsFile, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """lora_A and lora_B; a module at several places has the same under each of its names."""
    if device.type == "meta":
        raise DeviceError(
            f"weight of {one.place.name!r} must hold data before an adapter is loaded; got a meta tensor. Materialise "
            "the model first."
        )
    pair = []
    for part in PARTS:
        first, *others = (weights.read(key, dtype, device) for key in one.keys[part])
        for key, other in zip(one.keys[part][1:], others, strict=True):
            if not torch.equal(first, other):
                raise AdapterFileError(
                    f"{weights.path}: {key!r} must equal {one.keys[part][0]!r}, since the model has one module at both "
                    "places; found other values."
                )
        pair.append(first)
    return pair


def _for_layer(layer: LoRALinear, one: _Stored, weights: WeightsFile, adapter_name: str) -> list[Tensor]:
    """The tensors for an adapter that the layer has."""
    lora_A, _ = layer.parameters_of(adapter_name)
    if lora_A.shape[0] != one.settings.r:
        raise AdapterFileError(
            f"{weights.path}: {one.keys[PARTS[0]][0]!r} must be {list(lora_A.shape)}, since the model's adapter "
            f"{adapter_name!r} has rank {lora_A.shape[0]} there; found rank {one.settings.r}. Load it under another "
            "adapter_name, or call delete_adapter first."
        )
    return _read(one, weights, lora_A.dtype, lora_A.device)


def _new(one: _Stored, weights: WeightsFile, adapter_dtype: torch.dtype | None) -> NewAdapter:
    """A new adapter with the file's tensors."""
    weight = base_weight(one.place)
    if adapter_dtype is None:
        stored = {weights.dtypes[key] for part in PARTS for key in one.keys[part]}
        adapter_dtype = weight.dtype if stored == {weight.dtype} or weight.dtype == torch.float64 else torch.float32
    dtype = resolve_for(one.place, adapter_dtype)
    lora_A, lora_B = (nn.Parameter(tensor) for tensor in _read(one, weights, dtype, weight.device))
    return NewAdapter(one.place, one.settings, lora_A, lora_B)
