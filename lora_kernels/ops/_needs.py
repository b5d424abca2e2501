"""Which gradients a backward is asked for."""

from __future__ import annotations

from typing import NamedTuple


class Needs(NamedTuple):
    """Which gradients the caller asked for, in the order of the operation's arguments."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    bias: bool


class BranchNeeds(NamedTuple):
    """The same for `lora_branch`, less base_out: its gradient is dy itself."""

    x: bool
    lora_A: bool
    lora_B: bool
