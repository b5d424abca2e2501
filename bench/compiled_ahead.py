"""Kernels compiled before a GPU is at hand: what a lent machine would spend its first minutes on.

    python -m bench.compiled_ahead [--out FOLDER] [--total SECONDS]

For an H100 or H200, without one: Triton's cache is filled by the plans of the suites' cases, of bench.kernels and of
the main tests, launchers included, and packed into FOLDER/kernels.tar.xz beside canary.json. There `bench.first_run`
unpacks it to the same path, if the canary agrees: Python, Triton's build, its assembler, the environment that it reads,
the path. Run it with that machine's Python and Triton, after the last change of a kernel: the keys hold the source.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.planning import Problem

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "results" / "local" / "compiled"
CACHE = Path(tempfile.gettempdir()) / "lora_kernels-compiled"
"""Triton's files name each other by their paths: the same here and there."""
KERNELS, CANARY = "kernels.tar.xz", "canary.json"
MOST_BYTES = 48 << 20
KEPT = (".cubin", ".json", ".so")
"""What a launch reads; the stages on the way to the machine code are a dozen times as large."""
DEVICE, SM_COUNT = "NVIDIA H100 80GB HBM3", 132
SIZES = ((150, 200, 168), (1000, 1030, 520), (300, 264, 520), (200, 264, 136))
"""Of the tests, M, N, K."""


def canary() -> dict[str, str]:
    """What a key of Triton's cache depends on besides the kernel, part by part."""
    import triton
    from triton import knobs
    from triton.runtime.cache import triton_key

    settings = {name: value for name, value in os.environ.items() if name.startswith(("TRITON_", "PTXAS", "LLVM_"))}
    settings.pop("TRITON_CACHE_DIR", None)
    return {
        "Python": f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
        "Triton": triton.__version__,
        "Triton's build": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "ptxas": knobs.nvidia.ptxas.version,
        "environment": json.dumps(settings, sort_keys=True),
        "path": str(CACHE),
    }


def unpack(folder: Path) -> str:
    """Fills CACHE from the folder, if its canary agrees; returns what happened, in one line."""
    if not all((folder / name).exists() for name in (KERNELS, CANARY)):
        return f"nothing compiled ahead in {folder}: `python3 -m bench.compiled_ahead` makes it"
    told, here = json.loads((folder / CANARY).read_text(encoding="utf-8")), canary()
    different = [part for part in here if told.get(part) != here[part]]
    if different:
        parts = "; ".join(f"{part} is {here[part]!r}, was {told.get(part)!r}" for part in different)
        return f"CANARY DIFFERS, what was compiled ahead is not used: {parts}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / KERNELS) as archive:
        archive.extractall(CACHE, filter="data")
    return f"{sum(1 for _ in CACHE.glob('*/*.cubin'))} kernels compiled ahead"


def pack(folder: Path) -> int:
    """Packs CACHE into the folder; returns the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / KERNELS, "w:xz") as archive:
        for path in sorted(CACHE.glob("*/*")):
            if path.suffix in KEPT:
                archive.add(path, arcname=str(path.relative_to(CACHE)))
    (folder / CANARY).write_text(json.dumps(canary(), indent=1) + "\n", encoding="utf-8")
    return sum((folder / name).stat().st_size for name in (KERNELS, CANARY))


class _NoProducts(TorchDispatchMode):
    """Library products return what was allocated for them: nobody reads a number here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "out" in kwargs:
            return kwargs["out"]
        if func is torch.ops.aten.addmm_.default:
            return args[0]
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            return a.new_empty(a.shape[0], b.shape[1])
        return func(*args, **kwargs)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Within it launches compile for sm_90, their launchers too, into CACHE, and end there."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import build

    from bench.driver import Driver

    class Compiling(Driver):
        def launcher_cls(self, src: Any, metadata: Any) -> Any:
            CudaLauncher(src, metadata)
            return super().launcher_cls(src, metadata)

    with (
        Compiling(lambda *_: None).active(),
        mock.patch.object(build, "_load_module_from_path", return_value=SimpleNamespace(launch=None)),
        knobs.nvidia.scope(),
    ):
        knobs.nvidia.libcuda_path = _stub().name
        yield


@functools.cache
def _stub() -> tempfile.TemporaryDirectory[str]:
    """A folder with a library of the driver's name, which the linker of a launcher wants to see; for the process."""
    folder = tempfile.TemporaryDirectory()
    command = [
        "gcc",
        "-shared",
        "-x",
        "c",
        "/dev/null",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        f"{folder.name}/libcuda.so.1",
    ]
    subprocess.run(command, check=True)
    return folder


