"""For all tests: what somebody tuned on this machine must not change what is tested, nor where tensors lie."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.placement import PLACEMENTS, placed

os.environ["LORA_KERNELS_CACHE"] = ""

# Launches are specialised by alignment: what compiles or launches kernels says itself where its tensors lie.
_PLACED = [Path(__file__).parent / folder for folder in ("unit", "reference", "interop")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--placement",
        choices=PLACEMENTS,
        default="in-turn",
        help="how many bytes past the allocator's alignment the tests' tensors start (default: 0, 4, 8, 16 in turn)",
    )


@pytest.fixture(autouse=True)
def placement(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("aligned") or not any(folder in request.path.parents for folder in _PLACED):
        yield
    else:
        with placed(request.config.getoption("placement")):
            yield
