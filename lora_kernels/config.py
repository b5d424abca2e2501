"""The only reader of environment variables: LORA_KERNELS_* and TRITON_INTERPRET.

LORA_KERNELS_BACKEND: what `backend="auto"` means in this process: `auto` (the planner decides), `torch`, `triton` or
`reference`. For the question "is it the kernel?" without touching code.

TRITON_INTERPRET is Triton's own: kernels decorated while it is set run in Triton's interpreter, on CPU tensors.

Both are read once, at import, as Triton reads its own.
"""

from __future__ import annotations

import os

from lora_kernels.errors import ArgumentError

BACKENDS = ("auto", "torch", "triton", "reference")


def _auto_backend() -> str:
    name = os.environ.get("LORA_KERNELS_BACKEND", "auto")
    if name not in BACKENDS:
        raise ArgumentError(
            f"LORA_KERNELS_BACKEND must be one of {', '.join(BACKENDS)}; got {name!r}. Unset it, or name one of them."
        )
    return name


AUTO_BACKEND = _auto_backend()

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
