"""LoRA layers as PEFT makes them, stock and patched, for the measurements that compare the two."""

from __future__ import annotations

import copy
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import patch_peft

STOCK, PATCHED = "PEFT", "patched"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PeftCase:
    """One layer under `get_peft_model`, with PEFT's default dtype for its adapters: fp32.

    Attributes:
        name: model and position, as in `lora_kernels.benchmarking.cases`.
        M: tokens. N: out_features. K: in_features. R: rank.
        dtype: of x and the base, "fp32" or "bf16".
        autocast: whether forward runs under bf16 autocast.
        dropout_p: `lora_dropout`.
        base: "linear", "conv1d" (GPT-2's) or "4bit" (bitsandbytes' NF4).
    """

    name: str
    M: int
    N: int
    K: int
    R: int = 16
    dtype: str = "bf16"
    autocast: bool = False
    dropout_p: float = 0.0
    base: str = "linear"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def label(self) -> str:
        """The situation, as a table's cell."""
        return f"{self.dtype}{' autocast' if self.autocast else ''}"


def why_not(case: PeftCase) -> str | None:
    """Why the case cannot run here; None where it can."""
    needed = ["peft", "transformers", "accelerate"] + (["bitsandbytes"] if case.base == "4bit" else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)} (pip install '.[dev]')" if missing else None


def _base(case: PeftCase) -> nn.Module:
    if case.base == "conv1d":
        from transformers.pytorch_utils import Conv1D

        return Conv1D(case.N, case.K)
    if case.base == "4bit":
        import bitsandbytes

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        linear = bitsandbytes.nn.Linear4bit(
            case.K, case.N, bias=False, compute_dtype=case.torch_dtype, quant_type="nf4"
        )
        linear.load_state_dict(nn.Linear(case.K, case.N, bias=False).state_dict())
        return linear
    return nn.Linear(case.K, case.N)


def layers(case: PeftCase, device: torch.device) -> dict[str, nn.Module]:
    """The same layer twice, in training mode: as PEFT made it, and patched."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = nn.Sequential(_base(case))
    if case.base == "4bit":
        model.is_loaded_in_4bit = True
    else:
        model = model.to(case.torch_dtype)
    config = LoraConfig(
        r=case.R,
        lora_alpha=2 * case.R,
        lora_dropout=case.dropout_p,
        target_modules=["0"],
        fan_in_fan_out=case.base == "conv1d",
        init_lora_weights=False,
    )
    stock = get_peft_model(model.to(device), config).train()
    patched = copy.deepcopy(stock)
    report = patch_peft(patched)
    assert report.fused == 1, report
    return {STOCK: stock.base_model.model[0], PATCHED: patched.base_model.model[0]}


def input_of(case: PeftCase, device: torch.device) -> Tensor:
    """x [M, K], which takes a gradient: somewhere below there is another adapter."""
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(case.M, case.K, generator=generator, device=device, dtype=torch.float32)
    return x.to(case.torch_dtype).requires_grad_()


def forward(layer: nn.Module, x: Tensor, case: PeftCase) -> Tensor:
    # Without the cache of casts: it would keep the 16-bit adapters from one call to the next, which a step cannot.
    with torch.autocast(x.device.type, torch.bfloat16, enabled=case.autocast, cache_enabled=False):
        y: Tensor = layer(x)
    return y
