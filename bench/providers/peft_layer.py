"""PEFT's own LoRA layer, where peft is installed.

With fp32 adapters on a 16-bit base, its default, it runs under autocast, as trainers run it; with adapters in the
base's dtype, plainly.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import CaseInputs, Provider


@cache
def _not_installed() -> str | None:
    # peft imports both at once; a find_spec costs nothing beside the import.
    missing = [name for name in ("peft", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)} (pip install '.[dev]')" if missing else None


def _layer(inputs: CaseInputs, dropout_p: float) -> nn.Module:
    """peft's Linear over a base that shares the case's tensors; its adapters are the case's leaves themselves."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    n, k = inputs.weight.shape
    r = inputs.lora_A.shape[0]
    base = nn.Linear(k, n, bias=inputs.bias is not None, device="meta")
    base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    if inputs.bias is not None:
        base.bias = nn.Parameter(inputs.bias, requires_grad=False)
    alpha = inputs.scaling * r
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout_p, target_modules=["linear"])
    layer = Linear(base, "default", config, r=r, lora_alpha=alpha)
    for projection, leaf in ((layer.lora_A, inputs.lora_A), (layer.lora_B, inputs.lora_B)):
        # Not nn.Parameter(leaf), which would be another leaf: gradients are asked of the case's own.
        projection["default"]._parameters["weight"] = leaf
    return layer.train()


def _forward(inputs: CaseInputs, dropout_p: float) -> Tensor:
    layer: Any = inputs.build(("peft", dropout_p), lambda: _layer(inputs, dropout_p))
    if inputs.lora_A.dtype == inputs.x.dtype:
        return layer(inputs.x)
    # Without the cache of casts: it would keep the 16-bit adapters from one call to the next, which a step cannot.
    with torch.autocast(inputs.x.device.type, inputs.x.dtype, cache_enabled=False):
        return layer(inputs.x)


def _why_not(case: LinearCase, device: torch.device) -> str | None:
    return _not_installed()


PEFT = Provider("peft", _forward, casts_adapters=True, why_not=_why_not)
