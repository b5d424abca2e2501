"""`adapter_model.safetensors`: PEFT's keys and tensors, read with every check that the file itself allows."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import AdapterFileError

NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
PARTS = ("lora_A", "lora_B")

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def key_of(module_name: str, part: str) -> str:
    """PEFT's key for lora_A or lora_B of a module."""
    return f"{PREFIX}{module_name}.{part}.weight"


class WeightsFile:
    """An open file: shapes and dtypes at once, tensors when they are asked for."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path, self._handle = path, handle
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key in handle.keys():  # noqa: SIM118 - a safe_open is no dict, and cannot be iterated
            found = handle.get_slice(key)
            if found.get_dtype() not in _DTYPES:
                raise AdapterFileError(
                    f"{path}: {key!r} must be one of {', '.join(_DTYPES)}; found {found.get_dtype()}. Convert it."
                )
            self.shapes[key] = tuple(found.get_shape())
            self.dtypes[key] = _DTYPES[found.get_dtype()]

    def modules(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """Module name → part → key, for every key; each is lora_A or lora_B of a module that the model has.

        Raises:
            AdapterFileError: a key is none of these, or one of a pair is missing.
        """
        found: dict[str, dict[str, str]] = {}
        for key in self.shapes:
            module, part = self._parse(key)
            if module not in names:
                near = difflib.get_close_matches(module, names, n=3)
                hint = f" Near names: {', '.join(map(repr, near))}." if near else ""
                raise AdapterFileError(
                    f"{self.path}: key {_short(key)} must belong to a module of the model; found none called "
                    f"{_short(module)}.{hint} Was the adapter trained on another model?"
                )
            found.setdefault(module, {})[part] = key
        if not found:
            raise AdapterFileError(f"{self.path}: expected lora_A and lora_B of at least one module; found no keys.")
        for module, keys in found.items():
            for part in PARTS:
                if part not in keys:
                    raise self.missing(module, part)
        return found

    def _parse(self, key: str) -> tuple[str, str]:
        for part in PARTS:
            suffix = f".{part}.weight"
            if key.startswith(PREFIX) and key.endswith(suffix) and len(key) > len(PREFIX) + len(suffix):
                return key[len(PREFIX) : -len(suffix)], part
        raise AdapterFileError(
            f"{self.path}: unknown key {_short(key)}; expected only {PREFIX}<module>.lora_A.weight and "
            f"{PREFIX}<module>.lora_B.weight. Embedding and convolution adapters, trained biases and modules saved "
            "whole are not supported."
        )

    def missing(self, module: str, part: str) -> AdapterFileError:
        """The error that a key is not there."""
        return AdapterFileError(
            f"{self.path}: key {key_of(module, part)!r} is missing; expected lora_A and lora_B of every module that "
            f"the adapter is for; found {len(self.shapes)} other keys."
        )

    def check_shape(self, key: str, expected: tuple[int, int], why: str) -> None:
        """The shape that the model and the config say.

        Raises:
            AdapterFileError: it is another.
        """
        if self.shapes[key] != expected:
            raise AdapterFileError(
                f"{self.path}: {_short(key)} must be {list(expected)}, {why}; found {list(self.shapes[key])}."
            )

    def read(self, key: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor, all of it finite, also in the dtype that the model has for it.

        Raises:
            AdapterFileError: it is not.
        """
        stored: Tensor = self._handle.get_tensor(key)
        self._check_finite(key, stored, "")
        tensor = stored.to(dtype)
        self._check_finite(key, tensor, f" once converted to {dtype}")
        return tensor.to(device)

    def _check_finite(self, key: str, tensor: Tensor, when: str) -> None:
        bad = int(tensor.numel() - torch.isfinite(tensor).sum())
        if bad:
            raise AdapterFileError(
                f"{self.path}: {_short(key)} must be finite{when}; found {bad} of {tensor.numel()} elements NaN or Inf."
            )


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """The weights of an adapter.

    Raises:
        AdapterFileError: the file is no safetensors file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield WeightsFile(path, handle)
    except (SafetensorError, UnicodeError) as error:
        if _looks_like_a_pickle(path):
            raise AdapterFileError(
                f"{path}: expected safetensors; found a pickle, which runs code when it is loaded. {_CONVERT}"
            ) from None
        raise AdapterFileError(
            f"{path}: expected a complete safetensors file; found {path.stat().st_size:,} bytes with this "
            f"fault: {error}. Copy or download it again."
        ) from None


def _looks_like_a_pickle(path: Path) -> bool:
    """torch.save's zip archive, or a bare pickle of protocol 2 or later."""
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def check_present(directory: Path, config_name: str) -> tuple[Path, Path]:
    """Both files of an adapter.

    Raises:
        AdapterFileError: one is missing.
    """
    config, weights = directory / config_name, directory / NAME
    if not directory.is_dir():
        raise AdapterFileError(f"{directory}: expected a directory with {config_name} and {NAME}; found none.")
    if not config.is_file():
        raise AdapterFileError(f"{config}: expected the adapter's config; found no such file.")
    if not weights.is_file():
        if (directory / PICKLE_NAME).is_file():
            raise AdapterFileError(
                f"{weights}: expected safetensors; found {PICKLE_NAME}, a pickle, which runs code when it is loaded. "
                f"{_CONVERT}"
            )
        raise AdapterFileError(f"{weights}: expected the adapter's weights; found no such file.")
    return config, weights


_CONVERT = "If you trust it, load it with PEFT and save_pretrained it again, which writes safetensors."


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """The file, as PEFT writes it."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})


def _short(name: str) -> str:
    return repr(name if len(name) <= 200 else name[:200] + "…")
