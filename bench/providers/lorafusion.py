"""LoRAFusion's plan (Zhu et al., 2025, "split-graph fusion"), composed from library calls.

Forward, two steps: dropout and shrink make the mask, the dropped x and S = drop(x) A^T, all three stored; then the base
product with s S B^T added. Backward, three: dS and dB from dy, dA from dS and the stored dropped x, and dx with its
low-rank term, masked, inside the product with W.

What it is not: the published Triton kernels. Here the base product adds onto a rank-sized product that was written
first, so y and dx each cross memory once more than in a fused epilogue, while the GEMM is the library's own; the paper
puts the fused GEMM at 2 to 5 % over it. Its mask is read from memory, as published.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import CaseInputs, Provider


class LoRAFusionStyleFunction(torch.autograd.Function):
    """forward(x [M, K], weight, lora_A, lora_B, bias, scaling, dropout_p) -> y [M, N]; weight and bias are frozen."""

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
    ) -> Tensor:
        dropped, mask = torch.native_dropout(x, dropout_p, True) if dropout_p else (x, None)
        s = (dropped @ lora_A.T).mul_(scaling)
        y = s @ lora_B.T if bias is None else torch.addmm(bias, s, lora_B.T)
        y.addmm_(x, weight.T)
        ctx.save_for_backward(dropped, mask, s, weight, lora_A, lora_B)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, s, weight, lora_A, lora_B = ctx.saved_tensors
        ds, d_lora_B = (dy @ lora_B).mul_(ctx.scaling), dy.T @ s
        d_lora_A = ds.T @ dropped
        dx = ds @ lora_A
        if mask is not None:
            dx.mul_(mask).mul_(1 / (1 - ctx.dropout_p))
        dx.addmm_(dy, weight)
        return dx, None, d_lora_A, d_lora_B, None, None, None


def _lorafusion_style(inputs: CaseInputs, dropout_p: float) -> Tensor:
    i = inputs
    return LoRAFusionStyleFunction.apply(i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.scaling, dropout_p)


def _one_dtype(case: LinearCase, device: torch.device) -> str | None:
    return None if case.adapter_dtype == case.dtype else "its kernels want adapters in x's dtype"


LORAFUSION_STYLE = Provider("lorafusion-style", _lorafusion_style, why_not=_one_dtype)
