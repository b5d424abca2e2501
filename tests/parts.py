"""The parts of the test suite, one pytest process each, and what they need around them.

    python -m tests.parts [PART ...]     # default: those of `make test`
    python -m tests.parts --cpus         # the arithmetic of other processors, as far as this one can show it

Every part runs, whatever the ones before it found; the last lines say how each ended. Exit status: the worst part's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# One thread a worker: the tests' tensors are small, and threads that wait for each other's cores spin.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# The longest tests, whole tutorials, come first: last, they would leave one worker waiting for a minute.
CPU_FOLDERS = ("tests/interop", "tests/unit", "tests/reference")


@dataclass(frozen=True)
class Part:
    """One pytest process: its arguments, its environment beside the caller's, and how many workers share its tests."""

    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    shared: bool = True


# What compares computed numbers, without what takes long for another reason. Of a fresh Intel the variable makes a
# processor on which four of the six tests were red that an AMD EPYC had found; an AMD ignores it.
NUMBERS = (
    *(f"tests/unit/test_{stem}.py" for stem in ("linear", "branch", "linear_autograd", "branch_autograd")),
    *(f"tests/unit/test_{stem}.py" for stem in ("lora_linear_merge", "lora_linear_module", "adapters_files")),
    *(f"tests/interop/test_{stem}.py" for stem in ("adapter_files", "peft_fused")),
    "tests/interop/test_stack_models.py::test_a_model_that_checkpoints_is_one_graph_for_all_lengths",
)
OTHER_ARITHMETIC = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}

PARTS = {
    "unit": Part(CPU_FOLDERS, ONE_THREAD),
    "processors": Part(("--placement", "16", *NUMBERS), ONE_THREAD | OTHER_ARITHMETIC),
    # Its ranks are processes of their own already, and every worker would start a set.
    "distributed": Part(("tests/distributed",), ONE_THREAD, shared=False),
    # Triton reads TRITON_INTERPRET once, when the kernels are imported; its NumPy products are small, too.
    "interpret": Part(("tests/interpret",), ONE_THREAD | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}),
    "compile": Part(("tests/compile",)),
}
# What PyTorch 2.13 cannot do on a processor with AVX-512 whose use it is forbidden: inductor's C++ does not compile
# ("'at::vec' has not been declared"), and attention in 16 bits raises ("pack_vnni2 is only supported when avx512 is").
FORBIDDEN_VECTORS = (
    "tests/interop/test_stack_models.py::test_a_patched_layer_of_a_model_under_inductor",
    "tests/unit/test_stack_checkpointing.py::test_compiled_with_dropout[LoRALinear-inductor",
    "tests/unit/test_stack_compile.py::test_a_block_trains_within_the_budget_with_one_compilation_for_all_sizes",
    "tests/unit/test_operations.py::test_compiled_layer_trains_with_dropout[branch",
    "tests/unit/test_operations.py::test_compiled_layer_trains_with_dropout[linear-torch.bfloat16]",
    "tests/unit/test_bench_llama_step.py",
)
# Each thing that changes how a library adds: the instructions it may use, the order it is bound to, how its threads
# share a product, where its operands lie. MKL heeds ENABLE_INSTRUCTIONS on Intel alone.
CPUS = {
    **{f"MKL_CBWR={value}": Part(CPU_FOLDERS, ONE_THREAD | {"MKL_CBWR": value})
       for value in ("AVX2", "COMPATIBLE", "AVX2,STRICT")},
    **{f"MKL_ENABLE_INSTRUCTIONS={value}": Part(CPU_FOLDERS, ONE_THREAD | {"MKL_ENABLE_INSTRUCTIONS": value})
       for value in ("AVX2", "SSE4_2")},
    # With a cache of their own: Inductor keeps code for other vectors under the same key, whose results are Inf.
    **{f"ATEN_CPU_CAPABILITY={value}": Part(
           (*CPU_FOLDERS, *(f"--deselect={test}" for test in forbidden)),
           ONE_THREAD | {
               "ATEN_CPU_CAPABILITY": value,
               "TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), f"lora_kernels-inductor-{value}"),
           },
       ) for value, forbidden in (("default", FORBIDDEN_VECTORS), ("avx2", FORBIDDEN_VECTORS[-1:]))},
    "ONEDNN_MAX_CPU_ISA=AVX2": Part(CPU_FOLDERS, ONE_THREAD | {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    # One worker, which has the machine's cores for its threads.
    "OMP_NUM_THREADS=2": Part(CPU_FOLDERS, {"OMP_NUM_THREADS": "2"}, shared=False),
    **{f"placement={value}": Part(("--placement", value, *CPU_FOLDERS), ONE_THREAD)
       for value in ("aligned", "4", "8", "16")},
}  # fmt: skip

SUMMARY = re.compile(r"^(=+ )?(?P<found>\d+ \w.*?) in [\d.]+s( \(.*\))?( =+)?$")


@dataclass(frozen=True)
class Outcome:
    """How a part ended: pytest's exit status, its closing line, and the seconds it took."""

    name: str
    status: int
    found: str
    seconds: float

    @property
    def line(self) -> str:
        """For the table at the end."""
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"{self.name:<32} {'green' if not self.status else 'RED':<6} {minutes}:{seconds:02}  {self.found}"


def command(part: Part, workers: int, extra: Sequence[str]) -> list[str]:
    """pytest for the part, with this interpreter."""
    share = ["-n", str(workers), "--dist", "worksteal"] if part.shared and workers > 1 else []
    return [sys.executable, "-m", "pytest", *share, *part.arguments, *extra]


def run(name: str, part: Part, workers: int, extra: Sequence[str]) -> Outcome:
    """Run it, its output passed on as it comes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | part.environment
    print(f"\n== {name}", flush=True)
    start, found = time.monotonic(), ""
    with subprocess.Popen(
        command(part, workers, extra), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        line = b""
        while piece := process.stdout.read1():  # type: ignore[attr-defined]
            sys.stdout.buffer.write(piece)
            sys.stdout.flush()
            *lines, line = (line + piece).split(b"\n")
            for each in lines:
                if match := SUMMARY.match(each.decode(errors="replace")):
                    found = match["found"]
    status = process.returncode
    return Outcome(name, status, found or f"ended with status {status} and no closing line", time.monotonic() - start)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; what stands behind `--` is handed to every pytest."""
    parser = argparse.ArgumentParser(prog="python -m tests.parts", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join([*PARTS, *CPUS])}")
    parser.add_argument("--cpus", action="store_true", help=f"{len(CPUS)} variants of the part `unit`")
    parser.add_argument("--workers", type=int, default=2, help="processes that share a part's tests (default: 2)")
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    arguments, extra = parser.parse_args(given[:split]), given[split + 1 :]
    known = PARTS | CPUS
    if unknown := [name for name in arguments.parts if name not in known]:
        parser.error(f"parts must be of {', '.join(known)}; got {', '.join(unknown)}")
    names = arguments.parts or list(CPUS if arguments.cpus else PARTS)
    outcomes = [run(name, known[name], arguments.workers, extra) for name in names]
    if len(outcomes) > 1:
        print(f"\n{'=' * 100}")
        print("\n".join(outcome.line for outcome in outcomes), flush=True)
    return max((abs(outcome.status) for outcome in outcomes), default=0)


if __name__ == "__main__":
    raise SystemExit(main())
