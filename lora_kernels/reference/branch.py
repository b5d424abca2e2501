"""The specification of the LoRA branch, in plain PyTorch: what an adapter adds to an output that is already there.

    y = base_out + s (drop(x) A^T) B^T                drop(x) = mask * x / (1 - p)

As in `reference.linear`: `lora_branch` is differentiable PyTorch, left to autograd; `branch_forward` and
`branch_backward` are the same mathematics cut where the kernels cut it, with the gradients derived by hand
(docs/ops/branch.md). All take any float dtype and compute in it; tests call them in fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.reference.linear import drop
from lora_kernels.reference.philox import dropout_scale, keep_mask


class BranchGradients(NamedTuple):
    """Gradients of one LoRA branch, in the order of its arguments."""

    base_out: Tensor
    x: Tensor
    lora_A: Tensor
    lora_B: Tensor


def lora_branch(
    base_out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y [M, N] in base_out's dtype for x [M, K]: separate steps, rounding after each as eager PyTorch does."""
    xa = F.linear(drop(x.to(lora_A.dtype), dropout_p, seed), lora_A)
    return (base_out + scaling * F.linear(xa, lora_B)).to(base_out.dtype)


def branch_forward(
    base_out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Forward in two products: xa = s drop(x) A^T [M, R], which is saved, and y = base_out + xa B^T [M, N]."""
    xa = scaling * drop(x, dropout_p, seed) @ lora_A.T
    return base_out + xa @ lora_B.T, xa


def branch_backward(
    dy: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> BranchGradients:
    """Every gradient of y = base_out + xa B^T from x, xa and the seed.

    With dyb = s dy B / (1 - p) [M, R] and the mask of the forward:
    d_base_out = dy;  dB = dy^T xa;  dA = dyb^T (mask * x);  dx = mask * (dyb A).
    """
    dyb = scaling * dy @ lora_B
    dropped, dx = x, dyb @ lora_A
    if seed is not None:
        keep, scale = keep_mask(seed, x.shape[0], x.shape[1], dropout_p), dropout_scale(dropout_p)
        dyb, dx = dyb * scale, torch.where(keep, dx * scale, 0)
        dropped = torch.where(keep, x, 0)
    return BranchGradients(base_out=dy, x=dx, lora_A=dyb.T @ dropped, lora_B=dy.T @ xa)
