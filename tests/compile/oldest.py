"""The oldest Triton that the package allows, in a process of its own, for what the pinned one's figures cannot show.

Its wheel alone, in a folder of its own, compiles: nothing of it is installed. It is fetched when a kernel has no figure
under it in figures.json, and not before. As a script this module is that process: a JSON list of `compile_only`'s
arguments a line in, the figures' numbers a line out.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def oldest_triton() -> str:
    """The version, as pyproject.toml has it, with three numbers as Triton names itself."""
    (least,) = re.findall(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return least + ".0" * (2 - least.count("."))


def fetched() -> Path:
    """The folder that has it; fetched where there is none."""
    version = oldest_triton()
    folder = ROOT / f".triton-{version}"
    if not folder.exists():
        beside = Path(tempfile.mkdtemp(prefix=f".triton-{version}-", dir=ROOT))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        try:
            subprocess.run([*command, "--target", str(beside), f"triton=={version}"], check=True)
            beside.rename(folder)
        except (subprocess.CalledProcessError, OSError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            if not folder.exists():  # another worker may have been first
                raise RuntimeError(
                    f"Triton {version} could not be fetched. figures.json lacks what a kernel takes under it, so the "
                    "kernel has to be compiled: run `make figures` with a network."
                ) from error
    return folder


@functools.cache
def _compiler() -> subprocess.Popen[str]:
    paths = [str(fetched()), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.compile.oldest"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def compiled_numbers(
    fn: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any], target: str, num_warps: int,
    num_stages: int, divisible_by_16: Collection[str], options: Mapping[str, Any],
) -> list[int]:  # fmt: skip
    """`compile_only(...).numbers` under the oldest Triton."""
    compiler = _compiler()
    assert compiler.stdin is not None
    assert compiler.stdout is not None
    name = [fn.fn.__module__, fn.fn.__qualname__]
    request = [name, dict(signature), dict(constexprs), target, num_warps, num_stages, sorted(divisible_by_16)]
    compiler.stdin.write(json.dumps([*request, dict(options)]) + "\n")
    compiler.stdin.flush()
    answer = compiler.stdout.readline()
    if not answer:
        raise RuntimeError(f"Triton {oldest_triton()} could not compile {'.'.join(name)}: see its process's output")
    numbers: list[int] = json.loads(answer)
    return numbers


def serve() -> None:
    """Compiles what standard input asks for until it ends."""
    import triton

    from tests.compile.support import compile_only

    assert triton.__version__ == oldest_triton(), triton.__version__
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anyone prints is no answer
    for line in sys.stdin:
        (module, name), *arguments, options = json.loads(line)
        figures = compile_only(getattr(importlib.import_module(module), name), *arguments, **options)
        answers.write(json.dumps(figures.numbers) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
