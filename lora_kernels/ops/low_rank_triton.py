"""The adapter half of the `triton` backends: xa, dyb with dB and d_bias, dA with a masked dx; and the launch scope.

Imports `kernels`, hence triton; itself imported only inside the implementations in `ops`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lora_kernels.kernels.bwd_dx_lora_a import bwd_dx_lora_a
from lora_kernels.kernels.bwd_lora_a import bwd_lora_a
from lora_kernels.kernels.bwd_lora_b import LoRABGradients, bwd_lora_b
from lora_kernels.kernels.expand import expand
from lora_kernels.kernels.interpreter import is_interpreting, repaired
from lora_kernels.kernels.shrink import shrink
from lora_kernels.ops._scale import Scale, scale_of
from lora_kernels.planning import Plan
from lora_kernels.reference.philox import dropout_threshold


def launch_scope(t: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be t's; interpreted, its numpy arithmetic needs repair."""
    if is_interpreting():
        return repaired()
    if t.is_cuda and t.get_device() != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return nullcontext()


def threshold_and_scale(seed: Tensor | None, scaling: float, dropout_p: float, adapter: Tensor) -> tuple[int, Scale]:
    """(what a kept 16-bit value is at least, the factors of scaling / (1 - p)); no seed is no dropout."""
    threshold = 0 if seed is None else dropout_threshold(dropout_p)
    return threshold, scale_of(seed, scaling, dropout_p, adapter.dtype)


def from_dy(
    dy: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    bias_dtype: torch.dtype | None,
    scale: Scale,
    plan: Plan,
    *,
    needs_dyb: bool,
) -> LoRABGradients:
    """dyb, dB and db: from one read of dy where the plan says so, else dyb from a second.

    None where not asked for: xa None asks for no dB. A bias without any of the others is left to a plain sum.
    """
    one_read = needs_dyb and plan.dy_reads == 1
    found = LoRABGradients(None, None, None)
    if one_read or xa is not None:
        found = bwd_lora_b(
            dy=dy, lora_B=lora_B, xa=xa, bias_dtype=bias_dtype, needs_dyb=one_read, scale=scale.inside,
            gain=scale.gain, splits=plan.d_lora_B_splits, precision=plan.precision, tile=plan.tile("bwd_lora_b"),
        )  # fmt: skip
    if needs_dyb and found.dyb is None:
        dyb = shrink(
            x=dy, lora_A=lora_B.T, seed=None, threshold=0, scale=scale.inside, splits=plan.dyb_splits,
            precision=plan.precision, tile=plan.tile("shrink"),
        )  # fmt: skip
        return found._replace(dyb=dyb)
    return found


def xa_of(
    x: Tensor, lora_A: Tensor, seed: Tensor | None, threshold: int, scale: Scale, plan: Plan, *, pdl: bool = False
) -> Tensor:
    """xa [M, R] with scale.inside; pdl: the next kernel may start before it ends."""
    return shrink(
        x=x, lora_A=lora_A, seed=seed, threshold=threshold, scale=scale.inside, splits=plan.xa_splits,
        launches_dependents=pdl, precision=plan.precision, tile=plan.tile("shrink"),
    )  # fmt: skip


def gradient_of_lora_A(x: Tensor, dyb: Tensor, seed: Tensor | None, threshold: int, scale: Scale, plan: Plan) -> Tensor:
    """dA [R, K] alone."""
    return bwd_lora_a(
        x=x, dyb=dyb, seed=seed, threshold=threshold, gain=scale.gain, splits=plan.d_lora_A_splits,
        precision=plan.precision, tile=plan.tile("bwd_lora_a"),
    )  # fmt: skip


def masked_dx_and_d_lora_A(
    x: Tensor | None,
    dyb: Tensor,
    lora_A: Tensor,
    seed: Tensor,
    threshold: int,
    scale: Scale,
    plan: Plan,
    dx_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """mask * (dyb A) [M, K], and dA where x is given: one evaluation of the mask for both."""
    return bwd_dx_lora_a(
        x=x, dyb=dyb, lora_A=lora_A, seed=seed, threshold=threshold, gain=scale.gain, dx_dtype=dx_dtype,
        splits=plan.dx_lora_A_splits, precision=plan.precision, tile=plan.tile("bwd_dx_lora_a_dropout"),
    )  # fmt: skip


def expanded(
    base: Tensor | None,
    s: Tensor,
    e: Tensor,
    out_dtype: torch.dtype,
    scale: Scale,
    plan: Plan,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """base + bias + gain s e [M, *], with s [M, R] and e [R, *]; into out where that is given."""
    return expand(
        base=base, s=s, e=e, out_dtype=out_dtype, gain=scale.gain, precision=plan.precision, tile=plan.tile("expand"),
        bias=bias, out=out,
    )  # fmt: skip
