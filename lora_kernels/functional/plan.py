"""What `backend="auto"` would do, without doing it."""

from __future__ import annotations

import torch

from lora_kernels import config
from lora_kernels.errors import ArgumentError, DeviceError
from lora_kernels.ops import plan_of, problem_of
from lora_kernels.planning import Plan
from lora_kernels.validation import check_dropout_p, check_dtypes, check_rank


def explain_plan(
    M: int,
    N: int,
    K: int,
    R: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    adapter_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Plan:
    """What `lora_linear(..., backend="auto")` would run for a problem of this size, and why.

    Args:
        M: tokens, after flattening; >= 0.
        N: out_features; >= 1.
        K: in_features; >= 1.
        R: rank, 1 to 512.
        dtype: of x and weight.
        device: where the tensors live; a CUDA device must exist.
        adapter_dtype: of lora_A and lora_B; None means `dtype`.
        dropout_p: probability to drop, in [0, 1).
        training: False means that dropout is off, as in an evaluating layer.

    Returns:
        Plan with `.backend`, `.strategy`, `.reason`, `.backward`, `.costs`, `.tiles` and the other choices.

    Raises:
        ArgumentError: a size, the rank or dropout_p is out of range.
        DtypeError: a dtype the operation does not compute in.
        DeviceError: the device is not there.
        ArgumentError: LORA_KERNELS_BACKEND names no backend.
        UnsupportedError: LORA_KERNELS_BACKEND names a backend that cannot serve the problem.

    Example:
        >>> import torch, lora_kernels
        >>> lora_kernels.explain_plan(4096, 1024, 1024, 16, dtype=torch.float32, device="cpu").backend
        'torch'
    """
    for name, size, least in (("M", M, 0), ("N", N, 1), ("K", K, 1)):
        if size < least:
            raise ArgumentError(f"{name} must be at least {least}; got {size}. Pass the size of the flattened problem.")
    check_rank("R", R)
    check_dropout_p(dropout_p)
    adapter_dtype = dtype if adapter_dtype is None else adapter_dtype
    device = torch.device(device)
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        raise DeviceError(f"device must exist on this machine and hold data; got {str(device)!r}. Pass 'cpu'.")
    check_dtypes(device.type, x=dtype, weight=dtype, lora_A=adapter_dtype, lora_B=adapter_dtype)
    problem = problem_of(
        M, N, K, R, dtype=dtype, adapter_dtype=adapter_dtype, dropout=training and dropout_p > 0, device=device
    )
    return plan_of(problem, config.auto_backend(), device)
