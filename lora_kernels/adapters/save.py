"""`save_lora`: an adapter into PEFT's two files, both or neither."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lora_kernels.adapters import config as config_file, weights as weights_file
from lora_kernels.adapters.config import describe
from lora_kernels.adapters.ranks import in_parts, unanimous, writes
from lora_kernels.adapters.tree import adapter_names, lora_layers, lora_places, places
from lora_kernels.adapters.weights import PARTS, key_of, write_weights
from lora_kernels.errors import ArgumentError, DeviceError
from lora_kernels.nn.adapter import AdapterSettings
from lora_kernels.nn.sharding import check_not_gathered, reshard, whole


def save_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    base_model_name_or_path: str | os.PathLike[str] | None = None,
    task_type: str | None = None,
) -> None:
    """Writes an adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    The config describes the layers that have the adapter and no others; PEFT loads it with from_pretrained on the same
    base model. What is saved is the adapter, merged or not, active or not. Both files are written aside and put in
    place together: an interruption leaves the old pair, the new pair, or a directory that does not load; never one
    file of each.

    Of a model with sharded parameters, the ranks gather the adapter together and the first one writes it: all ranks of
    the default process group have to call this, it returns once the files are there, and an error on one rank is raised
    on all. (Ranks that name another directory, as pipeline stages may, have a first one of their own.) Under
    DistributedDataParallel every process has all of the adapter, and one of them has to call.

    Args:
        model: with LoRA layers; what the keys call its modules is what `named_modules` does, without the wrappers of
            torch.compile and torch.nn.parallel.
        directory: where to; made if need be, other files in it stay.
        adapter_name: which; None for the active one.
        base_model_name_or_path: what PEFT's AutoPeftModel is to load below it; None for what a transformers model
            says of itself.
        task_type: for the same, such as "CAUSAL_LM".

    Raises:
        ArgumentError: the model has no such adapter, or directory is a file.
        DeviceError: the adapter is on the meta device.
        UnsupportedError: the model is in FullyShardedDataParallel, or a part of a sharded model, gathered just now.

    Example:
        >>> import tempfile, torch
        >>> from lora_kernels import add_lora, load_lora, save_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128))
        >>> report = add_lora(model, r=4, target_modules=["0"])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_lora(model, directory)
        ...     report = load_lora(torch.nn.Sequential(torch.nn.Linear(64, 128)), directory)
    """
    name = _name_to_save(model, adapter_name)
    adapted: dict[str, AdapterSettings] = {}
    parameters: dict[str, Tensor] = {}
    transposed = []
    reshard(model)
    for place, layer in lora_places(model):
        if name in layer.adapters:
            if not place.name:
                raise ArgumentError(
                    "model must hold its LoRA layers under names, which become the file's keys; got a LoRALinear "
                    "itself. Put it into a module."
                )
            check_not_gathered(layer, "save_lora")
            adapted[place.name] = layer.settings_of(name)
            transposed.append(layer.fan_in_fan_out)
            for part, parameter in zip(PARTS, layer.parameters_of(name), strict=True):
                if parameter.is_meta:
                    raise DeviceError(f"{part} of {place.name!r} must hold data to be saved; got a meta tensor.")
                for alias in place.names:
                    parameters[key_of(alias, part)] = parameter.detach()
    if base_model_name_or_path is None:
        found = getattr(model, "name_or_path", None)
        base_model_name_or_path = found if isinstance(found, str) and found else None
    config = describe(
        places(model),
        adapted,
        fan_in_fan_out=all(transposed),
        base_model_name_or_path=None if base_model_name_or_path is None else os.fspath(base_model_name_or_path),
        task_type=task_type,
    )
    sharded = in_parts(model)
    # Copies: safetensors refuses one storage under two keys, which a module at two places has.
    tensors = {key: whole(parameter).to("cpu", copy=True).contiguous() for key, parameter in parameters.items()}
    first = writes(sharded, Path(directory))
    with unanimous(sharded):
        if first:
            _write_pair(Path(directory), json.dumps(config, indent=2, sort_keys=True), tensors)


def _name_to_save(model: nn.Module, adapter_name: str | None) -> str:
    layers = lora_layers(model)
    names = adapter_names(layers)
    if adapter_name is None:
        active = list(dict.fromkeys(layer.active_adapter for layer in layers if layer.active_adapter is not None))
        if len(active) != 1:
            raise ArgumentError(
                f"adapter_name must say which adapter to save unless one is active; got None, the active ones are "
                f"{active} of {names}. Name one, or call set_adapter."
            )
        return active[0]
    if adapter_name not in names:
        raise ArgumentError(f"adapter_name must be one of the model's adapters, {names}; got {adapter_name!r}.")
    return adapter_name


def _write_pair(directory: Path, config: str, tensors: Mapping[str, Tensor]) -> None:
    """Both files, or neither. A config is never beside weights of another save, whenever this is interrupted."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ArgumentError(f"directory must be a directory, or not exist yet; got the file {directory}.") from None
    aside = Path(tempfile.mkdtemp(prefix=".lora-", dir=directory))
    names = (config_file.NAME, weights_file.NAME)
    before = [name for name in names if os.path.lexists(directory / name)]
    try:
        write_weights(tensors, aside / weights_file.NAME)
        (aside / config_file.NAME).write_text(config, encoding="utf-8")
        for name in names:
            _to_disk(aside / name)
        # A directory without a config loads as nothing: it goes first and comes last. Links are replaced, not followed.
        for name in before:
            os.replace(directory / name, aside / f"{name}.old")
        for name in reversed(names):
            os.replace(aside / name, directory / name)
    except BaseException:
        # How far it came is read from the disk: an interruption may follow a rename before anything could note it.
        for name in reversed(names):
            if name not in before:
                (directory / name).unlink(missing_ok=True)
            elif os.path.lexists(aside / f"{name}.old"):
                os.replace(aside / f"{name}.old", directory / name)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Before a rename makes a file visible, its bytes are on the disk: a power cut leaves no empty file behind."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
