"""A pytest plugin that switches one mechanism of the launches off: what is left when a kernel is wrong on a GPU.

LORA_KERNELS_WITHOUT="dependent launch" python -m pytest -p bench.switches tests/gpu/...
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

VARIABLE = "LORA_KERNELS_WITHOUT"
SWITCHES = ("dependent launch", "second stream", "descriptors", "repeated launches", "pipelining")


def pytest_configure(config: Any) -> None:
    """Before a test is imported."""
    switch = os.environ.get(VARIABLE, "")
    if switch:
        apply(switch)


def apply(switch: str) -> None:
    """For the process."""
    from lora_kernels.planning import Plan, Problem, branch, plan

    if switch not in SWITCHES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(SWITCHES)}; got {switch!r}")
    if switch == "repeated launches":
        from lora_kernels.kernels import replay

        replay.is_profiled = lambda: True
        return
    planned = plan.kernel_choices

    def changed(problem: Problem) -> Plan:
        found = planned(problem)
        if switch == "dependent launch":
            return dataclasses.replace(found, use_pdl=False)
        if switch == "second stream":
            return dataclasses.replace(found, beside=False)
        if switch == "descriptors":
            return dataclasses.replace(found, use_pdl=False, use_tma=False)
        # The persistent kernel's ring needs two.
        table = {
            kernel: tile if "persistent" in kernel else dataclasses.replace(tile, num_stages=1)
            for kernel, tile in found.tiles
        }
        return dataclasses.replace(found, tiles=tuple(table.items()))

    plan.kernel_choices = branch.kernel_choices = changed
