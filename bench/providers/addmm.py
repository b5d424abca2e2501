"""Library products that accumulate in place, with a backward written by hand: the composition to beat on a GPU.

    y = x W^T + b;  xa = x A^T;  y.addmm_(xa, B^T, alpha=s)

Nothing of y's size is written twice but by the GEMM's own accumulation. Published in this form by unsloth (fast_lora),
axolotl and, as beta = 1, Megatron-Bridge. Two arms: `addmm` saves xa for backward, `unsloth-style` saves x alone and
computes xa again, and has no dropout on this path. Adapters of another dtype are cast to x's in each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import CaseInputs, Provider


class AddmmFunction(torch.autograd.Function):
    """forward(x [M, K], weight, lora_A, lora_B, bias, scaling, dropout_p, recompute) -> y [M, N]; weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout_p: float,
        recompute: bool,
    ) -> Tensor:
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        dropped, mask = torch.native_dropout(x, dropout_p, True) if dropout_p else (x, None)
        xa = dropped @ a.T
        y = F.linear(x, weight, bias)
        y.addmm_(xa, b.T, alpha=scaling)
        ctx.save_for_backward(dropped, weight, lora_A, lora_B, None if recompute else xa, mask)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, weight, lora_A, lora_B, xa, mask = ctx.saved_tensors
        a, b = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
        if xa is None:
            xa = dropped @ a.T
        dyb = dy @ b
        d_lora_A = (dyb.T @ dropped).mul_(ctx.scaling)
        d_lora_B = (dy.T @ xa).mul_(ctx.scaling)
        if mask is None:
            dx = dy @ weight
            dx.addmm_(dyb, a, alpha=ctx.scaling)
        else:
            dx = (dyb @ a).mul_(mask).mul_(ctx.scaling / (1 - ctx.dropout_p))
            dx.addmm_(dy, weight)
        return dx, None, d_lora_A.to(lora_A.dtype), d_lora_B.to(lora_B.dtype), None, None, None, None


def _addmm(inputs: CaseInputs, dropout_p: float) -> Tensor:
    i = inputs
    return AddmmFunction.apply(i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.scaling, dropout_p, False)


def _unsloth_style(inputs: CaseInputs, dropout_p: float) -> Tensor:
    i = inputs
    return AddmmFunction.apply(i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.scaling, 0.0, True)


def _no_dropout(case: LinearCase, device: torch.device) -> str | None:
    return "its fast path has no dropout; with p > 0 it is PEFT's layer that runs" if case.dropout_p else None


ADDMM = Provider("addmm", _addmm, casts_adapters=True)
UNSLOTH_STYLE = Provider("unsloth-style", _unsloth_style, casts_adapters=True, why_not=_no_dropout)
