"""`lora_linear`: y = x W^T + b + s (drop(x) A^T) B^T as one operation, with fused gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import config, validation
from lora_kernels.functional._autocast import cast_adapter, cast_input, without_autocast
from lora_kernels.ops import LINEAR
from lora_kernels.ops.node import differentiable
from lora_kernels.reference import linear as reference

_call = differentiable(LINEAR)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_offset: tuple[int | Tensor, int | Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with a LoRA adapter, base and low-rank product computed as one operation.

    y = x W^T + b + scaling * (drop(x) A^T) B^T        drop(x) = mask * x / (1 - dropout_p)

    Args:
        x: [*, K] float32, float16 or bfloat16 (float64 on the CPU); any leading dims, any strides, M = 0 allowed.
        weight: [N, K] in x's dtype.
        lora_A: [R, K] in x's dtype or float32; 1 <= R <= 512.
        lora_B: [N, R] in lora_A's dtype.
        bias: [N] in x's dtype or the adapters', or None.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA. As a 0-d tensor it may change without recompiling a
            compiled graph, is differentiable, and costs a scaled copy of lora_B, rounded to lora_B's dtype.
        dropout_p: probability to drop an element of the LoRA path's input, in [0, 1); applied to the nearest 1/65536.
        dropout_seed: an int or a one-element int64 tensor on x's device: the same seed gives the same mask on every
            backend and device. None draws one from torch's generator for x's device. Under torch.compile pass a tensor,
            since an int is compiled in.
        dropout_offset: (row, column) of x's first element where x is a shard of a larger input, such as a rank's part
            of the batch or of K: the shards' masks are then those of the whole. Rows count after flattening; the column
            is a multiple of 8. Ints, or one-element int64 tensors on x's device.
        backend: "triton" (fused kernels), "torch" (library GEMMs), "reference" (plain differentiable PyTorch), or
            "auto". A named backend is honoured or raises.

    Returns:
        [*, N] in x's dtype. Under torch.autocast, x, weight and bias are cast as for F.linear; float32 adapters stay
        so, and a float32 bias beside them.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit together.
        ArgumentError: dropout_p, scaling, dropout_seed, dropout_offset or backend is out of range.
        UnsupportedError: the named backend cannot serve this call; or a second or forward-mode derivative was asked
            for.

    Numerics:
        Products accumulate in fp32 (fp64 for float64) and each tensor is rounded once, or twice where a library GEMM
        adds onto a rounded term. Gradients come in each parameter's own dtype; those of float32 adapters are never
        rounded to 16 bits. Every output is within twice the error of the eager chain against fp64 (tests/). Dropped
        elements are exactly zero, also where x is Inf or NaN; elsewhere Inf and NaN propagate as in F.linear.

    Determinism:
        Masks are the same function of seed, row and column everywhere. Kernels give the same bits for the same call:
        reductions run in fixed order, without floating-point atomics. Where a library multiplies, its bits are the
        library's to promise: on a CPU they may change with the operands' addresses, threads and instructions
        (docs/design/numerics.md has what PyTorch and MKL offer).

    Saved for backward:
        x, and M * R elements of lora_A's dtype; with dropout, 8 bytes for the seed (24 with an offset). No mask, no
        copy of x.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. (3); dropout on the adapter's
        input as in its released code. Scaling for rsLoRA: Kalajdzievski 2023, eq. (3).

    Example:
        >>> import torch
        >>> from lora_kernels import lora_linear
        >>> x, weight = torch.randn(2, 5, 64), torch.randn(32, 64)
        >>> lora_A, lora_B = torch.randn(8, 64, requires_grad=True), torch.zeros(32, 8, requires_grad=True)
        >>> y = lora_linear(x, weight, lora_A, lora_B, scaling=2.0, dropout_p=0.1)
        >>> y.shape
        torch.Size([2, 5, 32])
    """
    validation.check_backend(backend)
    validation.check_dropout_p(dropout_p)
    validation.check_scaling(scaling)
    validation.check_linear(x, weight, lora_A, lora_B, bias)
    validation.check_seed(dropout_seed, dropout_offset, x.device)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        # The casts F.linear makes; float32 adapters stay as they are, and a float32 bias beside them.
        dtype = torch.get_autocast_dtype(device_type)
        x, weight = cast_input(x, dtype), cast_input(weight, dtype)
        lora_A, lora_B = cast_adapter(lora_A, dtype), cast_adapter(lora_B, dtype)
        if bias is not None and bias.dtype != lora_A.dtype:
            bias = cast_input(bias, dtype)
    validation.check_dtypes(
        device_type,
        x=x.dtype,
        weight=weight.dtype,
        lora_A=lora_A.dtype,
        lora_B=lora_B.dtype,
        bias=None if bias is None else bias.dtype,
    )
    if backend == "auto":
        backend = config.auto_backend()
    validation.check_servable(backend, x)
    seed = validation.seed_tensor(dropout_seed, dropout_offset, x.device) if dropout_p > 0 else None

    if isinstance(scaling, Tensor):
        lora_B, scaling = lora_B * scaling, 1.0
    scaling, dropout_p = float(scaling), float(dropout_p)
    if backend == "reference":
        with without_autocast(device_type):
            y = reference.lora_linear(
                x.reshape(-1, x.shape[-1]), weight, lora_A, lora_B, bias,
                scaling=scaling, dropout_p=dropout_p, seed=seed,
            )  # fmt: skip
        return y.view(*x.shape[:-1], weight.shape[0])
    return _call((x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, backend))
