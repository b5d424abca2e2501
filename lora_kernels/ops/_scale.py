"""alpha = scaling / (1 - p), in two factors: one that the stored rank-sized products hold, and one put back in fp32.

xa and dyb are rounded to the adapters' dtype with alpha inside. fp16 ends at 65504 and loses bits below 6e-5: with
alpha = 32 inside, xa would be Inf where |x A^T| is 2048. So an fp16 product leaves out the power of two in scaling,
`gain`, which multiplies what it is used in: nothing overflows that would not in drop(x) A^T itself. gain is a matter of
scaling alone, since a backward that asks for dB has no seed. bf16 and fp32 have exponents enough, and gain is 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.reference.philox import dropout_scale

LARGEST_EXPONENT = 14
"""gain and its inverse are normal fp16 numbers."""


class Scale(NamedTuple):
    """alpha = inside * gain."""

    inside: float
    gain: float


def scale_of(seed: Tensor | None, scaling: float, dropout_p: float, dtype: torch.dtype) -> Scale:
    """The factors for rank-sized products of this dtype; no seed is no dropout."""
    alpha = scaling if seed is None else scaling * dropout_scale(dropout_p)
    if dtype != torch.float16 or scaling == 0 or not math.isfinite(scaling):
        return Scale(alpha, 1.0)
    exponent = math.frexp(scaling)[1] - 1
    gain = 2.0 ** max(-LARGEST_EXPONENT, min(exponent, LARGEST_EXPONENT))
    return Scale(alpha / gain, gain)
