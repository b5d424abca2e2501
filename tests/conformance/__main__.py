"""`make conformance`: PEFT's own tests without and with `patch_peft`; the summary goes to docs/interop/conformance.md.

    PYTHONPATH=tests python -m conformance [--files NAME ...] [-k EXPRESSION] [--workers N]

Downloads the tests of the installed version of PEFT into build/conformance. With --files or -k only those tests are
run, and the summary is printed instead. Exit status 1 if a test fails with the patch that passes without it, if a fused
call is beyond the error budget, or if the comparison does not see the faults that are put in to test it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import faults, suite
from .report import FaultRun, Run, page, verdict

PAGE = suite.ROOT / "docs" / "interop" / "conformance.md"
# Where faults are tried: layers with and without dropout, in training and evaluation.
FAULT_FILES, FAULT_TESTS = ("custom_models",), "Vanilla and LoRA and TestPeftCustomModel"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="+", choices=suite.FILES, default=suite.FILES, metavar="NAME")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="as pytest's")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args(argv)
    whole = arguments.files == suite.FILES and not arguments.k
    folder = suite.fetch()
    suite.check_files(folder)

    def run(name: str, files: Sequence[str], expression: str, *options: str) -> Run:
        print(f"\n{name}", flush=True)
        outcomes = suite.BUILD / f"{name.replace(' ', '-')}.jsonl"
        selection = ["-k", expression] if expression else []
        suite.run(folder, outcomes, [*selection, *options], files, arguments.workers)
        return Run.read(outcomes)

    off = run("without the patch", arguments.files, arguments.k)
    on = run("with the patch", arguments.files, arguments.k, "--lora-kernels=on")
    broken = [
        FaultRun.of(fault, off, run(fault, FAULT_FILES, FAULT_TESTS, "--lora-kernels=on", f"--fault={fault}"))
        for fault in (faults.FAULTS if whole else ())
    ]
    text, wrong = page(off, on, broken), verdict(off, on, broken)
    if whole:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
        print(f"\nwrote {PAGE.relative_to(suite.ROOT)}")
    else:
        print(f"\n{text}")
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
