"""What the registered ops share: the library they are defined in, flattening, and the context they run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

LIBRARY = torch.library.Library("lora_kernels", "DEF")


def flat(t: Tensor) -> Tensor:
    """[M, columns], and a copy only where the leading dims have no common stride."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def shaped(t: Tensor, leading: torch.Size) -> Tensor:
    """[M, columns] with the leading dims that were flattened away.

    Not as a view: autograd would see one that a custom Function made, and refuse to modify it in place.
    """
    if len(leading) == 1:
        return t
    shaped: Tensor = torch.ops.aten._unsafe_view.default(t, (*leading, t.shape[1]))
    return shaped


_NOTHING = nullcontext()


@contextmanager
def _no_grad_no_autocast(device_type: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def plain(t: Tensor) -> AbstractContextManager[None]:
    """Neither autocast, which would cast the fp32 adapters' products again, nor autograd.

    An exported program calls the op without the autograd.Function around it. Inside that, the context costs nothing.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled(t.device.type):
        return _no_grad_no_autocast(t.device.type)
    return _NOTHING


def multiplies_in_tf32(device: torch.device) -> bool:
    """Whether torch multiplies fp32 matrices there in TF32 at this moment."""
    return device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
