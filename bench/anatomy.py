"""Where a CPU's time over the frozen linear goes: its products, and the rank-sized ones added in turn.

    python -m bench.anatomy [--budget SECONDS] [--out FOLDER]

Every stage is the products of the `torch` backend in its order, fp32, forward and backward without a bias, as calls of
the library and nothing else; the last is `lora_linear` through autograd. Interleaved; each stage's time is over the
frozen products' of the same round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.benchmarking.records import Environment, device_slug, write_csv
from lora_kernels.benchmarking.timer import interleave, warm_up

CPU = torch.device("cpu")
M, R = 1024, 16
SIZES = (2048, 1024, 768)  # K = N
BUDGET_S = 8.0
FROZEN = "the two products of the frozen linear"


@dataclass(frozen=True)
class StageRow:
    """One stage at one size: its median, and its time over the frozen products' with the spread of that."""

    stage: str
    M: int
    N: int
    K: int
    R: int
    ms: float
    over_frozen: float
    p10: float
    p90: float
    device: str
    threads: int
    torch: str
    commit: str


def stages(size: int) -> dict[str, Callable[[], object]]:
    """By name, in order: what each adds is in its name."""
    x, dy, weight = torch.randn(M, size), torch.randn(M, size), torch.randn(size, size) / size**0.5
    lora_A, lora_B = torch.randn(R, size) / size**0.5, torch.randn(size, R)
    small = torch.randn(M, R)
    leaves = [t.clone().requires_grad_() for t in (x, lora_A, lora_B)]

    def frozen() -> tuple[Tensor, ...]:
        return torch.mm(x, weight.T), torch.mm(dy, weight)

    def forward(xa: Tensor) -> Tensor:
        return torch.mm(xa, lora_B.T).addmm_(x, weight.T)

    def d_x(dyb: Tensor) -> Tensor:
        return torch.mm(dyb, lora_A).addmm_(dy, weight)

    def expands() -> tuple[Tensor, ...]:
        return forward(small), d_x(small)

    def shrinks() -> tuple[Tensor, ...]:
        xa = torch.mm(x, lora_A.T)
        y = forward(xa)
        dyb = torch.mm(dy, lora_B)
        return y, d_x(dyb)

    def gradients() -> tuple[Tensor, ...]:
        xa = torch.mm(x, lora_A.T)
        y = forward(xa)
        dyb = torch.mm(dy, lora_B)
        d_lora_B = torch.mm(xa.T, dy).T.contiguous()
        d_lora_A = torch.mm(dyb.T, x)
        return y, d_x(dyb), d_lora_A, d_lora_B

    def operation() -> tuple[Tensor, ...]:
        y = lora_linear(leaves[0], weight, *leaves[1:], backend="torch")
        return torch.autograd.grad(y, leaves, dy)

    return {
        FROZEN: frozen,
        "and xa Bᵀ before y, dyb A before dx": expands,
        "and xa = x Aᵀ, dyb = dy B": shrinks,
        "and dA = dybᵀ x, dB = (xaᵀ dy)ᵀ": gradients,
        "lora_linear: the same through autograd": operation,
    }


def measure(size: int, budget_s: float) -> list[StageRow]:
    """A row for each stage."""
    contenders = stages(size)
    samples = interleave(contenders, device=CPU, budget_s=budget_s, warmup=2)
    environment = Environment.current(CPU)
    rows = []
    for name in contenders:
        ratio = samples.ratio(name, FROZEN)
        where = (environment.device, environment.threads, environment.torch, environment.commit)
        sizes = (M, size, size, R)
        rows.append(StageRow(name, *sizes, samples.time(name).median, ratio.median, ratio.p10, ratio.p90, *where))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: a table for each size, and anatomy.csv."""
    parser = argparse.ArgumentParser(prog="python -m bench.anatomy", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of timing per size")
    parser.add_argument("--out", type=Path, help="folder for anatomy.csv (default: bench/results/local/<device>)")
    arguments = parser.parse_args(argv)
    print(Environment.current(CPU).line)
    warm_up(CPU, 1.0)
    rows = []
    for size in SIZES:
        found = measure(size, arguments.budget)
        print(f"\nM = {M}, K = N = {size}, r = {R}, fp32, forward + backward")
        for row in found:
            print(f"  {row.stage:<45} {row.ms:8.3f} ms  {row.over_frozen:.3f}x ({row.p10:.3f}-{row.p90:.3f})")
        rows += found
    out = arguments.out or Path(__file__).parent / "results" / "local" / device_slug(CPU)
    write_csv(rows, out / "anatomy.csv")
    print(f"written: {out / 'anatomy.csv'}")


if __name__ == "__main__":
    main()
