"""What this package is compared with: the contenders of the linear suite, and the unfused layer as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_kernels.benchmarking.providers import (
    FROZEN as FROZEN,
    PROVIDERS as PROVIDERS,
    UNFUSED as UNFUSED,
    unfused_chain,
)


class UnfusedLoRALinear(nn.Module):
    """A LoRA layer of eager operations, PEFT's design, with the parameters and names of `LoRALinear`.

    Its dropout is torch's own, so for p > 0 its masks, and hence its losses, are other draws than `LoRALinear`'s; the
    comparison of loss curves therefore runs at p = 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(base, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, adapter_dtype=adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> UnfusedLoRALinear:
        """Wrap a linear; weight and bias are shared with it."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(linear, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, adapter_dtype=adapter_dtype)
        return layer

    def _adopt(
        self,
        base: nn.Linear,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        self.weight = base.weight.requires_grad_(False)
        self.bias = None if base.bias is None else base.bias.requires_grad_(False)
        dtype = adapter_dtype or base.weight.dtype
        self.lora_A = nn.Parameter(base.weight.new_empty(r, base.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, r, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = lora_alpha / r
        self.lora_dropout = lora_dropout

    def forward(self, x: Tensor) -> Tensor:
        """result = base(x); result + lora_B(lora_A(dropout(x))) * scaling, one operation after another."""
        return unfused_chain(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
        )
