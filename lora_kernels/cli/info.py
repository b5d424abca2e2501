"""`lora-kernels info`: what is installed, what this machine can run, and what `backend="auto"` would choose."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

import lora_kernels
from lora_kernels import config
from lora_kernels.cli import table
from lora_kernels.errors import UnsupportedError
from lora_kernels.planning.device import device_traits, triton_available
from lora_kernels.planning.problem import obstacle_to_triton

# (what it is, M, dropout_p, adapters in fp32) for a 4096 x 4096 linear in bf16 at rank 16.
TYPICAL = (
    ("training", 8192, 0.0, False),
    ("training, dropout 0.05", 8192, 0.05, False),
    ("training, fp32 adapters", 8192, 0.0, True),
    ("decoding", 16, 0.0, False),
)
FEATURES, RANK = 4096, 16


def add_parser(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser("info", help="versions, devices, available backends, what `auto` would choose")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the report."""
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))
    return 0


def collect() -> dict[str, Any]:
    """The report as plain data."""
    devices = [_cpu(), *map(_gpu, range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    return {
        "versions": {
            "lora_kernels": lora_kernels.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "platform": platform.platform(),
        },
        "settings": {"LORA_KERNELS_BACKEND": config.AUTO_BACKEND, "TRITON_INTERPRET": config.INTERPRETED},
        "devices": devices,
        "backends": [backend for device in devices for backend in _backends(device["device"])],
        "plans": [_plan(device["device"], *problem) for device in devices for problem in TYPICAL],
    }


def _version(package: str) -> str | None:
    # From the metadata: importing triton is slow, and only kernels/ may.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    from lora_kernels.planning.device import cpu_name

    pages = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", ()))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if pages else None
    return {
        "device": "cpu",
        "name": cpu_name(),
        "arch": platform.machine(),
        "units": f"{torch.get_num_threads()} threads",
        "memory_bytes": memory,
    }


def _gpu(index: int) -> dict[str, Any]:
    traits, properties = device_traits("cuda", index), torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "arch": traits.arch,
        "units": f"{traits.sm_count} multiprocessors",
        "memory_bytes": properties.total_memory,
    }


def _backends(device: str) -> list[dict[str, Any]]:
    place = torch.device(device)
    obstacle = obstacle_to_triton(
        torch.bfloat16,
        device_traits(place.type, place.index).arch,
        place.type,
        interpreted=config.INTERPRETED,
        triton_available=triton_available(),
    )
    reasons = {"triton": obstacle, "torch": None, "reference": None}
    return [{"backend": b, "device": device, "available": why is None, "why_not": why} for b, why in reasons.items()]


def _plan(device: str, what: str, rows: int, dropout_p: float, fp32_adapters: bool) -> dict[str, Any]:
    problem = {"device": device, "problem": what, "M": rows, "N": FEATURES, "K": FEATURES, "R": RANK}
    try:
        plan = lora_kernels.explain_plan(
            rows,
            FEATURES,
            FEATURES,
            RANK,
            dtype=torch.bfloat16,
            device=device,
            adapter_dtype=torch.float32 if fp32_adapters else None,
            dropout_p=dropout_p,
        )
    except UnsupportedError as error:  # LORA_KERNELS_BACKEND names a backend that cannot serve this device
        return {**problem, "backend": None, "strategy": None, "reason": str(error)}
    tiles = {kernel: dataclasses.asdict(tile) for kernel, tile in plan.tiles}
    return {**problem, "backend": plan.backend, "strategy": plan.strategy, "reason": plan.reason, "tiles": tiles}


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    versions, settings = report["versions"], report["settings"]
    toolkits = [f"{name} {versions[key]}" for name, key in (("CUDA", "cuda"), ("ROCm", "hip")) if versions[key]]
    devices = [
        (d["device"], d["name"], d["arch"], d["units"], _gibibytes(d["memory_bytes"])) for d in report["devices"]
    ]
    backends = [
        (b["device"], b["backend"], "yes" if b["available"] else f"no: {b['why_not']}") for b in report["backends"]
    ]
    plans = [
        (
            p["device"],
            p["problem"],
            str(p["M"]),
            p["backend"] or "-",
            p["strategy"] or "-",
            p["reason"] if p["backend"] else "refused",
        )
        for p in report["plans"]
    ]
    refusals = dict.fromkeys(f"refused: {p['reason']}" for p in report["plans"] if p["backend"] is None)
    return "\n".join(
        [
            f"lora_kernels {versions['lora_kernels']}, torch {versions['torch']} ({' '.join(toolkits) or 'no CUDA'}), "
            f"triton {versions['triton'] or 'not installed'}, Python {versions['python']}, {versions['platform']}",
            f"LORA_KERNELS_BACKEND={settings['LORA_KERNELS_BACKEND']}, "
            f"TRITON_INTERPRET {'set' if settings['TRITON_INTERPRET'] else 'not set'}",
            "",
            table.lines([("device", "name", "arch", "units", "memory"), *devices]),
            "",
            table.lines([("device", "backend", "available"), *backends]),
            "",
            f'what backend="auto" would run: a {FEATURES} x {FEATURES} linear in bf16, r = {RANK}',
            table.lines([("device", "problem", "M", "backend", "strategy", "reason"), *plans]),
            *refusals,
        ]
    )


def _gibibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
