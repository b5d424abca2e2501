"""The same contenders and suites as pytest benchmarks: for one change at a time, with pytest-benchmark's own options.

    python -m pytest bench --benchmark-only --suite cpu --only "bert-base fp32 p=0" --benchmark-json=before.json
    python -m pytest bench --benchmark-only --benchmark-compare=before.json --benchmark-histogram

Contenders are timed one after another here, so what compares is one contender before and after a change; contenders
among each other are compared by `python -m bench.linear`, which interleaves them. Both check against fp64 first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.benchmark_json import case_id
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.gate import Gate
from lora_kernels.benchmarking.providers import CaseInputs, Provider
from lora_kernels.benchmarking.runner import timed_call


def test_linear(benchmark: Any, case: LinearCase, provider: Provider, device: torch.device) -> None:
    reason = provider.why_not(case, device)
    if reason:
        pytest.skip(f"{provider.name}: {reason}")
    inputs = CaseInputs.of(case, device)
    verdict = Gate(case, inputs).check(provider)
    assert verdict.passed, verdict.reason
    call = timed_call(provider, case, inputs)
    call()

    def synchronous() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = case_id(case)
    benchmark.extra_info |= {"error": verdict.error, "error_budget": verdict.budget, "tensor": verdict.tensor}
    benchmark(synchronous)
