"""What planning needs to know about a device, read once per device."""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


class DeviceTraits(NamedTuple):
    """arch as the compiler names it ("sm_90", "gfx942"), or the device's type; sm_count multiprocessors; its name."""

    arch: str
    sm_count: int
    name: str


def device_traits(device_type: str, index: int | None) -> DeviceTraits:
    """Traits of one device; index None is the current one. A CPU's name has its instructions and threads."""
    if device_type != "cuda":
        return DeviceTraits(device_type, 1, f"{cpu_name()}, {torch.get_num_threads()} threads")
    return _cuda_traits(torch.cuda.current_device() if index is None else index)


@cache
def _cuda_traits(index: int) -> DeviceTraits:
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return DeviceTraits(arch, properties.multi_processor_count, properties.name)


@cache
def cpu_name() -> str:
    """The processor's model name, as far as the operating system tells, and the instructions that decide its speed.

    Virtual machines of one model name may have AMX or not, which is a factor of ten in 16 bits: what was measured, or
    tuned, on one says nothing of the other.
    """
    model, cpuinfo = platform.processor() or platform.machine() or "CPU", Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if found:
            model = found.group(1).strip()
    instructions = ", ".join(_instructions(cpu_capabilities()))
    return f"{model} ({instructions})" if instructions else model


def cpu_capabilities() -> Mapping[str, Any]:
    """What torch knows of the CPU, by name; nothing before torch had this function."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def _instructions(capabilities: Mapping[str, Any]) -> list[str]:
    """Of an x86: its widest vectors, and what multiplies 16-bit matrices. Nothing where torch knows nothing."""
    vectors = next((name for flag, name in (("avx512_f", "AVX-512"), ("avx2", "AVX2")) if capabilities.get(flag)), "")
    products = {"avx512_bf16": "BF16", "amx_bf16": "AMX"}
    return [name for name in (vectors, *(name for flag, name in products.items() if capabilities.get(flag))) if name]


def slug(device_name: str) -> str:
    """The name as a file's or folder's: `nvidia-h200`, `amd-epyc-7r13-processor-avx2-2-threads`."""
    plain = re.sub(r"\((r|tm)\)", " ", device_name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


@cache
def triton_available() -> bool:
    """Whether triton can be imported, found out without importing it."""
    return importlib.util.find_spec("triton") is not None


@cache
def gluon_available() -> bool:
    """Whether this Triton has Gluon, found out without importing either."""
    root = importlib.util.find_spec("triton")
    folders = root.submodule_search_locations if root is not None else None
    return any((Path(folder) / "experimental" / "gluon").is_dir() for folder in folders or ())
