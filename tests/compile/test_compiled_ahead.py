"""Kernels compiled for a GPU that is not there: a problem's, with the launchers, into a cache; what fails is said."""

from types import SimpleNamespace

import pytest
import torch
from triton.backends.nvidia import driver

from bench import compiled_ahead
from lora_kernels.kernels.bwd_dx_lora_a import bwd_dx_lora_a_kernel
from lora_kernels.kernels.bwd_lora_b import bwd_lora_b_kernel
from lora_kernels.kernels.reduce_partials import reduce_partials_kernel
from lora_kernels.kernels.shrink import shrink_kernel
from lora_kernels.planning import Problem, plan
from lora_kernels.planning.problem import Way

PROBLEM = Problem(
    64, 64, 64, 16, torch.bfloat16, torch.bfloat16, True,
    arch="sm_90", device_type="cuda", sm_count=132, gluon=True, device=compiled_ahead.DEVICE,
)  # fmt: skip


KERNELS = (shrink_kernel, bwd_lora_b_kernel, bwd_dx_lora_a_kernel, reduce_partials_kernel)


@pytest.fixture(autouse=True)
def forgotten():
    # A compiled kernel keeps the launcher it was loaded with: neither others' here, nor these for others.
    for kernel in KERNELS:
        kernel.device_caches.clear()
    yield
    for kernel in KERNELS:
        kernel.device_caches.clear()


@pytest.fixture
def launchers(monkeypatch):
    """Names of the kernels whose launchers would have been compiled in C, which takes a compiler and a second each."""
    made = []
    monkeypatch.setattr(driver, "CudaLauncher", lambda src, metadata: made.append(metadata.name))
    monkeypatch.setattr(compiled_ahead, "_stub", lambda: SimpleNamespace(name=""))
    monkeypatch.setattr(plan, "ways_of", lambda *_: [Way("triton", "library")])
    return made


def test_a_problem_is_compiled_to_its_last_kernel(launchers):
    assert compiled_ahead.compile_problem((PROBLEM, True)) == ""
    assert set(launchers) == {kernel.__name__ for kernel in KERNELS}


def test_a_kernel_that_does_not_compile_is_named_with_its_problem(launchers, monkeypatch):
    from lora_kernels.ops import low_rank_triton

    def fails(**_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(low_rank_triton, "shrink", fails)
    line, *_ = compiled_ahead.compile_problem((PROBLEM, True)).splitlines()
    assert "M=64" in line
    assert "triton/library: RuntimeError: no such instruction" in line
