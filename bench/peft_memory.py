"""What a LoRA layer keeps for backward: stock PEFT beside the same layer patched, by autograd's own hooks.

    python -m bench.peft_memory [--device DEVICE] [--out FOLDER]

In units of x in bf16, M * K * 2 bytes. x itself is counted where it is kept; parameters are not, since they are alive
anyway. The default of PEFT and of the trainers over it is fp32 adapters on a 16-bit base, with some dropout.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.peft_layers import PATCHED, STOCK, PeftCase, forward, input_of, layers, why_not
from lora_kernels.benchmarking.memory import saved_bytes
from lora_kernels.benchmarking.records import Environment, device_slug, write_csv

SHAPES = (
    PeftCase("bert-base.attention", M=1024, N=768, K=768),
    PeftCase("bert-base.up", M=1024, N=3072, K=768),
    PeftCase("bert-base.down", M=1024, N=768, K=3072),
    PeftCase("llama-1b.attention", M=1024, N=2048, K=2048),
    PeftCase("gpt2.c_attn", M=1024, N=2304, K=768, base="conv1d"),
    PeftCase("llama-1b.attention", M=1024, N=2048, K=2048, base="4bit"),
)
TARGET = 0.4


@dataclass(frozen=True)
class MemoryRow:
    """Bytes kept for backward, and the same in units of x in bf16."""

    name: str
    base: str
    M: int
    N: int
    K: int
    R: int
    dtype: str
    autocast: bool
    dropout_p: float
    stock_bytes: int
    patched_bytes: int
    stock_units: float
    patched_units: float
    device: str
    torch: str
    peft: str
    commit: str

    @property
    def share(self) -> float:
        """What of the stock layer's bytes is left."""
        return self.patched_bytes / self.stock_bytes


def cases() -> Iterator[PeftCase]:
    """Every shape in bf16, with and without autocast and dropout."""
    for shape in SHAPES:
        for autocast in (False, True):
            for p in (0.0, 0.1):
                yield dataclasses.replace(shape, autocast=autocast, dropout_p=p)


def measure(case: PeftCase, device: torch.device) -> MemoryRow:
    """One case's row."""
    x = input_of(case, device)
    kept = {
        name: saved_bytes(lambda layer=layer: forward(layer, x, case), beyond=layer.parameters())
        for name, layer in layers(case, device).items()
    }
    unit, environment = case.M * case.K * 2, Environment.current(device)
    return MemoryRow(
        **{field: getattr(case, field) for field in ("name", "base", "M", "N", "K", "R", "dtype", "autocast")},
        dropout_p=case.dropout_p,
        stock_bytes=kept[STOCK],
        patched_bytes=kept[PATCHED],
        stock_units=kept[STOCK] / unit,
        patched_units=kept[PATCHED] / unit,
        **{field: getattr(environment, field) for field in ("device", "torch", "peft", "commit")},
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peft_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for peft_memory.csv (default: bench/results/local/<device>)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    print(Environment.current(device).line)
    head = f"{'kept for backward, in bf16 x':<28} {'base':<7} {'M':>5} {'N':>5} {'K':>5} {'R':>3}  "
    head += f"{'dtypes':<14} {'p':>4} {STOCK:>7} {PATCHED:>8} {'share':>6}"
    print(f"{head}\n{'-' * len(head)}")
    rows = []
    for case in cases():
        if reason := why_not(case):
            print(f"{case.name:<28} {case.base:<7} {reason}")
            continue
        rows.append(row := measure(case, device))
        print(
            f"{row.name:<28} {row.base:<7} {row.M:>5} {row.N:>5} {row.K:>5} {row.R:>3}  "
            f"{case.label:<14} {row.dropout_p:>4g} {row.stock_units:>7.2f} {row.patched_units:>8.2f} {row.share:>6.0%}"
        )
    out = arguments.out or Path(__file__).parent / "results" / "local" / device_slug(device)
    write_csv(rows, out / "peft_memory.csv")
    print(f"written: {out / 'peft_memory.csv'}")
    dropped = [row for row in rows if row.dropout_p > 0]
    worst = max(dropped, key=lambda row: row.share, default=None)
    if worst is None:
        return 0
    print(f"with dropout, at most {worst.share:.0%} of stock (target: {TARGET:.0%})")
    return 0 if worst.share <= TARGET else 1


if __name__ == "__main__":
    raise SystemExit(main())
