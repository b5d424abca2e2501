"""Tests that compile kernels and launch nothing.

Where TRITON_INTERPRET is set there is nothing to compile, because kernels are then Python functions: the
folder is left out. Kernels land in a cache that goes with the session, so that every run compiles anew, no
home directory is written to, and workers do not share.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.driver import Driver

_FOLDER = Path(__file__).parent
COMPILING = os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "yes", "on", "y")

if not COMPILING:
    collect_ignore_glob = ["*"]


def pytest_report_header() -> str:
    if COMPILING:
        return "tests/compile: kernels are compiled for GPUs that need not be there"
    return "tests/compile: left out, TRITON_INTERPRET is set"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _FOLDER in item.path.parents:
            item.add_marker("compile_only")


@pytest.fixture(scope="session", autouse=True)
def kernel_cache() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        yield


class Recording(Driver):
    """Keeps (binary, grid, arguments) of each launch, as described and as they are, and the hooks that came with it."""

    def __init__(self):
        super().__init__(self.keep)
        self.launches, self.hooks, self.raw = [], [], []

    def keep(self, binary, grid, args, hook):
        self.hooks.append(hook)
        self.launches.append((binary, grid, [described(arg) for arg in args]))
        self.raw.append((binary, grid, args))


def described(argument):
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, argument.shape, argument.stride())
    return described(argument.base) if type(argument).__name__ == "TensorDescriptor" else argument


@pytest.fixture(scope="session")
def the_driver() -> Recording:
    # One for all tests: a compiled kernel keeps the launcher it was loaded with.
    return Recording()


@pytest.fixture
def driver(the_driver: Recording) -> Iterator[Recording]:
    the_driver.launches.clear()
    the_driver.hooks.clear()
    the_driver.raw.clear()
    the_driver.device = 0
    with the_driver.active():
        yield the_driver
