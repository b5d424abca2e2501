"""The command line: `lora-kernels info | check | bench | tune`, also as `python -m lora_kernels`.

Exit status: 0 done, 1 the command found a fault (a failed check, a refused benchmark), 2 it was called wrongly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lora_kernels import config
from lora_kernels.cli import bench, check, info, tune
from lora_kernels.errors import LoRAKernelsError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; argv None means the process's own arguments. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="lora-kernels", description="Fused LoRA for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in (info, check, bench, tune):
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        config.auto_backend()  # before anything runs: what is wrong with it is wrong with the call
        return int(arguments.run(arguments))
    except LoRAKernelsError as error:
        print(f"lora-kernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `lora-kernels check | head`: the reader has seen enough
        sys.stderr.close()
        return 1
