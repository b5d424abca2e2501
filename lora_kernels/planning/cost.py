"""What a plan should cost, in microseconds: passes over memory, work of the matrix units, launches.

    t(GEMM) = max(2 M N K / F, bytes / B) x waves        t(pass) = bytes / B        + launches x gap

F and B are a GPU's data-sheet rates (`tables/`) times what a good kernel reaches of them. The model ranks
compositions where nothing has been measured, and its figures say "modelled" wherever they are shown; a measurement of
this very device (`planning.measured`) always goes before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lora_kernels.planning.problem import Problem, Way
from lora_kernels.planning.tiles import DROPOUT, Tile, Width, dyb_columns, fewest_programs, padded_rank, rates_of

LIBRARY_GEMM, COPY = 0.83, 0.88
"""Share of the data sheet that library GEMMs and copies reach, the last wave of tiles counted apart: an H200 gave 0.81
in 16 waves where 15.5 would do, and 0.89; elsewhere assumed."""
LIBRARY_TILES = ((128, 256), (128, 128))
MOST_WAVES = 1.2
"""At most, of the library's in the better of these tiles: it splits K where so few fill no GPU. 512 x 14336 x 4096, 1.7
waves, takes an H200 95 us, as two whole ones would; the rest is assumed."""
GEMM = {"persistent": 0.8, "descriptors": 0.8, "pointers": 0.8}
"""Rate of our GEMMs over the library's, the expand of a small rank included and the last wave counted apart, where no
GPU of the kind was measured: the lower end of what is plausible. Measured ones are the tables': on an H200 8192 x 4096
x 4096 takes the library 347 us, the persistent kernel 350, descriptors 364, each in 8 waves for 7.8."""
RANK_SIZED = 0.85
"""Rate of a product of a large tensor and one of the rank over a copy's: on an H200 the shrink of x [8192, 4096] takes
17 us longer than that of [512, 4096]. The same over the library's where work is more than bytes: assumed."""
IN_PARTS = 1.3
"""How much longer fp32 adapters, in parts, make it: on an H200 shrink takes 33 us for 28, dA 34 for 30, dyb with dB
54 for 34."""
ONE_PASS: Mapping[Width, float] = {"16": 0.85, "mixed": 0.39, "32": 0.39}
"""Rate at which `one_pass` reads the weight over the library's, for few rows. On an H200, less the 9 us that the
library takes for next to nothing: 16 x 4096 x 4096 in 13.4 us for 10.6, under fp32 adapters in 27; 16 x 4096 x 14336 in
39 for 34. fp32 is assumed."""
SMALL_US = 2.7
"""What a rank-sized kernel takes at least: two of them and their gaps add 9.3 us to a linear of one row on an H200."""
ADDING = 2.25
"""Passes over the output that a library GEMM takes longer when it adds onto what is there: 37 us of an H200 on top of
347 (8192 x 4096 x 4096), 127 on top of 1206 (8192 x 14336 x 4096)."""
LAUNCH_US = 2.0
"""Gap that one more kernel in the stream leaves."""
BACKWARD_LAUNCHES = 5
"""Products and reductions of any backward."""
MASK_INSTRUCTIONS = {"streamed": 25, "accumulator": 45}
"""Instructions per element of a mask, in a kernel that streams x, and in the layout of an accumulator. The first are 15
in the machine code, and take an H200 as long as 25 would: shrink 38 us for 28, dA 42 for 30."""
# Torch's integer Philox on a GPU: about a hundred passes over 8-byte words, one word for 8 elements, read and written.
TORCH_MASK_BYTES = 200
TORCH_MASK_LAUNCHES = 100
MIXED_PRODUCTS = {torch.bfloat16: 3, torch.float16: 4}
"""A 16-bit operand beside an fp32 one: three bf16 products, or two of tf32, each at half of the 16-bit rate."""
BESIDE_US = 5.0
"""What dA adds to a product that it runs beside, on an H200: 5.1 us to 349.6 for x [8192, 4096], where it adds 25 after
it; 6.8 to 1186 where K of the product is 14336; 4.3 to 93.5 for x [2048, 4096]. For x [8192, 14336] it is 18."""
BESIDE_GB_S = 60.0
"""What a multiprocessor without a tile reads meanwhile: four and a short tail read 134 MB in 374 us beside 350."""
LANES_GHZ = 128 * 1.7  # instructions a multiprocessor issues in a nanosecond, all lanes counted


