"""The `triton` backend of the LoRA linear: which kernels run, in which order, under a plan.

Imports `kernels`, hence triton; itself imported only inside the implementations in `ops.linear`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lora_kernels.kernels.beside import forked
from lora_kernels.kernels.bwd_lora_a import bwd_lora_a
from lora_kernels.kernels.expand import expand
from lora_kernels.kernels.gemm_expand import gemm_expand
from lora_kernels.kernels.gemm_expand_tma import gemm_expand_tma, tma_serves
from lora_kernels.kernels.one_pass import one_pass
from lora_kernels.kernels.persistent import persistent, persistent_available, persistent_serves
from lora_kernels.kernels.replay import replayed
from lora_kernels.kernels.shrink import shrink
from lora_kernels.ops._low_rank_torch import product
from lora_kernels.ops._low_rank_triton import from_dy, launch_scope, threshold_and_scale
from lora_kernels.ops._needs import Needs
from lora_kernels.ops._scale import Scale
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
                replayed(_expand_into, (y, xa, lora_B.T, bias, None), (0, scale), plan)
                return y, xa
            gain = scale.gain
            y = product(xa, lora_B.T, gain) if bias is None else torch.addmm(bias, xa, lora_B.T, alpha=gain)
            return y.addmm_(x, weight.T), xa
        outputs = replayed(_fused_forward, (x, weight, lora_A, lora_B, bias, seed), factors, plan)
        return cast(tuple[Tensor, Tensor], outputs)


def _xa(x: Tensor, lora_A: Tensor, seed: Tensor | None, threshold: int, scale: Scale, plan: Plan) -> tuple[Tensor]:
    xa = shrink(
        x=x, lora_A=lora_A, seed=seed, threshold=threshold, scale=scale.inside, splits=plan.xa_splits,
        launches_dependents=plan.use_pdl and plan.strategy == "shrink_fused",
        precision=plan.precision, tile=plan.tile("shrink"),
    )  # fmt: skip
    return (xa,)


def _expand_into(
    out: Tensor,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    scale: Scale,
    plan: Plan,
) -> tuple[()]:
    """out += bias + mask * (s e), for what a product cannot add: fp32 beside 16 bits, and a mask."""
    expand(
        base=out, s=s, e=e, bias=bias, seed=seed, threshold=threshold, out=out, out_dtype=out.dtype, gain=scale.gain,
        precision=plan.precision, tile=plan.tile("expand"),
    )  # fmt: skip
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
    if plan.strategy == "persistent" and lora_A.dtype != x.dtype and _is_persistent(x, weight, True, None, None):
        # The product waits for no xa, which fp32 adapters make dear.
        with forked(x, when=plan.beside) as beside:
            y = persistent(
                lhs=x, weight=weight, transpose_weight=True, s=None, e=None, bias=bias, tile=plan.tile("persistent"),
                sm_count=plan.sm_count,
            )  # fmt: skip
            with beside:
                (xa,) = _xa(x, lora_A, seed, threshold, scale, plan)
        _expand_into(y, xa, lora_B.T, None, None, 0, scale, plan)
        return y, xa
    (xa,) = _xa(x, lora_A, seed, threshold, scale, plan)
    return _gemm(x, weight, True, xa, lora_B.T, bias, None, 0, scale, plan, backward=False), xa


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
    threshold, scale = threshold_and_scale(seed, scaling, dropout_p, lora_A)
    # A bias without adapters is left to a plain sum.
    bias_dtype = torch.promote_types(dy.dtype, lora_A.dtype) if needs.bias else None
    values = threshold, scale, bias_dtype, needs
    inputs = dy, x, weight, lora_A, lora_B, xa, seed
    d_weight = None
    with launch_scope(dy):
        if plan.backward_way.strategy == "library":
            found = _library_backward(*inputs, *values, plan)
        else:
            found = replayed(_fused_backward, inputs, values, plan)
    dx, d_lora_A, d_lora_B, d_bias = found
    # Full fine-tuning beside LoRA: one plain GEMM, and a bias without adapters one plain sum. Nothing to fuse.
    if needs.weight:
        assert x is not None
        d_weight = torch.mm(dy.T, x)
    if needs.bias and d_bias is None:
        d_bias = dy.sum(0, dtype=bias_dtype)
    return dx, d_weight, d_lora_A, d_lora_B, d_bias


def _library_backward(
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
    """(dx, d_lora_A, d_lora_B, d_bias), dx by the library, which cannot add a mask or fp32 adapters."""
    dyb, d_lora_B, d_bias = replayed(_from_dy, (dy, lora_B, xa), (scale, bias_dtype, needs), plan)
    dx = d_lora_A = None
    with forked(dy, when=plan.beside and needs.x and needs.lora_A) as beside:
        if needs.x:
            assert weight is not None and dyb is not None
            adds = seed is None and dyb.dtype == dy.dtype
            dx = product(dyb, lora_A, scale.gain).addmm_(dy, weight) if adds else torch.mm(dy, weight)
        if needs.lora_A:
            with beside:
                (d_lora_A,) = replayed(_d_lora_A, (x, dyb, seed), (threshold, scale), plan)
        if dx is not None and not adds:
            replayed(_expand_into, (dx, dyb, lora_A, None, seed), (threshold, scale), plan)
    return dx, d_lora_A, d_lora_B, d_bias


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
    """(dx, d_lora_A, d_lora_B, d_bias), all of them from kernels."""
    dyb, d_lora_B, d_bias = _from_dy(dy, lora_B, xa, scale, bias_dtype, needs, plan)
    dx = d_lora_A = None
    with forked(dy, when=plan.beside and needs.x and needs.lora_A) as beside:
        if needs.x:
            assert weight is not None and dyb is not None
            dx = _gemm(dy, weight, False, dyb, lora_A, None, seed, threshold, scale, plan, backward=True)
        if needs.lora_A:
            with beside:
                (d_lora_A,) = _d_lora_A(x, dyb, seed, threshold, scale, plan)
    return dx, d_lora_A, d_lora_B, d_bias


def _from_dy(
    dy: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    scale: Scale,
    bias_dtype: torch.dtype | None,
    needs: Needs,
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    return from_dy(dy, lora_B, xa if needs.lora_B else None, bias_dtype, scale, plan, needs_dyb=needs.x or needs.lora_A)


def _d_lora_A(
    x: Tensor | None, dyb: Tensor | None, seed: Tensor | None, threshold: int, scale: Scale, plan: Plan
) -> tuple[Tensor]:
    assert x is not None and dyb is not None
    d_lora_A = bwd_lora_a(
        x=x, dyb=dyb, seed=seed, threshold=threshold, gain=scale.gain, splits=plan.d_lora_A_splits,
        precision=plan.precision, tile=plan.tile("bwd_lora_a"),
    )  # fmt: skip
    return (d_lora_A,)


def _is_persistent(lhs: Tensor, weight: Tensor, transpose_weight: bool, s: Tensor | None, e: Tensor | None) -> bool:
    serves = persistent_serves(lhs=lhs, weight=weight, transpose_weight=transpose_weight, s=s, e=e)
    return serves and bool(persistent_available())


def _gemm(
    lhs: Tensor,
    weight: Tensor,
    transpose_weight: bool,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    scale: Scale,
    plan: Plan,
    *,
    backward: bool,
) -> Tensor:
    """The large GEMM of either direction with its expand, through descriptors where the layout allows.

    The forward's follows the launch that writes s, so that a dependent launch may overlap it.
    """
    suffix = "" if seed is None else "_dropout"
    if (plan.backward_way.strategy if backward else plan.strategy) == "persistent":
        adds = seed is None and s.dtype == lhs.dtype
        terms = (s, e) if adds else (None, None)
        if _is_persistent(lhs, weight, transpose_weight, *terms):
            out = persistent(
                lhs=lhs, weight=weight, transpose_weight=transpose_weight, s=terms[0], e=terms[1], bias=bias,
                gain=scale.gain if adds else 1.0, tile=plan.tile("persistent", backward=backward),
                sm_count=plan.sm_count,
            )  # fmt: skip
            if not adds:
                _expand_into(out, s, e, None, seed, threshold, scale, plan)
            return out
    n = weight.shape[0 if transpose_weight else 1]
    if plan.use_tma and n * lhs.element_size() % 16 == 0 and tma_serves(lhs, weight):
        return gemm_expand_tma(
            lhs=lhs, weight=weight, transpose_weight=transpose_weight, s=s, e=e, bias=bias, seed=seed,
            threshold=threshold, gain=scale.gain, use_pdl=plan.use_pdl and not backward, precision=plan.precision,
            tile=plan.tile("gemm_expand_tma" + suffix, backward=backward),
        )  # fmt: skip
    return gemm_expand(
        lhs=lhs, rhs=weight.T if transpose_weight else weight, s=s, e=e, bias=bias, seed=seed,
        threshold=threshold, gain=scale.gain, precision=plan.precision,
        tile=plan.tile("gemm_expand" + suffix, backward=backward),
    )  # fmt: skip
