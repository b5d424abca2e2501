"""Options and parameters of `python -m pytest bench`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import providers, suites
from bench.benchmark_json import case_id
from lora_kernels.benchmarking import cases as package_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEW = 200  # cases; more of them is a mistake in --only, not a wish


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora-kernels")
    group.addoption("--suite", default=suites.default_suite(DEVICE), choices=suites.NAMES, help="what is timed")
    group.addoption("--only", default="bert-base.attention", help="words a case must contain ('' for all)")
    group.addoption("--providers", default="", help=f"comma-separated, of {', '.join(providers.NAMES)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"case", "provider"} <= set(metafunc.fixturenames):
        return
    option: Any = metafunc.config.getoption
    cases = package_cases.select(suites.suite(option("--suite")), option("--only"))
    if len(cases) > FEW:
        raise pytest.UsageError(f"--only must select at most {FEW} cases here; got {len(cases)}. Add words.")
    chosen = providers.named(option("--providers").split(",")) if option("--providers") else providers.PROVIDERS
    metafunc.parametrize("case", cases, ids=case_id)
    metafunc.parametrize("provider", chosen, ids=lambda provider: provider.name)


@pytest.fixture
def device() -> torch.device:
    return DEVICE
