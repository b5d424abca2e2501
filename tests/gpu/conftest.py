"""Tests that need a GPU (`make gpu`); where none is, they are found with --collect-only, and else left out."""

from pathlib import Path

import pytest
import torch

_FOLDER = Path(__file__).parent
HAS_GPU = torch.cuda.is_available()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if HAS_GPU or config.option.collectonly else True


def pytest_report_header() -> str:
    if not HAS_GPU:
        return "tests/gpu: left out, torch sees no CUDA or ROCm device"
    return f"tests/gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _FOLDER in item.path.parents:
            item.add_marker("gpu")
