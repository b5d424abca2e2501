"""The small measurements behind choices that comments in the CPU code name, so that anyone can repeat them.

python -m bench.choices [--budget SECONDS] [--out FOLDER]

Each line, and row of choices.csv, is one choice: medians of interleaved rounds and the ratio, alternative over chosen,
with its 10th-90th percentile.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lora_kernels.benchmarking.records import Environment, device_slug, write_csv
from lora_kernels.benchmarking.timer import interleave
from lora_kernels.ops._dropout import Dropper
from lora_kernels.planning.device import triton_available
from lora_kernels.reference import philox
from lora_kernels.reference.philox import keep_mask

CPU = torch.device("cpu")
M, N, K, R = 1024, 768, 768, 16
TALL = 2048
P = 0.1


class _WithContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        ctx.save_for_backward(*inputs[:4])
        return inputs[0].clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (dy, *[None] * 8)


class _WithSetupContext(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        return inputs[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (dy, *[None] * 8)


def choices() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What was chosen, and the alternative, by the line that is printed."""
    dy, xa, lora_B, bias = torch.randn(M, N), torch.randn(M, R), torch.randn(N, R), torch.randn(N)
    y = torch.empty(M, N)
    x, seed = torch.randn(M, K), torch.tensor([5])
    drop = Dropper(seed, P, rows=M, columns=K, dtype=x.dtype)
    dropped = torch.empty_like(x)
    small = torch.randn(4, 4, requires_grad=True)
    inputs = (small, *torch.randn(3, 4, 4), None, None, 1.0, 0.0, "auto")

    def long_rows() -> torch.Tensor:
        return torch.mm(xa.T, dy).T.contiguous()

    def folded() -> torch.Tensor:
        wide_xa = torch.cat([xa, xa.new_ones((M, 1))], 1)
        return torch.mm(wide_xa, torch.cat([lora_B, bias[:, None]], 1).T, out=y)

    weight = torch.randn(64, 64).half()
    kept = WeakTensorKeyDictionary()
    kept[weight] = {(16, 32): (weight.data_ptr(), "its descriptor")}

    def look_up() -> str:
        address, descriptor = kept[weight][16, 32]
        return descriptor if address == weight.data_ptr() else ""

    of_launches: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    if triton_available():
        import triton
        from triton.tools.tensor_descriptor import TensorDescriptor

        from lora_kernels.kernels.launch import ceil_div

        of_launches["how many blocks: our own ceil_div, not triton.cdiv"] = (
            lambda: ceil_div(1000, 64),
            lambda: triton.cdiv(1000, 64),
        )
        of_launches["a weight's tensor descriptor: made in each call, not kept"] = (
            lambda: TensorDescriptor.from_tensor(weight, [16, 32]),
            look_up,
        )

    def whole() -> torch.Tensor:
        with mock.patch.dict(philox.COUNTERS_AT_A_TIME, cpu=TALL * K):
            return keep_mask(seed, TALL, K, P)

    return {
        **of_launches,
        f"dB [{N}, {R}] from M = {M} rows: (xa^T dy)^T, not dy^T xa": (
            long_rows,
            lambda: torch.mm(dy.T, xa),
        ),
        f"y = b + xa B^T [{M}, {N}]: b as one more rank, not addmm": (
            folded,
            lambda: torch.addmm(bias, xa, lora_B.T, out=y),
        ),
        f"mask * x [{M}, {K}]: NumPy's in-place rounds in L2, not keep_mask": (
            lambda: drop([(x, dropped)], first_row=0),
            lambda: torch.where(keep_mask(seed, M, K, P), x, 0),
        ),
        f"a mask [{TALL}, {K}] by keep_mask: in pieces, not whole": (
            lambda: keep_mask(seed, TALL, K, P),
            whole,
        ),
        f"mask * x [{M}, {K}], against F.dropout's generator": (
            lambda: drop([(x, dropped)], first_row=0),
            lambda: torch.nn.functional.dropout(x, P),
        ),
        "a new tensor [16, 16]: torch.empty_strided, not torch.empty": (
            lambda: torch.empty_strided((16, 16), (16, 1), dtype=x.dtype, device=CPU),
            lambda: torch.empty((16, 16), dtype=x.dtype, device=CPU),
        ),
        "an autograd node's forward: forward(ctx, ...), not setup_context": (
            lambda: _WithContext.apply(*inputs),
            lambda: _WithSetupContext.apply(*inputs),
        ),
    }


@dataclass(frozen=True)
class ChoiceRow:
    """Milliseconds of what was chosen and of the alternative, and their ratio paired round by round."""

    choice: str
    chosen_ms: float
    alternative_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    device: str
    threads: int
    torch: str
    commit: str


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: one line per choice."""
    parser = argparse.ArgumentParser(prog="python -m bench.choices", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of timing per choice")
    parser.add_argument("--out", type=Path, help="folder for choices.csv (default: bench/results/local/<device>)")
    arguments = parser.parse_args(argv)
    environment = Environment.current(CPU)
    print(environment.line)
    rows = []
    for name, (chosen, alternative) in choices().items():
        contenders = {"chosen": chosen, "alternative": alternative}
        samples = interleave(contenders, device=CPU, budget_s=arguments.budget, warmup=5)
        ratio, ms = samples.ratio("alternative", "chosen"), {key: samples.time(key).median for key in contenders}
        times = f"{ms['chosen']:8.3f} ms, alternative {ms['alternative']:8.3f} ms"
        print(f"{name:<72} {times}  {ratio.median:5.2f}x ({ratio.p10:.2f}-{ratio.p90:.2f})", flush=True)
        where = (environment.device, environment.threads, environment.torch, environment.commit)
        rows.append(ChoiceRow(name, *ms.values(), ratio.median, ratio.p10, ratio.p90, *where))
    out = arguments.out or Path(__file__).parent / "results" / "local" / device_slug(CPU)
    write_csv(rows, out / "choices.csv")
    print(f"written: {out / 'choices.csv'}")


if __name__ == "__main__":
    main()
