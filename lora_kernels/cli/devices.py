"""The --device argument."""

from __future__ import annotations

import torch

from lora_kernels.errors import UnsupportedError


def device_of(name: str | None) -> torch.device:
    """The device of that name, which exists; None: the current GPU if there is one, else the CPU.

    Raises:
        UnsupportedError: there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"--device must be a device of this machine; got {name!r}: {reason}") from None
    return device
