"""Memory that shows when nobody wrote it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch


@contextmanager
def poisoned_allocation() -> Iterator[None]:
    """Within it, torch.empty and its relatives hand out NaN, so an output that a kernel left unwritten cannot pass.

    This is PyTorch's own deterministic mode, which fills uninitialised memory. On CUDA the mode also wants cuBLAS set
    up for it (CUBLAS_WORKSPACE_CONFIG), which is beside the point here: that complaint is left out.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # A property of the module object, which type checkers do not see.
    fills = cast(Any, torch.utils.deterministic)
    fill = fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Deterministic behavior was enabled", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        fills.fill_uninitialized_memory = fill