def runs_beside(problem: Problem) -> bool:
    """Whether dA is to run on a second stream beside the persistent kernel: where it takes longer than that costs."""
    if problem.family != "hopper" or problem.device_type != "cuda":
        return False
    rates = rates_of(problem.family, problem.device)
    return problem.M * problem.K * problem.dtype.itemsize / (1e6 * COPY * rates.tbytes) + LAUNCH_US > BESIDE_US


class Costs:
    """The costs of one problem on one device; `of` names the composition."""

    def __init__(self, problem: Problem, tiles: Mapping[str, Tile]) -> None:
        self._problem, self._tiles = problem, tiles
        rates = rates_of(problem.family, problem.device)
        self._rate = GEMM | dict(rates.gemm)
        width: Width = problem.width
        self._flops_us = 1e6 * LIBRARY_GEMM * (rates.tflops_32 if width == "32" else rates.tflops_16)
        self._bytes_us = 1e6 * COPY * rates.tbytes
        self._lanes_us = 1e3 * LANES_GHZ * problem.sm_count

    def of(self, way: Way, *, backward: bool) -> float:
        """Microseconds of one direction."""
        return self._backward(way) if backward else self._forward(way)

    def _pass(self, rows: int, columns: int, passes: float, itemsize: int = 0) -> float:
        return rows * columns * passes * (itemsize or self._problem.dtype.itemsize) / self._bytes_us

    def _gemm(self, rate: float, *, extra_work: float = 0.0, waves: float = 1.0) -> float:
        p = self._problem
        moved = (p.M * p.K + p.N * p.K + p.M * p.N) * p.dtype.itemsize
        work = 2.0 * p.M * p.N * p.K * (1.0 + extra_work) / (self._flops_us * rate)
        # A multiprocessor without a tile reads nothing either: 64 tiles of 64 x 64 on an H200's 132 take 74 us for 16 x
        # 4096 x 14336, the shrink included, where the library takes 43.
        return max(work, moved / self._bytes_us) * waves

    def _library(self, columns: int) -> float:
        """The library's GEMM, of so many columns."""
        p = self._problem
        waves = (_waves(p, rows, width, columns) for rows, width in LIBRARY_TILES)
        return self._gemm(1.0, waves=min(*waves, MOST_WAVES))

    def _rank_sized(self, columns: int, mask_us: float = 0.0, *, kernels: bool) -> float:
        """A product of the rank that reads an [M, columns] tensor, in our kernels or in the library."""
        read = self._pass(self._problem.M, columns, 1) / RANK_SIZED
        if not kernels:
            return read + SMALL_US
        return max(read, mask_us) * (IN_PARTS if self._problem.width == "mixed" else 1.0) + SMALL_US

    def _mask(self, kind: str) -> float:
        p = self._problem
        return p.M * p.K * MASK_INSTRUCTIONS[kind] / self._lanes_us if p.dropout else 0.0

    def _fused(self, way: Way, *, backward: bool = False) -> float:
        """Our GEMM with its expand: whole waves of tiles."""
        p = self._problem
        kernel = "gemm_expand_tma" if p.has_descriptors else "gemm_expand"
        kind = "descriptors" if p.has_descriptors else "pointers"
        if way.strategy == "persistent":
            kernel = kind = "persistent"
        elif backward and p.dropout:
            kernel += DROPOUT
        columns = p.K if backward else p.N
        tile = (self._tiles.get(f"backward.{kernel}") if backward else None) or self._tiles[kernel]
        # fp32 adapters expand in three products of bf16.
        expand = 3 * padded_rank(p.R) / (p.N if backward else p.K) if p.width == "mixed" else 0.0
        in_parts = SMALL_US + LAUNCH_US if p.width == "mixed" and kind == "persistent" else 0.0
        waves = _waves(p, tile.block_m, tile.block_n, columns)
        return in_parts + self._gemm(self._rate[kind], extra_work=expand, waves=waves)

    def _forward(self, way: Way) -> float:
        p = self._problem
        if way.strategy == "one_pass":
            tile_n = self._tiles["one_pass"].block_n
            # Columns of tiles that fill half of the GPU or less split K, and a second launch adds the shares.
            launches = 2 if tile_n * p.sm_count >= 2 * p.N else 1
            read = self._gemm(1.0, extra_work=padded_rank(p.R) / tile_n) / ONE_PASS[p.width]
            return read + launches * LAUNCH_US
        shrink = self._rank_sized(p.K, self._mask("streamed"), kernels=way.backend == "triton") + LAUNCH_US
        if way.strategy in ("shrink_fused", "persistent"):
            return shrink + self._fused(way) + LAUNCH_US
        if way.backend == "torch":
            shrink += self._torch_mask() + self._conversion(p.M, p.K) + self._conversion(p.M, p.N)
        gemm = self._library(p.N) + LAUNCH_US
        if way.backend == "triton" and p.width == "mixed":  # expanded into what the library has written
            return shrink + gemm + max(self._pass(p.M, p.N, 2), SMALL_US) + LAUNCH_US
        # The library's last product adds onto what its first has written.
        return shrink + max(self._pass(p.M, p.N, 1), SMALL_US) + LAUNCH_US + gemm + self._pass(p.M, p.N, ADDING)

    def _backward(self, way: Way) -> float:
        p = self._problem
        kernels = way.backend == "triton"
        read_dy = self._rank_sized(p.N, kernels=kernels)
        read_x = self._rank_sized(p.K, self._mask("streamed"), kernels=kernels)
        if way.backend == "torch":
            converted = 2 * self._conversion(p.M, p.N) + 2 * self._conversion(p.M, p.K)
            rank_sized = 2 * read_dy + read_x + converted + self._torch_mask()
        else:
            rank_sized = read_dy + self._dyb()
        if way.strategy in ("fused", "persistent"):
            gemm = self._fused(way, backward=True) + self._mask("accumulator")
        elif way.backend == "triton" and p.width == "mixed" and not p.dropout:
            gemm = self._library(p.K) + self._pass(p.M, p.K, 2) + LAUNCH_US
        else:  # dx holds its low-rank term before the library adds to it
            gemm = self._pass(p.M, p.K, 1 + ADDING) + self._library(p.K)
        if way.backend == "triton":
            rank_sized += self._beside(gemm, read_x) if way.strategy == "persistent" and runs_beside(p) else read_x
        return rank_sized + gemm + BACKWARD_LAUNCHES * LAUNCH_US

    def _beside(self, product_us: float, alone_us: float) -> float:
        """What dA adds to the persistent kernel's product of this time, taking so long by itself."""
        p = self._problem
        tile = self._tiles.get("backward.persistent") or self._tiles["persistent"]
        tiles = -(-p.M // tile.block_m) * -(-p.K // tile.block_n)
        idle = p.sm_count - fewest_programs(tiles, p.sm_count)
        hidden = idle * BESIDE_GB_S * 1e3 * product_us / (p.M * p.K * p.dtype.itemsize)
        return min(alone_us, BESIDE_US + alone_us * max(0.0, 1.0 - hidden))

    def _dyb(self) -> float:
        """Beside dB from dy: fp32 shares of dyb, written and read again, or dy once more."""
        p = self._problem
        columns = dyb_columns(p.family, p.width, rank=p.R, itemsize=p.dtype.itemsize)
        if columns is None:
            return self._pass(p.M, p.N, 1)
        return self._pass(p.M, p.N, 2 * p.R / columns, itemsize=4)

    def _torch_mask(self) -> float:
        p = self._problem
        if not p.dropout:
            return 0.0
        return p.M * p.K * TORCH_MASK_BYTES / self._bytes_us + TORCH_MASK_LAUNCHES * LAUNCH_US

    def _conversion(self, rows: int, columns: int) -> float:
        """fp32 blocks of a 16-bit tensor, written and read: the library cannot mix dtypes, and a mask needs them."""
        p = self._problem
        if p.dtype.itemsize == 4 or (p.width == "16" and not p.dropout):
            return 0.0
        return max(self._pass(rows, columns, 2, itemsize=4), SMALL_US) + LAUNCH_US


def _waves(problem: Problem, rows: int, width: int, columns: int) -> float:
    """How much longer whole waves of such tiles take than the last one's share of the GPU would."""
    count = -(-problem.M // rows) * -(-columns // width) / problem.sm_count
    return math.ceil(count) / count


class BranchCosts:
    """The costs of one `lora_branch` on one device: passes over x's size and over the output's, and their products."""

    def __init__(self, x_side: Problem, out_side: Problem) -> None:
        """The problem with either side's dtype."""
        self._x, self._out = _Side(x_side, x_side.K), _Side(out_side, out_side.N)
        self._dropout = x_side.dropout

    def forward(self, way: Way) -> float:
        """Microseconds: xa from x, then y from base_out and xa."""
        if way.backend == "triton":
            shrink = max(self._x.streams(1), self._x.work(kernels=True), self._x.mask())
            return shrink + max(self._out.streams(2), self._out.expand_work()) + 2 * LAUNCH_US
        shrink = self._x.blocks(1, masked=self._dropout) + max(self._x.streams(1), self._x.work(kernels=False))
        # The library copies base_out first, and its GEMM reads and writes the copy.
        expand = self._out.streams(2) + max(self._out.streams(2), self._out.work(kernels=False))
        return shrink + expand + self._out.blocks(1) + 3 * LAUNCH_US

    def backward(self, way: Way) -> float:
        """Microseconds: dyb and dB from dy, dA from x, and dx."""
        kernels = way.backend == "triton"
        of_dy, of_x = 2 * self._out.work(kernels=kernels), self._x.work(kernels=kernels)
        launches = BACKWARD_LAUNCHES * LAUNCH_US
        if kernels:
            from_dy = max(self._out.streams(1) + self._out.dyb(), of_dy)
            return from_dy + max(self._x.streams(2), of_x + self._x.expand_work(), self._x.mask()) + launches
        from_dy = self._out.blocks(1) + max(self._out.streams(2), of_dy)
        return from_dy + self._x.blocks(2, masked=self._dropout) + max(self._x.streams(2), 2 * of_x) + launches


class _Side:
    """One large tensor of a branch, [M, columns], beside the rank."""

    def __init__(self, problem: Problem, columns: int) -> None:
        self._problem, self._elements = problem, problem.M * columns
        self._rates = rates_of(problem.family, problem.device)
        self._bytes_us = 1e6 * COPY * self._rates.tbytes

    def streams(self, passes: int) -> float:
        """Reads or writes of the tensor."""
        return self._moved(passes * self._problem.dtype.itemsize)

    def dyb(self) -> float:
        """Beside dB from dy: fp32 shares of dyb, written and read again, or dy once more."""
        p = self._problem
        columns = dyb_columns(p.family, p.width, rank=p.R, itemsize=p.dtype.itemsize)
        return self.streams(1) if columns is None else self._moved(2 * 4 * p.R / columns)

    def work(self, *, kernels: bool) -> float:
        """A product of the tensor with one of the rank, in our kernels or in the library, which knows one dtype."""
        width = self._problem.width
        if width == "mixed":
            p = self._problem
            of_kernels = self._rates.tflops_16 / MIXED_PRODUCTS[p.dtype]
            if p.family == "cdna3" and p.dtype == torch.float16:  # whose matrix unit multiplies fp32 itself
                of_kernels = self._rates.tflops_32
            return self._product(of_kernels if kernels else self._rates.tflops_32, kernels)
        return self._product(self._rates.tflops_16 if width == "16" else self._rates.tflops_32, kernels)

    def expand_work(self) -> float:
        """A product of two tensors of the rank in our kernels: three of bf16 where fp32 meets a 16-bit output."""
        p = self._problem
        if p.adapter_dtype.itemsize == 2:
            return self._product(self._rates.tflops_16, kernels=True)
        return self._product(
            self._rates.tflops_16 / 3 if p.dtype.itemsize == 2 else self._rates.tflops_32, kernels=True
        )

    def mask(self) -> float:
        """The mask made in registers."""
        p = self._problem
        return self._elements * MASK_INSTRUCTIONS["streamed"] / (1e3 * LANES_GHZ * p.sm_count) if p.dropout else 0.0

    def blocks(self, tensors: int, *, masked: bool = False) -> float:
        """What torch adds: fp32 blocks of 16-bit tensors, written and read, under fp32 adapters or a mask; and that."""
        p = self._problem
        converted = p.dtype.itemsize == 2 and (masked or p.width == "mixed")
        return self._moved(2 * 4 * tensors * converted + TORCH_MASK_BYTES * masked)

    def _moved(self, bytes_per_element: float) -> float:
        return self._elements * bytes_per_element / self._bytes_us

    def _product(self, tflops: float, kernels: bool) -> float:
        rate = LIBRARY_GEMM * (RANK_SIZED if kernels else 1.0)
        return 2.0 * self._elements * self._problem.R / (1e6 * rate * tflops)
