"""The unfused layer as a module, for whole models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_kernels.benchmarking.providers import unfused_chain


class UnfusedLoRALinear(nn.Module):
    """A LoRA layer of eager operations, PEFT's design, with the parameters and names of `LoRALinear`.

    Its dropout is torch's own, so for p > 0 its masks, and hence its losses, are other draws than `LoRALinear`'s; the
    comparison of loss curves therefore runs at p = 0.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        adapter_dtype: torch.dtype,
    ) -> None:
        """Wrap a linear; weight and bias are shared with it."""
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(linear.weight.new_empty(r, linear.in_features, dtype=adapter_dtype))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, r, dtype=adapter_dtype))
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
