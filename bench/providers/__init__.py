"""The contenders: what this package is compared with, each written here from its published design, and itself.

No peer's code is in these files, and none of them is tuned down: where a peer has a choice, it gets the better one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench.providers.addmm import ADDMM, UNSLOTH_STYLE
from bench.providers.compiled import COMPILED, COMPILED_MAX
from bench.providers.lorafusion import LORAFUSION_STYLE
from bench.providers.peft_layer import PEFT
from bench.providers.strategies import AUTO, STRATEGIES
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import FROZEN_LINEAR, UNFUSED_CHAIN, Provider

BASELINES = (FROZEN_LINEAR, UNFUSED_CHAIN)
PEERS = (PEFT, COMPILED, COMPILED_MAX, ADDMM, UNSLOTH_STYLE, LORAFUSION_STYLE)
OURS = (AUTO, *STRATEGIES)
PROVIDERS = (*BASELINES, *PEERS, *OURS)
NAMES = tuple(provider.name for provider in PROVIDERS)

OWN = frozenset({"torch", "triton", *(provider.name for provider in OURS)})
"""Names under which rows of this package stand; `torch` and `triton` are whole backends, as in `lora-kernels bench`."""


def named(names: Iterable[str]) -> tuple[Provider, ...]:
    """The providers of these names, in the order of the table.

    Raises:
        ValueError: a name is none of `NAMES`.
    """
    wanted = set(names)
    if unknown := sorted(wanted - set(NAMES)):
        raise ValueError(f"providers must be among {', '.join(NAMES)}; got {', '.join(unknown)}")
    return tuple(provider for provider in PROVIDERS if provider.name in wanted)


def able(providers: Iterable[Provider], case: LinearCase, device: torch.device) -> tuple[Provider, ...]:
    """Those that can run a case on a device."""
    return tuple(provider for provider in providers if provider.why_not(case, device) is None)
