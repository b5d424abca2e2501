"""What the operations do under torch.autocast: the casts of F.linear, but adapters in float32 stay so."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast_input(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast that F.linear makes under autocast, which leaves float64 alone."""
    return t if t.dtype == torch.float64 else t.to(dtype)


def cast_adapter(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, but float32 adapters stay as they are."""
    return t if t.dtype == torch.float32 else cast_input(t, dtype)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast switched off, where it is on."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
