"""The scripts of docs/tutorials/scale_out.md, launched as printed: every parallel form trains as one process does."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.documents import ROOT

STEPS, HALF = 30, 12
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.accelerate_cli"}
TUTORIAL = ROOT / "docs" / "tutorials" / "scale_out.md"
COMMAND = re.compile(r"^    ((?:torchrun|accelerate launch) .*docs/tutorials/scale_out\w*\.py.*)$", re.M)
# Any number of the run is made of sums over at most the 16 x 32 tokens of a batch. Taken in another order, such a sum
# differs by at most so many roundings; a wrong mask, mean or optimiser state shows in the loss's third digit.
ROUNDING = 16 * 32 * torch.finfo(torch.float32).eps
PRINTED = 1e-6  # the last digit of a printed loss
# PyTorch's race (pytorch/pytorch#190489): a gloo worker that lets go of its last tensor while the interpreter ends
# wants the GIL, and aborts the process. A barrier makes that rare, not impossible; by then all ranks have reached the
# script's last one, and what is compared is written.
ABORTED_AT_EXIT = "terminate called without an active exception"


def launch(command: str, out: Path) -> list[float]:
    """The losses that a command prints, which leaves its files in `out`."""
    launcher, *arguments = shlex.split(command)
    ran = subprocess.run(
        [sys.executable, "-m", LAUNCHERS[launcher], *arguments, "--out", str(out)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "PET_STANDALONE": "1",  # torchrun's --standalone: a free port, since other tests may hold the usual one
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    raised = re.search(r'File ".*scale_out\w*\.py"', ran.stderr)  # a frame of the script: an error of its own
    aborted = ABORTED_AT_EXIT in ran.stderr and not raised
    assert ran.returncode == 0 or aborted, f"{command}\n{ran.stdout}{ran.stderr}"
    assert "Warning" not in ran.stderr, ran.stderr
    return [float(loss) for loss in re.findall(r"^step +\d+ +loss ([\d.]+)$", ran.stdout, re.M)]


def adapter_in(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def command(parallel: str) -> str:
    """What the tutorial prints for a form."""
    found = [line for line in COMMAND.findall(TUTORIAL.read_text("utf-8")) if line.endswith(f"--parallel {parallel}")]
    assert len(set(found)) == 1, found
    return found[0]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """(losses, folder) of one process."""
    out = tmp_path_factory.mktemp("one")
    losses = launch("torchrun --nproc-per-node 1 docs/tutorials/scale_out.py", out)
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])  # it learns
    return losses, out


def assert_same_training(losses: list[float], out: Path, one_process: tuple[list[float], Path], start: int = 0) -> None:
    expected = one_process[0][start:]
    assert losses == pytest.approx(expected, rel=ROUNDING, abs=PRINTED)
    found, adapter = adapter_in(out), adapter_in(one_process[1])
    assert found.keys() == adapter.keys()
    for name, value in adapter.items():
        assert (found[name] - value).norm() <= ROUNDING * value.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "fsdp+tp"])
def test_a_form_trains_as_one_process_does(parallel, one_process, tmp_path):
    assert_same_training(launch(command(parallel), tmp_path), tmp_path, one_process)


@pytest.mark.slow
def test_what_one_form_has_begun_another_ends(one_process, tmp_path):
    losses = launch(f"{command('ddp')} --steps {HALF}", tmp_path)
    assert losses == pytest.approx(one_process[0][:HALF], rel=ROUNDING, abs=PRINTED)
    resumed = launch(f"{command('tp')} --resume {tmp_path / f'checkpoint-{HALF}'}", tmp_path)
    assert_same_training(resumed, tmp_path, one_process, start=HALF)


@pytest.mark.slow
def test_accelerate_trains_as_one_process_does(one_process, tmp_path):
    found = {line for line in COMMAND.findall(TUTORIAL.read_text("utf-8")) if line.startswith("accelerate")}
    assert len(found) == 1
    assert_same_training(launch(found.pop(), tmp_path), tmp_path, one_process)


def test_the_readme_has_a_command_that_is_tested():
    commands = COMMAND.findall((ROOT / "README.md").read_text("utf-8"))
    assert set(commands) == {command("fsdp")}


@pytest.mark.parametrize(
    ("processes", "arguments", "told"),
    [
        (2, "", "--parallel none needs one process; got 2"),
        (2, "--parallel ddp --bf16", "--bf16 needs fsdp; got --parallel ddp"),
        (3, "--parallel fsdp+tp", "needs an even number of processes; got 3"),
        (3, "--parallel ddp", r"BATCH \(16\) must be a multiple of the data-parallel ranks; got 3"),
        (6, "--parallel fsdp+tp", r"BATCH \(16\) must be a multiple of the data-parallel ranks; got 3"),
        (8, "--parallel tp", "the 4 heads must be a multiple of the tensor-parallel ranks; got 8"),
    ],
)
def test_what_would_not_train_as_one_process_is_refused_before_anything_waits(processes, arguments, told, monkeypatch):
    script = str(TUTORIAL.with_suffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *arguments.split()])
    monkeypatch.setenv("WORLD_SIZE", str(processes))  # and no rank, so that it can join no group
    with pytest.raises(SystemExit, match=told):
        runpy.run_path(script, run_name="__main__")
