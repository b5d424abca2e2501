"""The `triton` backend of the LoRA linear: which kernels run, in which order, under a plan.

Imports `kernels`, hence triton; itself imported only inside the implementations in `ops.linear`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lora_kernels.kernels.beside import forked
from lora_kernels.kernels.gemm_expand import gemm_expand
from lora_kernels.kernels.gemm_expand_tma import gemm_expand_tma, tma_serves
from lora_kernels.kernels.in_parts import in_parts
from lora_kernels.kernels.one_pass import one_pass
from lora_kernels.kernels.persistent import persistent, persistent_available, persistent_serves
from lora_kernels.kernels.replay import replayed
from lora_kernels.ops._needs import Needs
from lora_kernels.ops._scale import Scale
from lora_kernels.ops.low_rank_torch import product
from lora_kernels.ops.low_rank_triton import (
    expanded,
    from_dy,
    gradient_of_lora_A,
    launch_scope,
    masked_dx_and_d_lora_A,
    threshold_and_scale,
    xa_of,
)
from lora_kernels.planning import Plan


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], xa [M, R]) for x [M, K], M >= 1."""
    _, scale = factors = threshold_and_scale(seed, scaling, dropout_p, lora_A)
    bias = None if bias is None else bias.contiguous()
    with launch_scope(x):
        if plan.strategy == "library":
            (xa,) = cast(tuple[Tensor], replayed(_xa, (x, lora_A, seed), factors, plan))
            if xa.dtype != x.dtype:
                y = torch.mm(x, weight.T)
                replayed(_expand_into, (y, xa, lora_B.T, bias), (scale,), plan)
                return y, xa
            y = product(xa, lora_B.T, scale.gain) if bias is None else torch.addmm(bias, xa, lora_B.T, alpha=scale.gain)
            return y.addmm_(x, weight.T), xa
        outputs = replayed(_fused_forward, (x, weight, lora_A, lora_B, bias, seed), factors, plan)
        return cast(tuple[Tensor, Tensor], outputs)


def _xa(x: Tensor, lora_A: Tensor, seed: Tensor | None, threshold: int, scale: Scale, plan: Plan) -> tuple[Tensor]:
    return (xa_of(x, lora_A, seed, threshold, scale, plan, pdl=plan.use_pdl and plan.strategy == "shrink_fused"),)


def _expand_into(out: Tensor, s: Tensor, e: Tensor, bias: Tensor | None, scale: Scale, plan: Plan) -> tuple[()]:
    """out += bias + s e, for what the library cannot add: fp32 beside 16 bits."""
    expanded(out, s, e, out.dtype, scale, plan, bias=bias, out=out)
    return ()


