"""Each kernel alone, over tiles: microseconds, beside the library's product of the same operands and the floor.

    python -m bench.kernels [--only WORDS] [--budget SECONDS] [--total SECONDS] [--out FOLDER] [--list]

What a plan composes is timed one kernel at a time here, so that a table of tiles and a model of costs can be set from
it. Each group is one problem: contenders take turns, and what the library or a copy takes for the same operands, or the
same bytes, runs among them. One result of each contender is held to fp32 before it is timed. `--list` needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.benchmarking.records import Environment, device_slug, write_csv
from lora_kernels.benchmarking.timer import interleave, warm_up
from lora_kernels.planning.tiles import Tile, tile_of
from lora_kernels.reference.philox import dropout_threshold

Call = Callable[[], Tensor]
P = 0.1
THRESHOLD = dropout_threshold(P)
BF16 = torch.bfloat16
COPY_GB_S, PRODUCT_TFLOPS = 3029.0, 785.0
"""An H100's measured ceilings (bench/results/nvidia-h100), for the floor that is printed beside the times."""
NOT_OURS = ("library", "addmm")
"""How the names of what the library runs begin."""
LIMITS = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-18}
"""Of the relative error of what is timed, by its dtype: three roundings to bf16 are 2^-7.4 at most; the truth is the
library's fp32, whose own error is some 2^-20."""


@dataclass(frozen=True)
class Group:
    """One problem: what it is called, the least microseconds, and its contenders by name, built when asked."""

    name: str
    floor_us: float
    build: Callable[[torch.device], tuple[dict[str, Call], Call]]


@dataclass(frozen=True)
class KernelRow:
    """One contender of one group."""

    group: str
    contender: str
    status: str
    us: float | None
    us_p10: float | None
    us_p90: float | None
    over_first: float | None
    floor_us: float
    error: float | None
    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str


def floor_us(bytes_moved: float, flops: float) -> float:
    """What the measured ceilings allow."""
    return max(bytes_moved / COPY_GB_S / 1e3, flops / PRODUCT_TFLOPS / 1e6)


def label(kernel: str, tile: Tile, extra: str = "") -> str:
    sizes = "x".join(str(size) for size in (tile.block_m, tile.block_n, tile.block_k) if size)
    group = f" g{tile.group_m}" if tile.group_m != 8 else ""
    return f"{kernel} {sizes} r{tile.block_r} w{tile.num_warps} s{tile.num_stages}{group}{extra}"


def normal(device: torch.device, *shape: int, dtype: torch.dtype = BF16, std: float = 1.0) -> Tensor:
    if device.type == "cpu":
        return torch.empty(shape, dtype=dtype)  # nothing is computed where nothing can be launched
    return (torch.randn(shape, device=device) * std).to(dtype)


# -- the large product -------------------------------------------------------------------------------------------------

BIG = [
    (128, 256, 64, 8, 3, 8), (128, 256, 64, 8, 4, 8), (128, 256, 64, 8, 3, 4), (128, 256, 64, 8, 3, 16),
    (256, 128, 64, 8, 3, 8), (256, 128, 64, 8, 4, 8), (128, 128, 64, 8, 4, 8), (128, 128, 64, 4, 4, 8),
    (128, 128, 128, 8, 3, 8), (64, 256, 64, 4, 4, 8), (128, 256, 128, 8, 2, 8),
]  # fmt: skip
SMALL = [
    (128, 128, 64, 4, 4, 8), (128, 128, 64, 8, 4, 8), (64, 128, 64, 4, 4, 8), (64, 128, 128, 4, 3, 8),
    (64, 256, 64, 4, 4, 8), (128, 64, 64, 4, 5, 8), (64, 64, 128, 4, 4, 8), (64, 64, 64, 4, 6, 8),
]  # fmt: skip
UNDER_MASK = [
    (128, 128, 64, 8, 3, 8), (128, 128, 64, 8, 4, 8), (128, 64, 64, 4, 4, 8), (64, 128, 64, 4, 4, 8),
    (128, 256, 64, 8, 3, 8), (64, 256, 64, 8, 3, 8),
]  # fmt: skip


def _tile(sizes: Sequence[int], block_r: int) -> Tile:
    m, n, k, warps, stages, group_m = sizes
    return Tile(block_m=m, block_n=n, block_k=k, block_r=block_r, num_warps=warps, num_stages=stages, group_m=group_m)


