"""The problems of `bench.kernels`: each a kernel by itself over tiles, beside the library's product and the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lora_kernels.planning.tiles import Tile, fewest_programs, tile_of
from lora_kernels.reference.philox import dropout_threshold

Call = Callable[[], Tensor]
P = 0.1
THRESHOLD = dropout_threshold(P)
BF16 = torch.bfloat16
COPY_GB_S, PRODUCT_TFLOPS = 3029.0, 785.0
"""An H100's measured ceilings (bench/results/nvidia-h100), for the floor that is printed beside the times."""
NOT_OURS = ("library", "addmm")
"""How the names of what the library runs begin."""


@dataclass(frozen=True)
class Group:
    """One problem: what it is called, the least microseconds, and its contenders by name, built when asked."""

    name: str
    floor_us: float
    build: Callable[[torch.device], tuple[dict[str, Call], Call]]


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


def with_dx(m: int, n: int, k: int, *, r: int = 16) -> Group:
    """dx [m, k] = dy W + dyb A, and dA (and dB): one after the other, or the rank-sized products on a second stream.

    The second stream's programs get the multiprocessors that the product leaves, and all of them once it has ended.
    """

    def build(device: torch.device) -> tuple[dict[str, Call], Call]:
        from lora_kernels.kernels.bwd_lora_a import bwd_lora_a
        from lora_kernels.kernels.bwd_lora_b import bwd_lora_b
        from lora_kernels.kernels.persistent import persistent
        from lora_kernels.kernels.reduce_partials import Reduction, reduce_partials
        from lora_kernels.kernels.shrink import shrink

        dy, x, weight = normal(device, m, n), normal(device, m, k), normal(device, n, k, std=n**-0.5)
        dyb, xa, lora_A = normal(device, m, r), normal(device, m, r), normal(device, r, k)
        lora_B = normal(device, n, r)
        big = tile_of("hopper", "16", "persistent", columns=k, rank=r)
        tile_a, tile_b, tile_s = (
            tile_of("hopper", "16", kernel, rank=r) for kernel in ("bwd_lora_a", "bwd_lora_b", "shrink")
        )
        assert big is not None and tile_a is not None and tile_b is not None and tile_s is not None
        second = torch.cuda.Stream(device) if device.type == "cuda" else None

        def from_x() -> None:
            splits = max(1, 264 // -(-k // tile_a.block_k))
            bwd_lora_a(x=x, dyb=dyb, seed=None, threshold=0, splits=splits, precision="ieee", tile=tile_a)

        def from_dy() -> None:
            bwd_lora_b(
                dy=dy, lora_B=lora_B, xa=xa, bias_dtype=None, needs_dyb=False, scale=1.0,
                splits=max(1, 132 // -(-n // tile_b.block_n)), precision="ieee", tile=tile_b,
            )  # fmt: skip

        partials, summed = normal(device, 8, n, r, dtype=torch.float32), normal(device, n, r)

        def a_sum() -> None:
            reduce_partials([Reduction(partials, summed)])

        def for_dyb() -> None:
            shrink(
                x=dy, lora_A=lora_B.T, seed=None, threshold=0, scale=1.0, splits=1, precision="ieee", tile=tile_s
            )  # fmt: skip

        def then(product: Call, *works: Callable[[], None]) -> Tensor:
            out = product()
            for work in works:
                work()
            return out

        def beside(product: Call, *works: Callable[[], None]) -> Tensor:
            if second is None:
                return then(product, *works)
            current = torch.cuda.current_stream(device)
            second.wait_stream(current)
            out = product()
            with torch.cuda.stream(second):
                for work in works:
                    work()
            current.wait_stream(second)
            return out

        library = partial(torch.mm, dy, weight)
        calls: dict[str, Call] = {"library": library}
        calls["library, then dA"] = partial(then, library, from_x)
        calls["library beside dA"] = partial(beside, library, from_x)
        tiles = -(-m // big.block_m) * -(-k // big.block_n)
        for programs in (fewest_programs(tiles, sms) for sms in (132, 124, 112)):
            product = partial(
                persistent, lhs=dy, weight=weight, transpose_weight=False, s=dyb, e=lora_A, bias=None, tile=big,
                sm_count=programs,
            )  # fmt: skip
            name = f"persistent /{programs}"
            calls[name] = product
            calls[f"{name}, then dA"] = partial(then, product, from_x)
            calls[f"{name}, then dB, dA"] = partial(then, product, from_dy, from_x)
            calls[f"{name} beside dA"] = partial(beside, product, from_x)
            # dB's sum ahead of dA: while it runs, the product's programs are placed, on all multiprocessors they want.
            calls[f"{name} beside a sum, dA"] = partial(beside, product, a_sum, from_x)
            calls[f"{name} beside dB, dA"] = partial(beside, product, from_dy, from_x)
            # Not the order of a backward: what a kernel would have to do that makes dyb while it multiplies.
            calls[f"{name} beside dyb"] = partial(beside, product, for_dyb)
        return calls, lambda: torch.mm(dy.float(), weight.float()) + dyb.float() @ lora_A.float()

    return Group(
        f"beside the product dx {m}x{k}x{n} r={r}", floor_us(2.0 * (m * k + n * k + m * n), 2.0 * m * n * k), build
    )


def expands(m: int, n: int, *, r: int = 16, mixed: bool = False) -> Group:
    """base [m, n] + s e."""

    def build(device: torch.device) -> tuple[dict[str, Call], Call]:
        from lora_kernels.kernels.expand import expand

        adapter = torch.float32 if mixed else BF16
        base, s, e = normal(device, m, n), normal(device, m, r, dtype=adapter), normal(device, r, n, dtype=adapter)
        out = torch.empty_like(base)
        calls: dict[str, Call] = {"library copies": lambda: out.copy_(base)}
        for bm, bn, warps in [(64, 128, 8), (128, 64, 8), (64, 64, 4), (64, 256, 8), (32, 128, 4), (32, 256, 8)]:
            tile = Tile(block_m=bm, block_n=bn, block_r=r, num_warps=warps, num_stages=1)
            calls[label("expand", tile)] = partial(
                expand, base=base, s=s, e=e, out=out, out_dtype=BF16, precision="tf32x3" if mixed else "ieee",
                tile=tile,
            )  # fmt: skip
        return calls, lambda: base.float() + s.float() @ e.float()

    kind = ", fp32 adapters" if mixed else ""
    return Group(f"expand {m}x{n} r={r}{kind}", floor_us(4.0 * m * n, 0), build)


def groups() -> list[Group]:
    """All of them, most telling first."""
    q = {"m": 8192, "n": 4096, "k": 4096}
    return [
        with_dx(8192, 4096, 4096),
        with_dx(8192, 14336, 4096),
        with_dx(8192, 4096, 14336),
        with_dx(8192, 1024, 4096),
        with_dx(2048, 4096, 4096),
        with_dx(1024, 4096, 4096),
        expands(8192, 4096),
        expands(8192, 4096, mixed=True),
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
