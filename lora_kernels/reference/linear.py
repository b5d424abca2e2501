"""The specification of the fused LoRA linear, in plain PyTorch.

    y = x W^T + b + s (drop(x) A^T) B^T                drop(x) = mask * x / (1 - p)

`lora_linear` is differentiable PyTorch, left to autograd. `linear_forward` and `linear_backward` are the same
mathematics cut where the kernels cut it, with the gradients derived by hand (docs/ops/linear.md): what every backend is
held against. All take any float dtype and compute in it; tests call them in fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.reference.philox import dropout_scale, keep_mask


class LinearGradients(NamedTuple):
    """Gradients of one LoRA linear, in the order of its arguments."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor


def drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Seeded inverted dropout of x [M, K]; dropped elements are exactly zero, also where x is Inf or NaN."""
    if seed is None:
        return x
    keep = keep_mask(seed, x.shape[0], x.shape[1], p)
    return torch.where(keep, x, 0) * dropout_scale(p)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y [M, N] for x [M, K]: five separate steps, each differentiable, rounding after each as eager PyTorch does."""
    # A bias in another dtype is an adapter's, fp32 over a 16-bit base.
    base = F.linear(x, weight, bias) if bias is None or bias.dtype == x.dtype else F.linear(x, weight) + bias
    xa = F.linear(drop(x.to(lora_A.dtype), dropout_p, seed), lora_A)
    return (base + scaling * F.linear(xa, lora_B)).to(x.dtype)


def linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Forward in two products: xa = s drop(x) A^T [M, R], which is saved, and y = x W^T + b + xa B^T [M, N]."""
    xa = scaling * drop(x, dropout_p, seed) @ lora_A.T
    y = x @ weight.T + xa @ lora_B.T
    return (y if bias is None else y + bias), xa


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> LinearGradients:
    """Every gradient of y = x W^T + b + xa B^T from x, xa and the seed.

    With dyb = s dy B / (1 - p) [M, R] and the mask of the forward:
    dB = dy^T xa;  dA = dyb^T (mask * x);  dx = dy W + mask * (dyb A);  dW = dy^T x;  db = sum_m dy.
    """
    dyb = scaling * dy @ lora_B
    dropped = x
    low_rank = dyb @ lora_A
    if seed is not None:
        keep, scale = keep_mask(seed, x.shape[0], x.shape[1], dropout_p), dropout_scale(dropout_p)
        dyb, low_rank = dyb * scale, torch.where(keep, low_rank * scale, 0)
        dropped = torch.where(keep, x, 0)
    return LinearGradients(
        x=dy @ weight + low_rank,
        weight=dy.T @ x,
        lora_A=dyb.T @ dropped,
        lora_B=dy.T @ xa,
        bias=dy.sum(0),
    )