def product(
    m: int, n: int, k: int, *, r: int = 16, forward: bool, mixed: bool = False, masked: bool = False,
    sizes: Sequence[Sequence[int]],
) -> Group:  # fmt: skip
    """out [m, n] = lhs [m, k] rhs + s e, forward with rhs = W^T, backward with rhs = W."""

    def build(device: torch.device) -> tuple[dict[str, Call], Call]:
        from lora_kernels.kernels.gemm_expand_tma import gemm_expand_tma
        from lora_kernels.kernels.persistent import persistent

        adapter = torch.float32 if mixed else BF16
        lhs = normal(device, m, k)
        weight = normal(device, *((n, k) if forward else (k, n)), std=k**-0.5)
        s = normal(device, m, r, dtype=adapter)
        e = normal(device, n, r, dtype=adapter, std=r**-0.5).T if forward else normal(device, r, n, dtype=adapter)
        rhs = weight.T if forward else weight
        seed = torch.full((1,), 7, dtype=torch.int64, device=device) if masked else None
        e16 = e.to(BF16)
        s16 = s.to(BF16)
        low_rank = torch.empty((m, n), dtype=BF16, device=device)
        calls: dict[str, Call] = {"library": lambda: torch.mm(lhs, rhs)}
        calls["library, then addmm_ of s e"] = lambda: torch.mm(lhs, rhs).addmm_(s16, e16)
        calls["addmm onto a given low-rank part"] = lambda: torch.addmm(low_rank, lhs, rhs)
        for each in sizes:
            tile = _tile(each, 16)
            calls[label("tma", tile)] = partial(
                gemm_expand_tma, lhs=lhs, weight=weight, transpose_weight=forward, s=s, e=e, bias=None, seed=seed,
                threshold=THRESHOLD if masked else 0, use_pdl=False, precision="tf32x3" if mixed else "ieee", tile=tile,
            )  # fmt: skip
        if not mixed and not masked:
            shipped = tile_of("hopper", "16", "persistent", columns=n, rank=r)
            assert shipped is not None
            narrow = tile_of("hopper", "16", "persistent", columns=128, rank=r)
            assert narrow is not None
            for tile in dict.fromkeys((shipped, narrow, replace(shipped, group_m=16))):
                calls[label("persistent", tile)] = partial(
                    persistent, lhs=lhs, weight=weight, transpose_weight=forward, s=s, e=e, bias=None, tile=tile,
                    sm_count=132,
                )  # fmt: skip

        def truth() -> Tensor:
            low = s.float() @ e.float()
            if seed is not None:
                from lora_kernels.reference.philox import keep_mask

                low = torch.where(keep_mask(seed, m, n, P), low, 0)
            return torch.mm(lhs.float(), rhs.float()) + low

        return calls, truth

    direction = "forward" if forward else "dx"
    kind = ", fp32 adapters" if mixed else ""
    kind += ", dropout" if masked else ""
    moved = 2.0 * (m * k + n * k + m * n)
    return Group(f"product {direction} {m}x{n}x{k}{kind}", floor_us(moved, 2.0 * m * n * k), build)


# -- the rank-sized products -------------------------------------------------------------------------------------------


def shrinks(m: int, k: int, *, r: int = 16, mixed: bool = False, masked: bool = False) -> Group:
    """xa [m, r] from x [m, k]."""

    def build(device: torch.device) -> tuple[dict[str, Call], Call]:
        from lora_kernels.kernels.shrink import shrink

        adapter = torch.float32 if mixed else BF16
        x, lora_A = normal(device, m, k), normal(device, r, k, dtype=adapter, std=k**-0.5)
        a16 = lora_A.to(BF16)
        seed = torch.full((1,), 7, dtype=torch.int64, device=device) if masked else None
        calls: dict[str, Call] = {"library": lambda: torch.mm(x, a16.T)}
        narrow = [(32, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 3), (32, 128, 4, 3), (64, 128, 8, 3)]
        wide = [(64, 64, 4, 6), (64, 64, 4, 4), (128, 64, 8, 4), (32, 128, 4, 4), (32, 256, 4, 3), (64, 128, 8, 4)]
        for bm, bk, warps, stages in narrow if mixed else wide:
            tile = Tile(block_m=bm, block_k=bk, block_r=r, num_warps=warps, num_stages=stages)
            for splits in (1, 2, 4):
                calls[label("shrink", tile, f" /{splits}")] = partial(
                    shrink, x=x, lora_A=lora_A, seed=seed, threshold=THRESHOLD if masked else 0, scale=1.0,
                    splits=splits, precision="tf32x3" if mixed else "ieee", tile=tile,
                )  # fmt: skip

        def truth() -> Tensor:
            wide_x = x.float()
            if seed is not None:
                from lora_kernels.reference.philox import keep_mask

                wide_x = torch.where(keep_mask(seed, m, k, P), wide_x, 0)
            return torch.mm(wide_x, lora_A.float().T)

        return calls, truth

    kind = (", fp32 adapters" if mixed else "") + (", dropout" if masked else "")
    return Group(f"shrink {m}x{k} r={r}{kind}", floor_us(2.0 * m * k, 0), build)


