"""What planning needs to know about a device, read once per device."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import NamedTuple

import torch


class DeviceTraits(NamedTuple):
    """arch as the compiler names it ("sm_90", "gfx942"), or the device's type; sm_count multiprocessors."""

    arch: str
    sm_count: int


@cache
def device_traits(device_type: str, index: int | None) -> DeviceTraits:
    """Traits of one device; index None is the current one."""
    if device_type != "cuda":
        return DeviceTraits(device_type, 1)
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return DeviceTraits(arch, properties.multi_processor_count)


@cache
def triton_available() -> bool:
    """Whether triton can be imported, found out without importing it."""
    return importlib.util.find_spec("triton") is not None
