"""Measurements as rows: one per case and contender, with everything needed to read them in a year."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_kernels import config
from lora_kernels.planning.device import cpu_name, device_traits, slug
from lora_kernels.planning.measured import write_whole

_Device = torch.device  # a name of its own, because `torch` is a field of the classes below


@dataclass(frozen=True)
class Environment:
    """Where a measurement was made."""

    device: str
    driver: str
    threads: int
    torch: str
    triton: str
    peft: str
    python: str
    commit: str
    date: str

    @staticmethod
    def current(device: _Device) -> Environment:
        """Describe this machine, this installation and this moment."""
        cuda = device.type == "cuda"
        return Environment(
            device=torch.cuda.get_device_name(device) if cuda else cpu_name(),
            driver=(_driver() or "unknown") if cuda else "",  # rows without one are taken for a CPU's
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            triton=_version("triton"),
            peft=_version("peft"),
            python=platform.python_version(),
            commit=_commit(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )

    @property
    def line(self) -> str:
        """One line for the head of a table."""
        driver = f", driver {self.driver}" if self.driver else f", {self.threads} threads"
        triton = f", triton {self.triton}" if self.triton else ""
        return f"{self.device}{driver} · torch {self.torch}{triton} · Python {self.python} · commit {self.commit}"


@dataclass(frozen=True)
class Record:
    """One contender on one case.

    `speedup` is time(unfused chain) / time(this), `cost` is time(this) / time(frozen linear); both are medians of
    ratios paired inside a round, with their 10th and 90th percentile. Times are None where the gate refused the
    contender, where it raised, or where it cannot run (`status` says why). `floor_ms` is the least time that the
    measured ceilings of this device allow (`roofline.floor_ms`), `roofline` is floor_ms / median_ms; `peak_bytes` is
    what one call allocated at most, `saved_bytes` what forward kept for backward beyond x and the parameters. `M_asked`
    is the suite's M, more than `M` where a contender is so slow that the case was given fewer rows (0: not recorded).
    On a GPU `host_us` is what the host takes to issue one call, and `graph_cost` is `cost` with both as CUDA graphs,
    where that was asked for: the difference is what the host costs the GPU.
    """

    name: str
    model: str
    M: int
    N: int
    K: int
    R: int
    dtype: str
    adapter_dtype: str
    dropout_p: float
    bias: bool
    mode: str
    graph: bool
    provider: str
    status: str
    M_asked: int
    rounds: int
    median_ms: float | None
    p10_ms: float | None
    p90_ms: float | None
    speedup: float | None
    speedup_p10: float | None
    speedup_p90: float | None
    cost: float | None
    cost_p10: float | None
    cost_p90: float | None
    worst_tensor: str
    error: float | None
    error_budget: float | None
    saved_bytes: int | None
    peak_bytes: int | None
    floor_ms: float | None
    roofline: float | None
    host_us: float | None
    graph_cost: float | None
    device: str
    driver: str
    threads: int
    torch: str
    triton: str
    peft: str
    python: str
    commit: str
    date: str

    @property
    def shortened(self) -> bool:
        """Whether the case has fewer rows than the suite's."""
        return 0 < self.M < self.M_asked

    @property
    def timed(self) -> bool:
        """Whether the contender passed the gate and was timed."""
        return self.median_ms is not None

    @property
    def fault(self) -> str:
        """What went wrong: "refused" by the gate, "failed" with an exception, or nothing."""
        kind = self.status.partition(":")[0]
        return kind if kind in ("refused", "failed") else ""


Row = TypeVar("Row")


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Write rows of one dataclass, one at least, with a header; missing values are empty cells."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    write_whole(path, text.getvalue())


def read_csv(path: Path, kind: type[Row]) -> list[Row]:
    """The rows that `write_csv` wrote, now or before a column was added: what is not there is empty, zero or None."""
    kinds = typing.get_type_hints(kind)
    with path.open(newline="", encoding="utf-8") as file:
        return [
            kind(**{name: _cell(row.get(name) or "", of) for name, of in kinds.items()}) for row in csv.DictReader(file)
        ]


def _cell(text: str, kind: Any) -> Any:
    if kind is bool:
        return text == "True"
    if kind is str:
        return text
    number = float if kind in (float, float | None) else int
    if text:
        return number(text)
    return None if kind in (float | None, int | None) else number(0)


def write_json(records: Sequence[Record], path: Path) -> None:
    """Write the rows as a list of objects."""
    write_whole(path, json.dumps([dataclasses.asdict(record) for record in records], indent=1) + "\n")


def device_slug(device: torch.device) -> str:
    """The device's name as a folder: `nvidia-h200`, `amd-epyc-7r13-processor-avx2-2-threads`."""
    return slug(device_traits(device.type, device.index).name)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    lines = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
    return lines[0] if lines else ""


def _commit() -> str:
    """What the user says it is; else the checkout's commit, marked where tracked files differ from it.

    In that order: a copy of the tree on a lent machine may have a history of its own.
    """
    if config.COMMIT:
        return config.COMMIT
    here = str(Path(__file__).parent)
    commit = _output(["git", "-C", here, "rev-parse", "--short=12", "HEAD"])
    dirty = _output(["git", "-C", here, "status", "--porcelain", "--untracked-files=no"]) if commit else ""
    return f"{commit}+changes" if dirty else commit


def _output(command: list[str]) -> str:
    """Standard output of a command, or nothing where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