def from_dy(m: int, n: int, *, r: int = 16, mixed: bool = False) -> Group:
    """dyb [m, r] and dB [n, r] from dy [m, n]; the truth is dB's."""

    def build(device: torch.device) -> tuple[dict[str, Call], Call]:
        from lora_kernels.kernels.bwd_lora_b import bwd_lora_b

        adapter = torch.float32 if mixed else BF16
        dy, lora_B = normal(device, m, n), normal(device, n, r, dtype=adapter, std=n**-0.5)
        xa = normal(device, m, r, dtype=adapter)
        b16, xa16 = lora_B.to(BF16), xa.to(BF16)

        def library() -> Tensor:
            torch.mm(dy, b16)
            return torch.mm(dy.T, xa16)

        calls: dict[str, Call] = {"library": library}
        wide = [(64, 256, 8, 2), (64, 256, 8, 3), (64, 128, 4, 3), (64, 128, 8, 3), (128, 128, 8, 2), (32, 256, 4, 3)]
        narrow = [(64, 128, 8, 3), (64, 128, 4, 3), (32, 256, 8, 3), (64, 64, 4, 3), (64, 128, 8, 2)]

        def run(tile: Tile, splits: int) -> Tensor:
            found = bwd_lora_b(
                dy=dy, lora_B=lora_B, xa=xa, bias_dtype=None, needs_dyb=True, scale=1.0, splits=splits,
                precision="tf32x3" if mixed else "ieee", tile=tile,
            )  # fmt: skip
            assert found.d_lora_B is not None
            return found.d_lora_B

        for bm, bn, warps, stages in narrow if mixed else wide:
            tile = Tile(block_m=bm, block_n=bn, block_r=r, num_warps=warps, num_stages=stages)
            columns = -(-n // bn)
            for programs in (132, 264, 528):
                splits = max(1, programs // columns)
                calls[label("bwd_lora_b", tile, f" /{splits}")] = partial(run, tile, splits)
        return calls, lambda: torch.mm(dy.float().T, xa.float())

    kind = ", fp32 adapters" if mixed else ""
    return Group(f"dyb and dB {m}x{n} r={r}{kind}", floor_us(2.0 * m * n, 0), build)


def from_x(m: int, k: int, *, r: int = 16, mixed: bool = False, masked: bool = False) -> Group:
    """dA [r, k] from x [m, k]; under a mask also the kernel that makes the low-rank part of dx beside it."""

    def build(device: torch.device) -> tuple[dict[str, Call], Call]:
        from lora_kernels.kernels.bwd_dx_lora_a import bwd_dx_lora_a
        from lora_kernels.kernels.bwd_lora_a import bwd_lora_a

        adapter = torch.float32 if mixed else BF16
        x, dyb = normal(device, m, k), normal(device, m, r, dtype=adapter)
        lora_A = normal(device, r, k, dtype=adapter)
        dyb16 = dyb.to(BF16)
        seed = torch.full((1,), 7, dtype=torch.int64, device=device) if masked else None
        threshold, precision = (THRESHOLD if masked else 0), ("tf32x3" if mixed else "ieee")
        calls: dict[str, Call] = {"library": lambda: torch.mm(dyb16.T, x)}
        wide = [(64, 128, 4, 3), (64, 128, 8, 3), (128, 128, 8, 2), (64, 256, 8, 2), (32, 256, 4, 3), (64, 64, 4, 4)]
        narrow = [(64, 64, 4, 4), (64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 8, 2)]
        for bm, bk, warps, stages in narrow if mixed else wide:
            tile = Tile(block_m=bm, block_k=bk, block_r=r, num_warps=warps, num_stages=stages)
            for programs in (132, 264, 528):
                splits = max(1, programs // -(-k // bk))
                calls[label("bwd_lora_a", tile, f" /{splits}")] = partial(
                    bwd_lora_a, x=x, dyb=dyb, seed=seed, threshold=threshold, splits=splits, precision=precision,
                    tile=tile,
                )  # fmt: skip
        if masked:
            assert seed is not None

            def both(tile: Tile, splits: int) -> Tensor:
                assert seed is not None
                _, d_lora_A = bwd_dx_lora_a(
                    x=x, dyb=dyb, lora_A=lora_A, seed=seed, threshold=threshold, dx_dtype=BF16, splits=splits,
                    precision=precision, tile=tile,
                )  # fmt: skip
                assert d_lora_A is not None
                return d_lora_A

            for bm, bk, warps, stages in [(64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 4, 2), (64, 64, 4, 3)]:
                tile = Tile(block_m=bm, block_k=bk, block_r=r, num_warps=warps, num_stages=stages)
                for programs in (264, 528):
                    splits = max(1, programs // -(-k // bk))
                    calls[label("bwd_dx_lora_a", tile, f" /{splits}")] = partial(both, tile, splits)

        def truth() -> Tensor:
            wide_x = x.float()
            if seed is not None:
                from lora_kernels.reference.philox import keep_mask

                wide_x = torch.where(keep_mask(seed, m, k, P), wide_x, 0)
            return torch.mm(dyb.float().T, wide_x)

        return calls, truth

    kind = (", fp32 adapters" if mixed else "") + (", dropout" if masked else "")
    return Group(f"dA {m}x{k} r={r}{kind}", floor_us(2.0 * m * k, 0), build)


def decodes(m: int, n: int, k: int, *, r: int = 16, mixed: bool = False) -> Group:
    """y [m, n] in one pass, for few rows."""

    def build(device: torch.device) -> tuple[dict[str, Call], Call]:
        from lora_kernels.kernels.one_pass import one_pass

        adapter = torch.float32 if mixed else BF16
        x, weight = normal(device, m, k), normal(device, n, k, std=k**-0.5)
        lora_A = normal(device, r, k, dtype=adapter, std=k**-0.5)
        lora_B = normal(device, n, r, dtype=adapter)
        calls: dict[str, Call] = {"library": lambda: torch.mm(x, weight.T)}
        wide = [(64, 128, 4, 5), (32, 128, 4, 5), (32, 256, 4, 4), (64, 256, 8, 3), (128, 64, 4, 5), (64, 64, 4, 6)]
        narrow = [(64, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 5), (64, 128, 4, 3), (32, 128, 4, 4)]
        sums = Tile(block_m=16, block_n=64 if not mixed else 32, block_r=16, num_warps=4, num_stages=1)

        def run(tile: Tile, splits: int) -> Tensor:
            y, _ = one_pass(
                x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=None, seed=None, threshold=0, scale=1.0,
                splits=splits, precision="tf32x3" if mixed else "ieee", tile=tile, sum_tile=sums,
            )  # fmt: skip
            return y

        for bn, bk, warps, stages in narrow if mixed else wide:
            tile = Tile(block_m=16, block_n=bn, block_k=bk, block_r=16, num_warps=warps, num_stages=stages)
            columns = -(-n // bn)
            for splits in sorted({1, *(max(1, programs // columns) for programs in (132, 264, 528))}):
                calls[label("one_pass", tile, f" /{splits}")] = partial(run, tile, splits)
        return calls, lambda: x.float() @ weight.float().T + (x.float() @ lora_A.float().T) @ lora_B.float().T

    kind = ", fp32 adapters" if mixed else ""
    return Group(f"one pass {m}x{n}x{k} r={r}{kind}", floor_us(2.0 * (n * k + m * (n + k)), 0), build)


def beside(m: int, n: int, k: int, *, r: int = 16) -> Group:
    """dx [m, k] = dy W + dyb A, and dA (and dB): one after the other, or the rank-sized products on a second stream.

    The second stream's programs get the multiprocessors that the product leaves, and all of them once it has ended.
    """

    def build(device: torch.device) -> tuple[dict[str, Call], Call]:
        from lora_kernels.kernels.bwd_lora_a import bwd_lora_a
        from lora_kernels.kernels.bwd_lora_b import bwd_lora_b
        from lora_kernels.kernels.persistent import persistent
        from lora_kernels.kernels.shrink import shrink

        dy, x, weight = normal(device, m, n), normal(device, m, k), normal(device, n, k, std=n**-0.5)
        dyb, xa, lora_A = normal(device, m, r), normal(device, m, r), normal(device, r, k)
        lora_B = normal(device, n, r)
        big = tile_of("hopper", "16", "persistent", columns=k, rank=r)
        tile_a, tile_b, tile_s = (
            tile_of("hopper", "16", kernel, rank=r) for kernel in ("bwd_lora_a", "bwd_lora_b", "shrink")
        )
        assert big is not None and tile_a is not None and tile_b is not None and tile_s is not None
        side = torch.cuda.Stream(device) if device.type == "cuda" else None

        def from_x() -> None:
            splits = max(1, 264 // -(-k // tile_a.block_k))
            bwd_lora_a(x=x, dyb=dyb, seed=None, threshold=0, splits=splits, precision="ieee", tile=tile_a)

        def from_dy() -> None:
            bwd_lora_b(
                dy=dy, lora_B=lora_B, xa=xa, bias_dtype=None, needs_dyb=False, scale=1.0,
                splits=max(1, 132 // -(-n // tile_b.block_n)), precision="ieee", tile=tile_b,
            )  # fmt: skip

        def for_dyb() -> None:
            shrink(
                x=dy, lora_A=lora_B.T, seed=None, threshold=0, scale=1.0, splits=1, precision="ieee", tile=tile_s
            )  # fmt: skip

        def run(programs: int, works: Sequence[Callable[[], None]], where: str) -> Tensor:
            def product() -> Tensor:
                if programs == 0:
                    return torch.mm(dy, weight)
                return persistent(
                    lhs=dy, weight=weight, transpose_weight=False, s=dyb, e=lora_A, bias=None, tile=big,
                    sm_count=programs,
                )  # fmt: skip

            if where == "beside" and side is not None:
                main = torch.cuda.current_stream(device)
                side.wait_stream(main)
                out = product()
                with torch.cuda.stream(side):
                    for work in works:
                        work()
                main.wait_stream(side)
                return out
            out = product()
            for work in works:
                work()
            return out

        calls: dict[str, Call] = {"library": partial(run, 0, (), "")}
        calls["library, then dA"] = partial(run, 0, (from_x,), "")
        calls["library beside dA"] = partial(run, 0, (from_x,), "beside")
        for programs in (132, 128, 124, 120, 112):
            calls[f"persistent /{programs}"] = partial(run, programs, (), "")
        calls["persistent /132, then dA"] = partial(run, 132, (from_x,), "")
        calls["persistent /132, then dB, dA"] = partial(run, 132, (from_dy, from_x), "")
        for programs in (132, 128, 124, 120, 112):
            calls[f"persistent /{programs} beside dA"] = partial(run, programs, (from_x,), "beside")
            calls[f"persistent /{programs} beside dB, dA"] = partial(run, programs, (from_dy, from_x), "beside")
            # Not the order of a backward: what a kernel would have to do that makes dyb while it multiplies.
            calls[f"persistent /{programs} beside dyb"] = partial(run, programs, (for_dyb,), "beside")
        return calls, lambda: torch.mm(dy.float(), weight.float()) + dyb.float() @ lora_A.float()

    return Group(
        f"beside the product dx {m}x{k}x{n} r={r}", floor_us(2.0 * (m * k + n * k + m * n), 2.0 * m * n * k), build
    )


def groups() -> list[Group]:
    """All of them, most telling first."""
    q = {"m": 8192, "n": 4096, "k": 4096}
    return [
        beside(8192, 4096, 4096),
        beside(8192, 14336, 4096),
        beside(8192, 4096, 14336),
        beside(8192, 1024, 4096),
        product(**q, forward=True, sizes=BIG),
        product(**q, forward=False, sizes=BIG),
        product(8192, 14336, 4096, forward=True, sizes=BIG[:6]),
        product(8192, 4096, 14336, forward=False, sizes=BIG[:6]),
        from_dy(8192, 4096),
        from_x(8192, 4096),
        shrinks(8192, 4096),
        product(**q, forward=False, masked=True, sizes=UNDER_MASK),
        from_x(8192, 4096, masked=True),
        shrinks(8192, 4096, masked=True),
        from_dy(8192, 4096, mixed=True),
        shrinks(8192, 4096, mixed=True),
        from_x(8192, 4096, mixed=True),
        product(**q, forward=True, mixed=True, sizes=BIG[:6]),
        product(8192, 1024, 4096, forward=True, sizes=BIG),
        product(8192, 4096, 1024, forward=False, sizes=BIG),
        from_dy(8192, 14336),
        from_dy(8192, 1024),
        product(512, 4096, 4096, forward=True, sizes=SMALL),
        product(512, 1024, 4096, forward=True, sizes=SMALL),
        product(1024, 1024, 4096, forward=True, sizes=SMALL),
        product(1024, 4096, 4096, forward=False, sizes=SMALL),
        decodes(16, 4096, 4096),
        decodes(16, 4096, 4096, mixed=True),
        decodes(16, 14336, 4096),
        decodes(16, 1024, 4096),
        from_x(8192, 4096, mixed=True, masked=True),
        shrinks(8192, 4096, mixed=True, masked=True),
        shrinks(512, 4096),
    ]


def measure(group: Group, device: torch.device, *, budget_s: float) -> list[KernelRow]:
    """A row for each contender: times only of what is right."""
    calls, truth = group.build(device)
    expected = truth().double()
    environment = Environment.current(device)
    status, errors, fit = dict.fromkeys(calls, "ok"), dict[str, float](), dict[str, Call]()
    for name, call in calls.items():
        try:
            got = call()
            torch.cuda.synchronize(device)
        except Exception as error:  # one contender's fault is a row
            status[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            continue
        errors[name] = ((got.double() - expected).norm() / expected.norm()).item()
        if not name.startswith(NOT_OURS) and not errors[name] <= LIMITS[got.dtype]:
            status[name] = f"refused: error {errors[name]:.1e}"
            continue
        fit[name] = call
    del expected
    samples = interleave(fit, device=device, budget_s=budget_s, warmup=2)
    first = next(iter(fit))
    rows = []
    for name in calls:
        time_us = samples.time(name) if name in fit else None
        rows.append(
            KernelRow(
                group=group.name,
                contender=name,
                status=status[name],
                us=1e3 * time_us.median if time_us else None,
                us_p10=1e3 * time_us.p10 if time_us else None,
                us_p90=1e3 * time_us.p90 if time_us else None,
                over_first=samples.ratio(name, first).median if time_us else None,
                floor_us=group.floor_us,
                error=errors.get(name),
                **{
                    field: getattr(environment, field)
                    for field in ("device", "driver", "torch", "triton", "commit", "date")
                },
            )
        )
    return rows


def warm(index: int) -> str:
    """Runs each contender of one group once, which compiles; nothing is compared."""
    device = torch.device("cuda")
    calls, _ = groups()[index].build(device)
    for call in calls.values():
        with contextlib.suppress(Exception):  # it fails again where it is measured, and is said there
            call()
            torch.cuda.synchronize()
    return ""


def in_processes(function: Callable[[int], str], indices: Sequence[int], workers: int) -> Iterator[str]:
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=4) as pool:
        yield from pool.imap_unordered(function, indices)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="groups whose name contains one of these, separated by commas")
    parser.add_argument("--budget", type=float, default=0.6, help="seconds of timing per group (at least 6 rounds)")
    parser.add_argument("--total", type=float, default=300.0, help="no group is begun after so many seconds")
    parser.add_argument("--out", type=Path, help="folder for kernels.csv (default: bench/results/local/<device>)")
    parser.add_argument("--list", action="store_true", help="print what would run")
    arguments = parser.parse_args(argv)
    found = groups()
    wanted = [
        index
        for index, group in enumerate(found)
        if not arguments.only or any(words in group.name for words in arguments.only.split(","))
    ]
    workers = min(14, os.cpu_count() or 1)
    if arguments.list:
        for index in wanted:
            calls, _ = found[index].build(torch.device("cpu"))
            print(f"{found[index].name}: {len(calls)} contenders")
        return int(not wanted)
    if not torch.cuda.is_available():
        print("bench.kernels needs a GPU that torch can use, and there is none here; --list needs none")
        return 3
    start = time.perf_counter()
    for _ in in_processes(warm, wanted, workers):
        pass
    device = torch.device("cuda")
    print(Environment.current(device).line)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    warm_up(device, 2.0)
    out = arguments.out or Path(__file__).parent / "results" / "local" / device_slug(device)
    rows: list[KernelRow] = []
    for index in wanted:
        if time.perf_counter() - start > arguments.total:
            print(f"LEFT OUT for want of time: {found[index].name}")
            continue
        group_rows = measure(found[index], device, budget_s=arguments.budget)
        rows += group_rows
        write_csv(rows, out / "kernels.csv")
        print(f"\n{found[index].name}  (floor {found[index].floor_us:.1f} us)")
        for row in sorted(group_rows, key=lambda row: row.us or 1e9):
            times = (
                f"{row.us:9.1f} us ({row.us_p10:.1f}-{row.us_p90:.1f}) x{row.over_first:.3f}" if row.us else row.status
            )
            print(f"  {row.contender:<44} {times}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
