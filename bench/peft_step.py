"""A training step of PEFT's LoRA layer and of the same layer patched, in interleaved rounds.

    python -m bench.peft_step [--device DEVICE] [--threads N] [--budget SECONDS] [--only WORD] [--out FOLDER]

Three contenders: stock PEFT; the layer as `patch_peft` leaves it; and "always fused", the patched layer without the
rule that leaves small calls on a CPU to PEFT (`lora_kernels.interop._peft_layers.SMALL_CALL`). The ratio of the third
shows on both sides of that rule's limits whether they lie where they should. The target: no patched step is slower.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peft_layers import PATCHED, STOCK, PeftCase, forward, input_of, layers, why_not
from lora_kernels.benchmarking.load import ForeignLoad
from lora_kernels.benchmarking.records import Environment, device_slug, write_csv
from lora_kernels.benchmarking.timer import interleave

ALWAYS_FUSED = "always fused"
# A ratio of medians within this counts as noise; assumed.
NOISE = 1.03

LIMITS = tuple(
    PeftCase(f"square.{width}", M=tokens, N=width, K=width, R=8)
    for tokens, width in ((8, 64), (64, 128), (128, 256), (128, 512), (256, 512), (256, 768), (512, 1024))
)
MODELS = (
    PeftCase("minilm.attention", M=2048, N=384, K=384),
    PeftCase("bert-base.attention", M=1024, N=768, K=768),
    PeftCase("bert-base.up", M=1024, N=3072, K=768),
    PeftCase("bert-base.down", M=1024, N=768, K=3072),
    PeftCase("llama-1b.attention", M=1024, N=2048, K=2048),
    PeftCase("gpt2.c_attn", M=1024, N=2304, K=768, base="conv1d"),
    PeftCase("bert-base.attention", M=1024, N=768, K=768, base="4bit"),
)
SITUATIONS = (("fp32", False), ("bf16", False), ("bf16", True), ("fp32", True))


@dataclass(frozen=True)
class StepRow:
    """Milliseconds of a forward and backward, and the ratio over stock, paired round by round."""

    name: str
    base: str
    M: int
    N: int
    K: int
    R: int
    dtype: str
    autocast: bool
    dropout_p: float
    contender: str
    ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    device: str
    threads: int
    torch: str
    peft: str
    commit: str


def cases() -> Iterator[PeftCase]:
    """Sizes around the limits of the rule for small calls, and linears of models, in every situation."""
    for shape in (*LIMITS, *MODELS):
        for dtype, autocast in SITUATIONS:
            for p in (0.0, 0.1):
                yield dataclasses.replace(shape, dtype=dtype, autocast=autocast, dropout_p=p)


def _step(layer: nn.Module, x: Tensor, dy: Tensor, case: PeftCase) -> Callable[[], None]:
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]

    def step() -> None:
        torch.autograd.grad(forward(layer, x, case), leaves, dy)

    return step


def measure(case: PeftCase, device: torch.device, *, budget_s: float) -> list[StepRow]:
    """A row for each contender."""
    from lora_kernels.interop import _peft_layers

    x = input_of(case, device)
    made = layers(case, device)
    with torch.no_grad():
        dy = torch.randn_like(forward(made[STOCK], x, case))
    steps = {name: _step(layer, x, dy, case) for name, layer in made.items()}
    patched = steps[PATCHED]

    def never(layer: Any, x: Tensor) -> bool:
        return False

    def always_fused() -> None:
        # By hand: mock.patch would be part of what is timed.
        rule, _peft_layers.is_small = _peft_layers.is_small, never
        try:
            patched()
        finally:
            _peft_layers.is_small = rule

    contenders = {**steps, ALWAYS_FUSED: always_fused}
    samples = interleave(contenders, device=device, budget_s=budget_s, warmup=3)
    environment = Environment.current(device)
    rows = []
    for name in contenders:
        ratio = samples.ratio(name, STOCK)
        rows.append(
            StepRow(
                **{field: getattr(case, field) for field in ("name", "base", "M", "N", "K", "R", "dtype", "autocast")},
                dropout_p=case.dropout_p,
                contender=name,
                ms=samples.time(name).median,
                ratio=ratio.median,
                ratio_p10=ratio.p10,
                ratio_p90=ratio.p90,
                **{field: getattr(environment, field) for field in ("device", "threads", "torch", "peft", "commit")},
            )
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peft_step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch's (default: its own choice)")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of timing per case")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, help="folder for peft_step.csv (default: bench/results/local/<device>)")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    load = ForeignLoad()
    print(Environment.current(device).line)
    head = f"{'training step':<20} {'base':<7} {'M':>5} {'N':>5} {'K':>5}  {'dtypes':<14} {'p':>4} {'PEFT ms':>9} "
    head += f"{'x PEFT: patched (p10-p90)':<26} {'always fused':<18}"
    print(f"{head}\n{'-' * len(head)}")
    rows: list[StepRow] = []
    for case in cases():
        if arguments.only not in case.name:
            continue
        if reason := why_not(case):
            print(f"{case.name:<20} {case.base:<7} {reason}")
            continue
        rows += (measured := measure(case, device, budget_s=arguments.budget))
        stock, *ours = measured
        ratios = [f"{row.ratio:.2f} ({row.ratio_p10:.2f}-{row.ratio_p90:.2f})" for row in ours]
        print(
            f"{case.name:<20} {case.base:<7} {case.M:>5} {case.N:>5} {case.K:>5}  {case.label:<14} "
            f"{case.dropout_p:>4g} {stock.ms:>9.3f} {ratios[0]:<26} {ratios[1]:<18}",
            flush=True,
        )
    out = arguments.out or Path(__file__).parent / "results" / "local" / device_slug(device)
    write_csv(rows, out / "peft_step.csv")
    print(f"written: {out / 'peft_step.csv'}")
    patched = [row for row in rows if row.contender == PATCHED]
    slower = [row for row in patched if row.ratio > NOISE]
    print(f"{len(slower)} of {len(patched)} patched steps are more than {NOISE - 1:.0%} slower than PEFT's")
    if (warning := load.warning()) is not None:
        print(warning)
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
