"""A driver for Triton that launches nothing: what a call costs the host, and what it would launch, without a GPU.

Kernels are compiled for the target as usual. A launch ends where the C code of Triton's launcher would begin, which
packs the arguments, encodes descriptors and asks CUDA: a few microseconds more on a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from lora_kernels.kernels import launch, replay

Launched = Callable[[object, tuple[int, int, int], tuple[Any, ...], Any], None]


class Driver:
    """As much of Triton's driver as a launch touches.

    Args:
        launched: called with (binary, grid, arguments, enter hook) of each launch.
        target: for which kernels are compiled.
    """

    def __init__(self, launched: Launched, target: GPUTarget | None = None) -> None:
        self.launched = launched
        self.target = target or GPUTarget("cuda", 90, 32)
        self.device = self.stream = 0
        self.names: list[str] = []
        """Of the kernels loaded; their place from 1 is what a launch knows them by."""
        shared = {"max_shared_mem": 227 * 1024}
        self.utils = SimpleNamespace(load_binary=self.load, get_device_properties=lambda _: shared)

    def load(self, name: str, *_: Any) -> tuple[object, int, int, int, int]:
        self.names.append(name)
        return object(), len(self.names), 32, 0, 1024

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return self.target

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        launched = self.launched

        def run(x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):  # type: ignore[no-untyped-def]
            launched(function, (x, y, z), args, enter_hook)

        return run

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, launches of this package's kernels, with CPU tensors, end here; nothing is known from before."""
        with (
            mock.patch.object(triton.runtime.driver, "_active", self),
            mock.patch.object(torch.cuda, "current_device", self.get_current_device),
            mock.patch.object(launch, "is_interpreting", return_value=False),
            mock.patch.object(replay, "is_interpreting", return_value=False),
            mock.patch.dict(launch._compiled, clear=True),
            mock.patch.dict(launch._picks, clear=True),
            mock.patch.dict(replay._recipes, clear=True),
        ):
            yield
