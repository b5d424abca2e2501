"""Memory that shows when nobody wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch


@contextmanager
def poisoned_allocation() -> Iterator[None]:
    """Within it, torch.empty and its relatives hand out NaN, so an output that a kernel left unwritten cannot pass.

    This is PyTorch's own deterministic mode, which fills uninitialised memory. On CUDA it also asks cuBLAS for a
    workspace setting: set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the first call.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # A property of the module object, which type checkers do not see.
    fills = cast(Any, torch.utils.deterministic)
    fill = fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        fills.fill_uninitialized_memory = fill
