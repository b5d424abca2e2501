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
