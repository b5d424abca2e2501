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


# Where peers run in `make bench`: each of them takes its seconds of two slow cores, and a compilation takes ten.
_CPU_PEERS = (PEFT, ADDMM, LORAFUSION_STYLE)
_CPU_PEER_CASES = ("minilm.up", "bert-base.attention", "llama-1b.attention")
_CPU_SMALL_CASE = "bert-base.attention"  # where 16-bit peers are bearable on a CPU that converts, and compilation, too
_GPU_COMPILED_MODEL = "Llama-3-8B"


def lineup(case: LinearCase, device: torch.device) -> tuple[Provider, ...]:
    """Who runs in a case where nobody is named: all on a GPU; on a CPU, peers in some cases only.

    The compiler runs where a target is about it, since it compiles each case for long; `compile-max`, which takes
    longer still, where it is named.
    """
    compilable = case.backward and case.R == 16 and case.adapter_dtype == case.dtype
    if device.type == "cpu":
        small = case.name == _CPU_SMALL_CASE
        peers = _CPU_PEERS if small or (case.dtype == "float32" and case.name in _CPU_PEER_CASES) else ()
        compiled = compilable and small and not case.dropout_p
        chosen = {provider.name for provider in (*BASELINES, *peers, AUTO)}
    else:
        compiled = compilable and case.model == _GPU_COMPILED_MODEL
        chosen = set(NAMES) - {COMPILED.name, COMPILED_MAX.name}
    return named(chosen | {COMPILED.name} if compiled else chosen)