def _fused_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    scale: Scale,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    if plan.strategy == "one_pass":
        return one_pass(
            x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, seed=seed, threshold=threshold,
            scale=scale.inside, gain=scale.gain, splits=plan.one_pass_splits, precision=plan.precision,
            tile=plan.tile("one_pass"), sum_tile=plan.tile("one_pass_sum"),
        )  # fmt: skip
    (xa,) = _xa(x, lora_A, seed, threshold, scale, plan)
    if plan.strategy == "persistent" and _persistent_serves(x, weight, True, xa, lora_B.T):
        return _persistent(x, weight, True, *_terms(x, xa, lora_B.T, by_columns=True), bias, scale.gain, plan), xa
    return _gemm(x, weight, True, xa, lora_B.T, bias, None, 0, scale.gain, plan), xa


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: Needs,
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, lora_A, lora_B, bias; None where not needed. What a needed one reads is there; M >= 1."""
    _, scale = factors = threshold_and_scale(seed, scaling, dropout_p, lora_A)
    bias_dtype = torch.promote_types(dy.dtype, lora_A.dtype) if needs.bias else None
    d_weight = None
    with launch_scope(dy):
        # A bias without adapters is left to a plain sum.
        dyb, dx, d_lora_A, d_lora_B, d_bias = replayed(
            _fused_backward, (dy, x, weight, lora_A, lora_B, xa, seed), (*factors, bias_dtype, needs), plan
        )
        if needs.x and plan.backward_way.strategy == "library":
            assert weight is not None and dyb is not None
            if dx is None and dyb.dtype != dy.dtype:
                dx = torch.mm(dy, weight)
                replayed(_expand_into, (dx, dyb, lora_A, None), (scale,), plan)
            else:
                dx = (product(dyb, lora_A, scale.gain) if dx is None else dx).addmm_(dy, weight)
    # Full fine-tuning beside LoRA: one plain GEMM, and a bias without adapters one plain sum. Nothing to fuse.
    if needs.weight:
        assert x is not None
        d_weight = torch.mm(dy.T, x)
    if needs.bias and d_bias is None:
        d_bias = dy.sum(0, dtype=bias_dtype)
    return dx, d_weight, d_lora_A, d_lora_B, d_bias


def _fused_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    scale: Scale,
    bias_dtype: torch.dtype | None,
    needs: Needs,
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    """(dyb, dx, d_lora_A, d_lora_B, d_bias); under "library", dx is its low-rank part, or None if that has no mask."""
    strategy = plan.backward_way.strategy
    dx = d_lora_A = None
    dyb, d_lora_B, d_bias = from_dy(
        dy, lora_B, xa if needs.lora_B else None, bias_dtype, scale, plan, needs_dyb=needs.x or needs.lora_A
    )
    if needs.x and strategy == "library" and seed is not None:
        assert dyb is not None
        lora_x = x if needs.lora_A else None
        dx, d_lora_A = masked_dx_and_d_lora_A(lora_x, dyb, lora_A, seed, threshold, scale, plan, dy.dtype)
        return dyb, dx, d_lora_A, d_lora_B, d_bias

    def from_x() -> Tensor:
        assert x is not None and dyb is not None
        return gradient_of_lora_A(x, dyb, seed, threshold, scale, plan)

    if needs.x and strategy != "library":
        assert weight is not None and dyb is not None
        if strategy == "persistent" and _persistent_serves(dy, weight, False, dyb, lora_A):
            s, e = _terms(dy, dyb, lora_A, by_columns=False)
            with forked(when=plan.beside and needs.lora_A) as beside:
                dx = _persistent(dy, weight, False, s, e, None, scale.gain, plan)
                if needs.lora_A:
                    with beside:
                        d_lora_A = from_x()
            return dyb, dx, d_lora_A, d_lora_B, d_bias
        dx = _gemm(dy, weight, False, dyb, lora_A, None, seed, threshold, scale.gain, plan)
    if needs.lora_A:
        d_lora_A = from_x()
    return dyb, dx, d_lora_A, d_lora_B, d_bias


def _persistent_serves(lhs: Tensor, weight: Tensor, transpose_weight: bool, s: Tensor, e: Tensor) -> bool:
    """Whether the persistent kernel can take these layouts, in this Triton; parts are made as it wants them."""
    if s.dtype == torch.float32 and lhs.dtype == torch.bfloat16:
        serves = persistent_serves(lhs=lhs, weight=weight, transpose_weight=transpose_weight)
    else:
        serves = persistent_serves(lhs=lhs, weight=weight, transpose_weight=transpose_weight, s=s, e=e)
    return serves and bool(persistent_available())


def _terms(lhs: Tensor, s: Tensor, e: Tensor, *, by_columns: bool) -> tuple[Tensor, Tensor]:
    """s [M, *] and e [*, N] of the persistent kernel's expand: as they are, or fp32 ones in parts."""
    return (s, e) if s.dtype == lhs.dtype else in_parts(s=s, e=e, by_columns=by_columns)


def _persistent(
    lhs: Tensor, weight: Tensor, transpose_weight: bool, s: Tensor, e: Tensor, bias: Tensor | None, gain: float,
    plan: Plan,
) -> Tensor:  # fmt: skip
    return persistent(
        lhs=lhs, weight=weight, transpose_weight=transpose_weight, s=s, e=e, bias=bias, gain=gain,
        tile=plan.tile("persistent", backward=not transpose_weight), sm_count=plan.sm_count,
    )  # fmt: skip


def _gemm(
    lhs: Tensor,
    weight: Tensor,
    transpose_weight: bool,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    gain: float,
    plan: Plan,
) -> Tensor:
    """The large GEMM of either direction with its expand, through descriptors where the layout allows.

    The forward's follows the launch that writes s, so that a dependent launch may overlap it.
    """
    suffix = "" if seed is None else "_dropout"
    backward = not transpose_weight
    n = weight.shape[0 if transpose_weight else 1]
    if plan.use_tma and n * lhs.element_size() % 16 == 0 and tma_serves(lhs, weight):
        return gemm_expand_tma(
            lhs=lhs, weight=weight, transpose_weight=transpose_weight, s=s, e=e, bias=bias, seed=seed,
            threshold=threshold, gain=gain, use_pdl=plan.use_pdl and transpose_weight, precision=plan.precision,
            tile=plan.tile("gemm_expand_tma" + suffix, backward=backward),
        )  # fmt: skip
    return gemm_expand(
        lhs=lhs, rhs=weight.T if transpose_weight else weight, s=s, e=e, bias=bias, seed=seed,
        threshold=threshold, gain=gain, precision=plan.precision,
        tile=plan.tile("gemm_expand" + suffix, backward=backward),
    )  # fmt: skip
