"""What a run of `bench.finetune` found, its arms by name, and when two loss curves agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_kernels.benchmarking.records import Environment
from lora_kernels.benchmarking.timer import Samples

PEFT, TWIN, PATCHED, NATIVE = "peft", "peft, 1 ulp off", "patch_peft", "add_lora"
OURS = (PATCHED, NATIVE)
SHOWN = (PEFT, *OURS)  # the twin is stock PEFT's code over again
TWIN_FACTOR = 4.0


@dataclass(frozen=True)
class Outcome:
    """What a run found, for the report, the CSV and the plot; mappings go from arm to value."""

    environment: Environment
    title: str
    losses: dict[str, list[float]]
    times: Samples
    peak: dict[str, int]
    saved: dict[str, int]
    accuracy: dict[str, float]
    majority: float
    probe: float
    trainable: int
    parameters: int
    asserted: bool
    warning: str

    def strayed(self, arm: str) -> list[float]:
        """Relative distance of an arm's loss from stock PEFT's, step by step."""
        return [abs(a - b) / abs(b) for a, b in zip(self.losses[arm], self.losses[PEFT], strict=True)]

    @property
    def tolerance(self) -> float:
        """The most that our curves may stray: a multiple of what one unit in the last place does to PEFT's."""
        return TWIN_FACTOR * max(self.strayed(TWIN))

    def agrees(self, arm: str) -> bool:
        """Whether an arm's curve agrees with stock PEFT's; NaN anywhere means no."""
        return max(self.strayed(arm)) <= self.tolerance and all(map(math.isfinite, self.losses[arm]))
