"""Tests that need a GPU (`make gpu`); where none is, the folder is left out of the collection."""

from pathlib import Path

import pytest
import torch

_FOLDER = Path(__file__).parent
HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    collect_ignore_glob = ["*"]


def pytest_report_header() -> str:
    if not HAS_GPU:
        return "tests/gpu: left out, torch sees no CUDA or ROCm device"
    return f"tests/gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _FOLDER in item.path.parents:
            item.add_marker("gpu")
