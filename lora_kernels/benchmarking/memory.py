"""Bytes: what forward keeps for backward, and the most that was allocated at once."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


def saved_bytes(forward: Callable[[], object], *, beyond: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd holds between forward and backward.

    Counts each storage once, however many views of it are saved, and leaves out the storages of `beyond`: inputs and
    parameters, which are alive anyway. Tensors that a custom Function hides in plain attributes are invisible to the
    hooks; none of the layers compared here does that.

    Args:
        forward: runs the forward pass; its result is kept alive until the count is taken.
        beyond: tensors whose storage is not counted.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in beyond}
    held: dict[int, torch.UntypedStorage] = {}  # references, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in held.values())
    del result
    return total


def peak_bytes(fn: Callable[[], object], *, device: torch.device) -> int:
    """The most bytes that were allocated at once during `fn`, above what was allocated before it.

    CUDA: the caching allocator's own peak. CPU: the running sum over every allocation and release that the profiler
    sees PyTorch's allocator make; scratch memory inside the BLAS libraries is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Kineto announces each start and stop on stderr, in the middle of whatever table is being printed.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # One cycle, so nothing accumulates: without the option torch 2.11 warns that a cycle forgets those before it.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = fn()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    )
    allocated = peak = 0
    for *_, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak
