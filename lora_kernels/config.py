"""The only reader of environment variables: LORA_KERNELS_*, XDG_CACHE_HOME and TRITON_INTERPRET.

LORA_KERNELS_BACKEND: what `backend="auto"` means in this process: `auto` (the planner decides), `torch`, `triton` or
`reference`. For the question "is it the kernel?" without touching code.

LORA_KERNELS_CACHE: the folder for what `lora-kernels tune` measures; empty switches it off. Default:
$XDG_CACHE_HOME/lora_kernels, or ~/.cache/lora_kernels.

LORA_KERNELS_COMMIT: what a benchmark's rows name as the commit, in a copy of the tree that has another history or none.

TRITON_INTERPRET is Triton's own: kernels decorated while it is set run in Triton's interpreter, on CPU tensors.

All are read once, at import, as Triton reads its own.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_kernels.errors import ArgumentError

BACKENDS = ("auto", "torch", "triton", "reference")


AUTO_BACKEND = os.environ.get("LORA_KERNELS_BACKEND", "auto")


def auto_backend() -> str:
    """What `backend="auto"` means. Checked where it is used: an import that fails cannot be told from a broken one.

    Raises:
        ArgumentError: LORA_KERNELS_BACKEND names no backend.
    """
    if AUTO_BACKEND not in BACKENDS:
        raise ArgumentError(
            f"LORA_KERNELS_BACKEND must be one of {', '.join(BACKENDS)}; got {AUTO_BACKEND!r}. "
            "Unset it, or name one of them."
        )
    return AUTO_BACKEND


def _cache() -> Path | None:
    folder = os.environ.get("LORA_KERNELS_CACHE")
    if folder == "":
        return None
    if folder is None:
        # Not Path.home(), which raises where a container's user has none.
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lora_kernels"
    return Path(folder)


CACHE = _cache()

COMMIT = os.environ.get("LORA_KERNELS_COMMIT", "")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
