"""`lora_branch`: y = base_out + s (drop(x) A^T) B^T, what an adapter adds to a base that is computed elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import config, validation
from lora_kernels.functional._autocast import cast_adapter, cast_input, without_autocast
from lora_kernels.ops import BRANCH
from lora_kernels.ops.node import differentiable
from lora_kernels.reference import branch as reference

_call = differentiable(BRANCH)


def lora_branch(
    base_out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_offset: tuple[int | Tensor, int | Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """The output of a base layer plus its LoRA term, for a base that is computed elsewhere.

    y = base_out + scaling * (drop(x) A^T) B^T        drop(x) = mask * x / (1 - dropout_p)

    For bases that `lora_linear` cannot compute itself: quantised, offloaded, hooked. It never sees the weight. For a
    plain linear base `lora_linear` does less work.

    Args:
        base_out: [*, N] float32, float16 or bfloat16 (float64 on the CPU), in x's dtype or another; any strides. It is
            left as it is: y is a new tensor.
        x: [*, K] float32, float16 or bfloat16 (float64 on the CPU), with base_out's leading dims; any leading dims, any
            strides, M = 0 allowed.
        lora_A: [R, K] in x's dtype or float32; 1 <= R <= 512.
        lora_B: [N, R] in lora_A's dtype.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA; a 0-d tensor is taken as in `lora_linear`.
        dropout_p: probability to drop an element of x, in [0, 1); applied to the nearest 1/65536.
        dropout_seed: an int or a one-element int64 tensor on x's device: the same seed gives the same mask as in
            `lora_linear`, on every backend and device. None draws one from torch's generator for x's device. Under
            torch.compile pass a tensor, since an int is compiled in.
        dropout_offset: (row, column) of x's first element where x is a shard of a larger input, such as a rank's part
            of the batch or of K: the shards' masks are then those of the whole. Rows count after flattening; the column
            is a multiple of 8. Ints, or one-element int64 tensors on x's device.
        backend: "triton" (fused kernels), "torch" (library GEMMs), "reference" (plain differentiable PyTorch), or
            "auto". A named backend is honoured or raises.

    Returns:
        [*, N] in base_out's dtype, contiguous. Under torch.autocast, x is cast as for F.linear; float32 adapters stay
        so; base_out is no operand of a product and keeps its dtype.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit together.
        ArgumentError: dropout_p, scaling, dropout_seed, dropout_offset or backend is out of range.
        UnsupportedError: the named backend cannot serve this call; or a second or forward-mode derivative was asked
            for.

    Numerics:
        Products accumulate in fp32 (fp64 for float64); base_out is added in it, whatever its dtype, and each tensor is
        rounded once. Gradients come in each input's own dtype; base_out's is dy itself, and those of float32 adapters
        are never rounded to 16 bits. Every output is within twice the error of the eager chain against fp64 (tests/).
        Dropped elements are exactly zero, also where x is Inf or NaN; elsewhere Inf and NaN propagate as there.

    Determinism:
        Masks are the same function of seed, row and column everywhere. Kernels give the same bits for the same call:
        reductions run in fixed order, without floating-point atomics. Where a library multiplies, its bits are the
        library's to promise: on a CPU they may change with the operands' addresses, threads and instructions
        (docs/design/numerics.md has what PyTorch and MKL offer).

    Saved for backward:
        x, and M * R elements of lora_A's dtype; with dropout, 8 bytes for the seed (24 with an offset). No mask, no
        copy of x, and nothing of base_out.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. (3), the second term; over a
        quantised base: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, eq. (5).

    Example:
        >>> import torch
        >>> from lora_kernels import lora_branch
        >>> x, base = torch.randn(2, 5, 64), torch.nn.Linear(64, 32)
        >>> lora_A, lora_B = torch.randn(8, 64, requires_grad=True), torch.zeros(32, 8, requires_grad=True)
        >>> y = lora_branch(base(x), x, lora_A, lora_B, scaling=2.0, dropout_p=0.1)
        >>> torch.allclose(y, base(x))
        True
    """
    validation.check_backend(backend)
    validation.check_dropout_p(dropout_p)
    validation.check_scaling(scaling)
    validation.check_branch(base_out, x, lora_A, lora_B)
    validation.check_seed(dropout_seed, dropout_offset, x.device)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        # The cast F.linear makes; float32 adapters stay as they are.
        dtype = torch.get_autocast_dtype(device_type)
        x, lora_A, lora_B = cast_input(x, dtype), cast_adapter(lora_A, dtype), cast_adapter(lora_B, dtype)
    validation.check_dtypes(device_type, x=x.dtype, lora_A=lora_A.dtype, lora_B=lora_B.dtype, base_out=base_out.dtype)
    if backend == "auto":
        backend = config.auto_backend()
    validation.check_servable(backend, x, base_out)
    seed = validation.seed_tensor(dropout_seed, dropout_offset, x.device) if dropout_p > 0 else None

    if isinstance(scaling, Tensor):
        lora_B, scaling = lora_B * scaling, 1.0
    scaling, dropout_p = float(scaling), float(dropout_p)
    if backend == "reference":
        with without_autocast(device_type):
            y = reference.lora_branch(
                base_out.reshape(-1, base_out.shape[-1]), x.reshape(-1, x.shape[-1]), lora_A, lora_B,
                scaling=scaling, dropout_p=dropout_p, seed=seed,
            )  # fmt: skip
        return y.view(base_out.shape)
    return _call((base_out, x, lora_A, lora_B, seed, scaling, dropout_p, backend))
