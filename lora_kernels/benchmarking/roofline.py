"""Ceilings measured on this device, and the least time they allow for a case.

A data sheet's peak is nobody's ceiling: what counts is the best that the vendor's library and a plain copy reach here,
now. A row's share of its roofline is the floor over its median.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.timer import interleave

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Ceilings:
    """The best rates measured on a device.

    Attributes:
        copy_gb_s: bytes read and written by a copy larger than any cache, in 10^9 bytes per second.
        gemm_tflops: dtype → rate of the library's product, in 10^12 operations per second.
    """

    copy_gb_s: float
    gemm_tflops: Mapping[str, float]

    def tflops(self, dtype: str) -> float:
        """The rate a case in `dtype` is held to.

        Never less than fp32's: a CPU without 16-bit matrix instructions multiplies faster after converting.
        """
        return max(self.gemm_tflops[dtype], self.gemm_tflops.get("float32", 0.0))

    @property
    def rates(self) -> str:
        """All of them, in words."""
        products = ", ".join(f"{name} {rate:.3g}" for name, rate in self.gemm_tflops.items())
        copy = f"{self.copy_gb_s:.0f}" if self.copy_gb_s >= 1000 else f"{self.copy_gb_s:.3g}"
        return f"copy {copy} GB/s; library product, TFLOP/s: {products}"

    @property
    def line(self) -> str:
        """One line for the head of a table."""
        return f"ceilings measured here: {self.rates}"


def measure_ceilings(
    device: torch.device, dtypes: Sequence[str] = DTYPES, *, budget_s: float = 1.0, size: int | None = None
) -> Ceilings:
    """Copy bandwidth and the library's product per dtype: the fastest round of each, since a ceiling is a maximum.

    Args:
        device: where.
        dtypes: as torch spells them.
        budget_s: seconds for each measurement.
        size: rows and columns of the square operands; None takes 8192 on a GPU and 1024 on a CPU.
    """
    gpu = device.type == "cuda"
    side = size or (8192 if gpu else 1024)
    elements = side * side * (8 if gpu else 16)
    rates = {}
    for name in dtypes:
        a = torch.randn(side, side, device=device).to(getattr(torch, name))
        out = torch.empty_like(a)
        rates[name] = 2 * side**3 / _product_ms(a, out, device, budget_s) / 1e9
    return Ceilings(copy_gb_s=2 * 4 * elements / _copy_ms(elements, device, budget_s) / 1e6, gemm_tflops=rates)


def _copy_ms(elements: int, device: torch.device, budget_s: float) -> float:
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return _fastest_ms(lambda: target.copy_(source), device, budget_s)


def _product_ms(a: torch.Tensor, out: torch.Tensor, device: torch.device, budget_s: float) -> float:
    # The transposed operand is nn.Linear's layout, which the library may serve faster or slower than the plain one.
    return min(
        _fastest_ms(lambda: torch.mm(a, a, out=out), device, budget_s / 2),
        _fastest_ms(lambda: torch.mm(a, a.T, out=out), device, budget_s / 2),
    )


def _fastest_ms(call: Callable[[], object], device: torch.device, budget_s: float) -> float:
    start = time.perf_counter()
    fastest = min(interleave({"it": call}, device=device, rounds=1).ms["it"])
    while time.perf_counter() - start < budget_s:
        fastest = min(fastest, *interleave({"it": call}, device=device, rounds=1, warmup=0).ms["it"])
    return fastest


def floor_ms(case: LinearCase, ceilings: Ceilings, *, has_lora: bool = True) -> float | None:
    """The least milliseconds for a case: each direction takes what its operations or its bytes take, the longer one.

    None where the dtype's rate was not measured.
    """
    if case.dtype not in ceilings.gemm_tflops:
        return None
    rate, bandwidth = ceilings.tflops(case.dtype) * 1e9, ceilings.copy_gb_s * 1e6
    return sum(max(operations / rate, size / bandwidth) for operations, size in _passes(case, has_lora))


def work(case: LinearCase, *, has_lora: bool = True) -> tuple[int, int]:
    """Operations and bytes of a case, both directions together."""
    passes = _passes(case, has_lora)
    return sum(operations for operations, _ in passes), sum(size for _, size in passes)


def _passes(case: LinearCase, has_lora: bool) -> list[tuple[int, int]]:
    """(operations, bytes) forward and, in a backward case, backward.

    Operations are the products alone. Bytes are each operand read once and each result written once: x, W, A, B and y
    forward; dy, W, x, A, B, dx, dA and dB backward.
    """
    m, n, k = case.M, case.N, case.K
    r = case.R if has_lora else 0
    base, adapter = case.torch_dtype.itemsize, case.torch_adapter_dtype.itemsize
    adapters = adapter * r * (k + n)
    passes = [(2 * m * (n * k + r * (k + n)), base * (m * k + n * k + m * n + (n if case.bias else 0)) + adapters)]
    if case.backward:
        # dx takes dy W, and with LoRA dyb = dy B, dyb A, dA = dyb^T x and dB = dy^T xa; x is read for dA alone.
        inputs = m * n + n * k + (m * k if r else 0)
        passes.append((2 * m * (n * k + 2 * r * (k + n)), base * (inputs + m * k) + 2 * adapters))
    return passes
