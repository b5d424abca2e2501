"""The `triton` backend of the LoRA linear: which kernels run, in which order, under a plan.

Imports `kernels`, hence triton; itself imported only inside the implementations in `ops.linear`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lora_kernels.kernels.bwd_dx_lora_a import bwd_dx_lora_a
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
from lora_kernels.planning.tiles import Tile


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
    factors = threshold_and_scale(seed, scaling, dropout_p, lora_A)
    bias = None if bias is None else bias.contiguous()
    with launch_scope(x):
        if plan.strategy == "library":
            (xa,) = cast(tuple[Tensor], replayed(_xa, (x, lora_A, seed), factors, plan))
            if xa.dtype != x.dtype:
                y = torch.mm(x, weight.T)
                replayed(_expand_into, (y, xa, lora_B.T, bias), (factors[1],), plan)
                return y, xa
            gain = factors[1].gain
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


def _expand_into(out: Tensor, s: Tensor, e: Tensor, bias: Tensor | None, scale: Scale, plan: Plan) -> tuple[()]:
    """out += bias + s e, for what the library cannot add: fp32 beside 16 bits."""
    expand(
        base=out, s=s, e=e, bias=bias, out=out, out_dtype=out.dtype, gain=scale.gain, precision=plan.precision,
        tile=plan.tile("expand"),
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
    (xa,) = _xa(x, lora_A, seed, threshold, scale, plan)
    persistent_tile = plan.tile("persistent") if plan.strategy == "persistent" else None
    return _gemm(x, weight, True, xa, lora_B.T, bias, None, 0, scale.gain, plan, persistent_tile, follows_s=True), xa


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
    factors = threshold_and_scale(seed, scaling, dropout_p, lora_A)
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
                replayed(_expand_into, (dx, dyb, lora_A, None), (factors[1],), plan)
            else:
                dx = (product(dyb, lora_A, factors[1].gain) if dx is None else dx).addmm_(dy, weight)
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
        dx, d_lora_A = bwd_dx_lora_a(
            x=x if needs.lora_A else None, dyb=dyb, lora_A=lora_A, seed=seed, threshold=threshold,
            gain=scale.gain, dx_dtype=dy.dtype, splits=plan.dx_lora_A_splits, precision=plan.precision,
            tile=plan.tile("bwd_dx_lora_a_dropout"),
        )  # fmt: skip
    elif needs.lora_A:
        assert x is not None and dyb is not None
        d_lora_A = bwd_lora_a(
            x=x, dyb=dyb, seed=seed, threshold=threshold, gain=scale.gain, splits=plan.d_lora_A_splits,
            precision=plan.precision, tile=plan.tile("bwd_lora_a"),
        )  # fmt: skip
    if needs.x and strategy != "library":
        assert weight is not None and dyb is not None
        persistent_tile = plan.tile("persistent", backward=True) if strategy == "persistent" else None
        dx = _gemm(dy, weight, False, dyb, lora_A, None, seed, threshold, scale.gain, plan, persistent_tile)
    return dyb, dx, d_lora_A, d_lora_B, d_bias


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
    persistent_tile: Tile | None,
    *,
    follows_s: bool = False,
) -> Tensor:
    """The large GEMM of either direction with its expand, through descriptors where the layout allows.

    follows_s: the launch right before is the one that writes s, so that a dependent launch may overlap it.
    """
    suffix = "" if seed is None else "_dropout"
    backward = not transpose_weight
    if (
        persistent_tile is not None
        and persistent_available()
        and persistent_serves(lhs=lhs, weight=weight, transpose_weight=transpose_weight, s=s, e=e)
    ):
        return persistent(
            lhs=lhs, weight=weight, transpose_weight=transpose_weight, s=s, e=e, bias=bias, gain=gain,
            tile=persistent_tile, sm_count=plan.sm_count,
        )  # fmt: skip
    n = weight.shape[0 if transpose_weight else 1]
    if plan.use_tma and n * lhs.element_size() % 16 == 0 and tma_serves(lhs, weight):
        return gemm_expand_tma(
            lhs=lhs, weight=weight, transpose_weight=transpose_weight, s=s, e=e, bias=bias, seed=seed,
            threshold=threshold, gain=gain, use_pdl=plan.use_pdl and follows_s, precision=plan.precision,
            tile=plan.tile("gemm_expand_tma" + suffix, backward=backward),
        )  # fmt: skip
    return gemm_expand(
        lhs=lhs, rhs=weight.T if transpose_weight else weight, s=s, e=e, bias=bias, seed=seed,
        threshold=threshold, gain=gain, precision=plan.precision,
        tile=plan.tile("gemm_expand" + suffix, backward=backward),
    )  # fmt: skip
