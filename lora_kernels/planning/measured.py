"""Times measured on this very device: what `lora-kernels tune` found, kept in one JSON file per device.

A file holds for its format, our kernels, torch's and Triton's version; any other is left alone, with one warning.
Files are written beside and moved into place, so a reader sees the old one or the new one. A file that cannot be read
is ignored, with one warning, until the next tuning writes it anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import threading
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lora_kernels import config
from lora_kernels.planning.device import slug
from lora_kernels.planning.tiles import Tile

FORMAT = 2
SMALLEST_ROWS = 16

Direction = Literal["forward", "backward"]


def row_bucket(m: int) -> int:
    """M as plans see it: the next power of two, and 16 at least, so that a stream of batch sizes shares a few plans."""
    return max(SMALLEST_ROWS, 1 << (max(m, 1) - 1).bit_length())


class Key(NamedTuple):
    """One problem in one direction. M: a `row_bucket`; dtypes as torch spells them; tf32: fp32 products are TF32."""

    direction: Direction
    M: int
    N: int
    K: int
    R: int
    dtype: str
    adapter_dtype: str
    dropout: bool
    tf32: bool


@dataclasses.dataclass(frozen=True)
class Timing:
    """us: median microseconds. tiles: the tile of each kernel that was tuned for it, by the kernel's name."""

    us: float
    tiles: tuple[tuple[str, Tile], ...] = ()


Timings = Mapping[str, Timing]
"""By way, as `Way` prints itself: "triton/shrink_fused"."""
Table = dict[Key, dict[str, Timing]]

_lock = threading.Lock()
_loaded: dict[str, Table] = {}


def table_of(device_name: str) -> Table:
    """The device's measured times; read once per process."""
    with _lock:
        if device_name not in _loaded:
            _loaded[device_name] = _read(path_of(device_name), device_name)
        return _loaded[device_name]


def record(device_name: str, key: Key, timings: Timings) -> Path | None:
    """Keep the times of one problem, in this process and on disk; None where the cache is switched off."""
    path = path_of(device_name)
    with _lock:
        # Read again: another process may have tuned meanwhile. Of two that write in the same moment, one is lost.
        table = _loaded.get(device_name, {}) | _read(path, device_name)
        table[key] = dict(timings)
        _loaded[device_name] = table
        if path is not None:
            _write(path, device_name, table)
    return path


def forget() -> None:
    """Read the files anew at the next question."""
    with _lock:
        _loaded.clear()


def path_of(device_name: str) -> Path | None:
    """The device's file; None where LORA_KERNELS_CACHE switches it off."""
    if config.CACHE is None:
        return None
    return config.CACHE / f"plans-{slug(device_name)}.json"


@cache
def _code() -> str:
    """A digest of the kernels and their tables: whatever changes one may change its time, or withdraw a tile."""
    package = Path(__file__).resolve().parents[1]
    files = sorted([*package.glob("kernels/*.py"), *package.glob("planning/tables/*.json")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _header(device_name: str) -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "format": FORMAT,
        "device": device_name,
        "code": _code(),
        "torch": torch.__version__,
        "triton": version("triton"),
    }


def _read(path: Path | None, device_name: str) -> Table:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        header, expected = {name: content.get(name) for name in _header("")}, _header(device_name)
        if header != expected:
            differing = ", ".join(
                f"{n} {header[n]!r}, not {expected[n]!r}" for n in expected if header[n] != expected[n]
            )
            _warn(f"{path} was tuned for {differing}: ignored. Run `lora-kernels tune` to measure anew.")
            return {}
        return {
            (key := _key(row)): {way: _timing(found, key.R) for way, found in row["ways"].items()}
            for row in content["rows"]
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _warn(
            f"{path} cannot be read ({type(error).__name__}: {error}): ignored. "
            "The next `lora-kernels tune` writes it anew."
        )
        return {}


def _key(row: dict[str, Any]) -> Key:
    key = Key(**{name: row[name] for name in Key._fields})
    if key.direction not in ("forward", "backward") or not all(isinstance(size, int) for size in key[1:5]):
        raise ValueError(f"not a problem: {key}")
    return key


def _timing(found: dict[str, Any], rank: int) -> Timing:
    us = float(found["us"])
    if not us > 0:
        raise ValueError(f"a time must be positive; got {us}")
    return Timing(us, tuple((kernel, _tile(kernel, tile, rank)) for kernel, tile in found.get("tiles", {}).items()))


def _tile(kernel: str, fields: dict[str, Any], rank: int) -> Tile:
    if not all(type(value) is int and value >= 0 for value in fields.values()):
        raise ValueError(f"not a tile: {fields}")
    tile = Tile(**fields)
    blocks = (tile.block_m, tile.block_n, tile.block_k, tile.block_r, tile.num_warps)
    if any(block & (block - 1) for block in blocks) or (kernel == "one_pass" and tile.block_r < rank):
        raise ValueError(f"not a tile of {kernel} at rank {rank}: {fields}")
    return tile


def _write(path: Path, device_name: str, table: Table) -> None:
    rows = [
        {
            **key._asdict(),
            "ways": {
                way: {"us": timing.us, "tiles": {kernel: dataclasses.asdict(tile) for kernel, tile in timing.tiles}}
                for way, timing in timings.items()
            },
        }
        for key, timings in sorted(table.items())
    ]
    write_whole(path, json.dumps({**_header(device_name), "rows": rows}, indent=1))


def write_whole(path: Path, text: str) -> None:
    """In one step: a reader, or an interruption at any time, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(text.encode())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
