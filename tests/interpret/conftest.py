"""Tests that run kernels through Triton's interpreter; they need a process of their own.

Triton decides between compiling and interpreting once, when it is imported: ``TRITON_INTERPRET=1 pytest
tests/interpret`` (``make test-interpret``, which also keeps NumPy's BLAS to one thread: its thread pool is
sized when NumPy is imported, too early for a fixture). Everywhere else this folder is left out.
"""

import os
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

if not INTERPRETING:
    collect_ignore_glob = ["*"]


def pytest_report_header() -> str:
    if INTERPRETING:
        return "tests/interpret: kernels run on the CPU, in Triton's interpreter"
    return "tests/interpret: left out, TRITON_INTERPRET=1 is not set (make test-interpret sets it)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _FOLDER in item.path.parents:
            item.add_marker("interpret")