def problems() -> list[tuple[Problem, bool]]:
    """(problem, whether it has a backward): the suites' cases and the tests' problems, as an H100 plans them."""
    from bench import suites
    from tests.linear_cases import DTYPES

    def problem(m: int, n: int, k: int, r: int, x: torch.dtype, adapter: torch.dtype, *, dropout: bool) -> Problem:
        return Problem(
            m, n, k, r, x, adapter, dropout,
            arch="sm_90", device_type="cuda", sm_count=SM_COUNT, gluon=True, device=DEVICE,
        )  # fmt: skip

    found = [
        (problem(c.M, c.N, c.K, c.R, c.torch_dtype, c.torch_adapter_dtype, dropout=c.dropout_p > 0), c.backward)
        for name in ("strategies", "headline")
        for c in suites.suite(name)
    ]
    found += [
        (problem(*size, 16, x, adapter, dropout=dropout), True)
        for size in SIZES for x, adapter in DTYPES.values() for dropout in (False, True)
    ]  # fmt: skip
    found += [
        (problem(200, 264, 136, r, x, adapter, dropout=True), True)
        for r in (1, 5, 8, 64, 70, 128, 256, 512) for x, adapter in DTYPES.values()
    ]  # fmt: skip
    return list(dict.fromkeys(found))


def compile_problem(given: tuple[Problem, bool]) -> str:
    """Compiles what every way of serving it launches; returns a line where one does not compile."""
    from lora_kernels.ops import Needs, _linear_triton
    from lora_kernels.planning import make_plan
    from lora_kernels.planning.plan import paired, ways_of

    problem, backward = given
    p, faults = problem, []

    def empty(*shape: int, dtype: torch.dtype = p.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    adapter = p.adapter_dtype
    x, dy, weight = empty(p.M, p.K), empty(p.M, p.N), empty(p.N, p.K)
    lora_A, lora_B = empty(p.R, p.K, dtype=adapter), empty(p.N, p.R, dtype=adapter)
    seed = torch.zeros(1, dtype=torch.int64) if p.dropout else None
    rest = seed, 2.0, 0.1 if p.dropout else 0.0
    planned = make_plan(p, "triton", triton_available=True)
    with compiling(), _NoProducts():
        for way, bias in itertools.product(ways_of(p, "forward", ("triton",)), (None, empty(p.N))):
            plan = paired(p, planned, way.strategy)
            try:
                _, xa = _linear_triton.forward(x, weight, lora_A, lora_B, bias, *rest, plan)
                if backward:
                    needs = Needs(x=True, weight=False, lora_A=True, lora_B=True, bias=bias is not None)
                    _linear_triton.backward(dy, x, weight, lora_A, lora_B, xa, *rest, needs, plan)
            except Exception as error:  # said, and the next one is compiled
                faults.append(f"{p} {way}: {type(error).__name__}: {str(error)[:200]}")
    return "\n".join(faults)


def compile_group(index: int) -> str:
    """The same for one group of bench.kernels."""
    from bench.kernel_groups import NOT_OURS, groups

    group, faults = groups()[index], []
    with compiling():
        calls, _ = group.build(torch.device("cpu"))
        for name, call in calls.items():
            if not name.startswith(NOT_OURS):
                try:
                    call()
                except Exception as error:  # as above
                    faults.append(f"{group.name}: {name}: {type(error).__name__}: {str(error)[:200]}")
    return "\n".join(faults)


def jobs() -> list[tuple[str, Any]]:
    """What is compiled: each is a process's."""
    from bench.kernel_groups import groups

    return [("problem", given) for given in problems()] + [("group", index) for index in range(len(groups()))]


def fill(total_s: float) -> int:
    """Fills CACHE anew, as far as the time goes; returns how many jobs had a fault or were left out."""
    asked = jobs()
    shutil.rmtree(CACHE, ignore_errors=True)
    start, bad = time.perf_counter(), 0
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=8) as pool:
        for done, line in enumerate(pool.imap_unordered(_job, asked), 1):
            if line:
                bad += 1
                print(line, flush=True)
            if done % 20 == 0 or done == len(asked):
                print(f"{done} of {len(asked)}, {time.perf_counter() - start:.0f} s", flush=True)
            if time.perf_counter() - start > total_s:
                print(f"LEFT OUT for want of time: {len(asked) - done} of {len(asked)}")
                return bad + len(asked) - done
    return bad


def _job(job: tuple[str, Any]) -> str:
    kind, given = job
    with mock.patch.dict(os.environ, environment()):
        return compile_problem(given) if kind == "problem" else compile_group(given)


def environment() -> Mapping[str, str]:
    """Of a process that reads or fills CACHE."""
    return {"TRITON_CACHE_DIR": str(CACHE)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled_ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"default: {FOLDER.relative_to(ROOT)}")
    parser.add_argument("--total", type=float, default=3000.0, help="no kernel is begun after so many seconds")
    arguments = parser.parse_args(argv)
    bad = fill(arguments.total)
    size = pack(arguments.out)
    print(f"{arguments.out}: {size / (1 << 20):.1f} MiB")
    if size > MOST_BYTES:
        print(f"that is more than the {MOST_BYTES >> 20} MiB that may travel")
    return int(bad > 0 or size > MOST_BYTES)


if __name__ == "__main__":
    raise SystemExit(main())
