"""Measured errors against fp64, for docs/design/numerics.md.

    TRITON_INTERPRET=1 python -m bench.numerics [--write docs/design/numerics.md]

Needs no GPU: the kernels run in Triton's interpreter, which rounds where they round.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.benchmarking.records import Environment
from lora_kernels.config import INTERPRETED
from lora_kernels.ops import problem_of
from lora_kernels.planning import Plan, make_plan
from lora_kernels.planning.plan import paired
from lora_kernels.testing import LinearInputs, make_linear_inputs, relative_error, run_linear, run_linear_plan

M, N, K, R = 512, 384, 512, 16
DTYPES = (
    ("fp32", torch.float32, torch.float32),
    ("bf16", torch.bfloat16, torch.bfloat16),
    ("bf16, fp32 adapters", torch.bfloat16, torch.float32),
    ("fp16", torch.float16, torch.float16),
    ("fp16, fp32 adapters", torch.float16, torch.float32),
)
TENSORS = ("y", "d_x", "d_lora_A", "d_lora_B", "d_bias")
MARKS = re.compile(r"(<!-- numerics: begin -->\n).*(<!-- numerics: end -->)", re.DOTALL)


def plans(dtype: torch.dtype, adapter_dtype: torch.dtype) -> dict[str, Plan | None]:
    """The columns; None where a strategy does not exist for the dtype."""
    problem = problem_of(
        M, N, K, R, dtype=dtype, adapter_dtype=adapter_dtype, dropout=False, device=torch.device("cpu")
    )
    library = make_plan(problem, "torch", triton_available=True)
    columns: dict[str, Plan | None] = {"torch, library": paired(problem, library, "library")}
    half = dtype != torch.float32
    columns["torch, upcast"] = paired(problem, library, "upcast") if half else None
    if INTERPRETED:
        columns["triton, interpreted"] = make_plan(problem, "triton", triton_available=True)
    return columns


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> list[float]:
    return [relative_error(found[name], truth[name]) for name in TENSORS]


def table() -> str:
    machine = Environment.current(torch.device("cpu"))
    lines = [
        f"{machine.line}:",
        "",
        f"| dtype | computed by | {' | '.join(TENSORS)} |",
        f"|---|---|{'---|' * len(TENSORS)}",
    ]
    for name, dtype, adapter_dtype in DTYPES:
        inputs: LinearInputs = make_linear_inputs(M, N, K, R, dtype=dtype, adapter_dtype=adapter_dtype, seed=3)
        truth = run_linear(inputs.double(), "reference")
        rows = {"eager chain": errors(run_linear(inputs, "reference"), truth)}
        for column, plan in plans(dtype, adapter_dtype).items():
            if plan is not None:
                rows[column] = errors(run_linear_plan(inputs, plan), truth)
        lines += [f"| {name} | {column} | {' | '.join(f'{e:.1e}' for e in row)} |" for column, row in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.numerics", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="document whose table is replaced, between its two marks")
    arguments = parser.parse_args()
    found = table()
    if arguments.write is None:
        print(found, end="")
        return
    text = arguments.write.read_text(encoding="utf-8")
    if not MARKS.search(text):
        parser.error(f"{arguments.write} has no table to replace")
    arguments.write.write_text(MARKS.sub(lambda match: match[1] + found + match[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
