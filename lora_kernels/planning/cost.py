"""What a plan should cost, in microseconds: passes over memory, work of the matrix units, launches.

    t(GEMM) = max(2 M N K / F, bytes / B)        t(pass) = bytes / B        + launches x gap

F and B are a family's data-sheet rates (`tables/`) times what a good kernel reaches of them. The model ranks
compositions where nothing has been measured, and its figures say "modelled" wherever they are shown; a measurement of
this very device (`planning.measured`) always goes before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kernels.planning.tiles import Width, padded_rank, table_of

if TYPE_CHECKING:
    from lora_kernels.planning.plan import Problem, Way


LIBRARY_GEMM, COPY = 0.80, 0.88
"""Share of the data sheet that library GEMMs and copies reach; public figures for an H100."""
FUSED_GEMM = {"descriptors": 0.93, "pointers": 0.85}
"""Rate of our GEMMs over the library's. Assumed, until a GPU has measured it."""
LAUNCH_US = 2.0
"""Gap that one more kernel in the stream leaves."""
BACKWARD_LAUNCHES = 5
"""Products and reductions of any backward."""
MASK_INSTRUCTIONS = {"streamed": 15, "accumulator": 45}
"""SASS instructions per element of a mask, in a kernel that streams x, and in the layout of an accumulator."""
# Torch's integer Philox on a GPU: about a hundred passes over 8-byte words, one word for 8 elements, read and written.
TORCH_MASK_BYTES = 200
LANES_GHZ = 128 * 1.7  # instructions a multiprocessor issues in a nanosecond, all lanes counted


class Costs:
    """The costs of one problem on one device; `of` names the composition."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        rates = table_of(problem.family).rates
        width: Width = problem.width
        self._flops_us = 1e6 * LIBRARY_GEMM * (rates.tflops_32 if width == "32" else rates.tflops_16)
        self._bytes_us = 1e6 * COPY * rates.tbytes
        self._lanes_us = 1e3 * LANES_GHZ * problem.sm_count

    def of(self, way: Way, *, backward: bool) -> float:
        """Microseconds of one direction."""
        return self._backward(way) if backward else self._forward(way)

    def _pass(self, rows: int, columns: int, passes: float, itemsize: int = 0) -> float:
        return rows * columns * passes * (itemsize or self._problem.dtype.itemsize) / self._bytes_us

    def _gemm(self, rate: float, *, extra_work: float = 0.0, extra_bytes: float = 0.0) -> float:
        p = self._problem
        moved = (p.M * p.K + p.N * p.K + p.M * p.N) * p.dtype.itemsize + extra_bytes
        work = 2.0 * p.M * p.N * p.K * (1.0 + extra_work) / (self._flops_us * rate)
        return max(work, moved / self._bytes_us)

    def _mask(self, kind: str) -> float:
        p = self._problem
        return p.M * p.K * MASK_INSTRUCTIONS[kind] / self._lanes_us if p.dropout else 0.0

    def _rate(self) -> float:
        p = self._problem
        return FUSED_GEMM["descriptors" if p.has_descriptors else "pointers"]

    def _forward(self, way: Way) -> float:
        p = self._problem
        if way.strategy == "one_pass":
            tile_n = 64 if p.width == "16" else 32
            # Columns of tiles that fill half of the GPU or less split K, and a second launch adds the shares.
            launches = 2 if tile_n * p.sm_count >= 2 * p.N else 1
            return self._gemm(FUSED_GEMM["pointers"], extra_work=padded_rank(p.R) / tile_n) + launches * LAUNCH_US
        shrink = max(self._pass(p.M, p.K, 1), self._mask("streamed")) + LAUNCH_US
        if way.strategy in ("shrink_fused", "persistent"):
            return shrink + self._gemm(self._rate()) + LAUNCH_US
        if way.backend == "torch":
            shrink += self._torch_mask() + self._conversion(p.M, p.K) + self._conversion(p.M, p.N)
        expand = self._pass(p.M, p.N, 1) + LAUNCH_US
        return shrink + expand + self._gemm(1.0, extra_bytes=p.M * p.N * p.dtype.itemsize) + LAUNCH_US

    def _backward(self, way: Way) -> float:
        p = self._problem
        read_dy, read_x = self._pass(p.M, p.N, 1), self._pass(p.M, p.K, 1)
        if way.backend == "torch":
            converted = 2 * self._conversion(p.M, p.N) + 2 * self._conversion(p.M, p.K)
            rank_sized = 2 * read_dy + read_x + converted + self._torch_mask()
        else:
            rank_sized = read_dy + max(read_x, self._mask("streamed"))
        if way.strategy in ("fused", "persistent"):
            gemm = self._gemm(self._rate()) + self._mask("accumulator")
        else:  # dx holds its low-rank term before the library adds to it
            gemm = self._pass(p.M, p.K, 1) + self._gemm(1.0, extra_bytes=p.M * p.K * p.dtype.itemsize)
        return rank_sized + gemm + BACKWARD_LAUNCHES * LAUNCH_US

    def _torch_mask(self) -> float:
        p = self._problem
        return p.M * p.K * TORCH_MASK_BYTES / self._bytes_us if p.dropout else 0.0

    def _conversion(self, rows: int, columns: int) -> float:
        """fp32 blocks of a 16-bit tensor, written and read: the library cannot mix dtypes, and a mask needs them."""
        p = self._problem
        wide = p.dtype.itemsize == 2 and (p.width == "mixed" or p.dropout)
        return self._pass(rows, columns, 2, itemsize=4) if wide else 0.0
