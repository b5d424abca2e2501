import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels
from lora_kernels import config
from lora_kernels.benchmarking import runner
from lora_kernels.cli import check, info, main
from lora_kernels.config import INTERPRETED
from lora_kernels.ops import _branch_torch, _linear_torch

ROOT = Path(__file__).resolve().parents[2]


def run_json(capsys, *argv: str) -> tuple[int, dict]:
    status = main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_python_m_lora_kernels_is_the_command_line():
    command = [sys.executable, "-m", "lora_kernels", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("lora-kernels", "info", "check", "bench"))


@pytest.mark.parametrize("argv", [(), ("tuna",), ("check", "--backend", "reference"), ("bench", "--rank", "many")])
def test_a_wrong_call_ends_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "lora-kernels" in capsys.readouterr().err


# -- info


def test_info_json(capsys):
    status, report = run_json(capsys, "info")
    assert status == 0
    assert report["versions"]["lora_kernels"] == lora_kernels.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"
    available = {(b["device"], b["backend"]): b["available"] for b in report["backends"]}
    assert available["cpu", "torch"]
    assert available["cpu", "triton"] == INTERPRETED
    assert all(b["why_not"] for b in report["backends"] if not b["available"])
    assert all(plan["reason"] for plan in report["plans"])


def test_info_text_says_the_same(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"lora_kernels {lora_kernels.__version__}" in text
    assert "LORA_KERNELS_BACKEND=auto" in text
    assert text.count("training") == 3 * len(info.collect()["devices"])


NO_BACKEND = (
    "LORA_KERNELS_BACKEND must be one of auto, torch, triton, reference; got 'foo'. Unset it, or name one of them."
)


def test_an_environment_that_names_no_backend_is_one_line_and_status_2():
    environment = {**os.environ, "LORA_KERNELS_BACKEND": "foo"}
    command = [sys.executable, "-m", "lora_kernels", "info"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"lora-kernels info: {NO_BACKEND}"]


def test_check_says_the_same(monkeypatch, capsys):
    monkeypatch.setattr(config, "AUTO_BACKEND", "foo")
    assert main(["check", "--quick", "--device", "cpu"]) == 2
    assert capsys.readouterr() == ("", f"lora-kernels check: {NO_BACKEND}\n")


def test_info_says_once_why_the_backend_asked_for_cannot_serve(monkeypatch, capsys):
    monkeypatch.setattr(config, "AUTO_BACKEND", "triton")
    monkeypatch.setattr(config, "INTERPRETED", False)  # or the interpreter would serve the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.count("refused: backend='triton' cannot serve this problem: tensors are on the CPU") == 1
    assert text.count("refused\n") == len(info.TYPICAL)


# -- check


def test_check_passes(capsys):
    status, report = run_json(capsys, "check", "--quick", "--device", "cpu", "--backend", "torch")
    assert (status, report["failed"]) == (0, 0)
    rows = report["rows"]
    assert {row["case"] for row in rows} == {case.name for case in (*check.QUICK, check.MASK_CASE)}
    assert {row["dtype"] for row in rows if row["strategy"] != "branch"} == {"fp32", "bf16", "bf16+fp32"}
    assert {row["strategy"] for row in rows if row["dtype"] != "fp32"} == {"library", "upcast", "branch"}
    others = {"bf16>fp32", "bf16+fp32>fp32", "fp32>bf16"}
    assert {row["dtype"] for row in rows if row["strategy"] == "branch"} == {"fp32", "bf16", "bf16+fp32", *others}
    assert all(row["error"] <= row["limit"] for row in rows)


def test_check_prints_a_line_for_each_row(capsys):
    assert main(["check", "--quick", "--device", "cpu", "--backend", "torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["device", "backend", "strategy"]
    assert lines[-1] == f"{len(lines) - 2} of {len(lines) - 2} checks passed"


def broken(monkeypatch, name, change):
    working = getattr(_linear_torch, name)
    monkeypatch.setattr(_linear_torch, name, lambda *args: change(*working(*args)))


def check_quickly(capsys) -> tuple[int, str]:
    status = main(["check", "--quick", "--device", "cpu", "--backend", "torch"])
    return status, capsys.readouterr().err


def test_a_wrong_output_fails_and_is_named(monkeypatch, capsys):
    broken(monkeypatch, "forward", lambda y, xa: (y * 1.01, xa))
    status, errors = check_quickly(capsys)
    assert status == 1
    assert "FAILED torch (library) on cpu, fp32, prime: y is off by 1.0e-02" in errors


def test_a_wrong_gradient_fails_and_is_named(monkeypatch, capsys):
    broken(monkeypatch, "backward", lambda dx, dw, da, db, bias: (dx, dw, 2 * da, db, bias))
    status, errors = check_quickly(capsys)
    assert status == 1
    assert "FAILED torch (library) on cpu, fp32, even: d_lora_A is off by 1.0e+00" in errors


def test_a_mask_that_is_off_by_one_bit_fails(monkeypatch, capsys):
    def flip(y, xa):
        if y.shape == (check.MASK_CASE.M, check.MASK_CASE.N):
            y[3, 5] = 1 - (y[3, 5] != 0).to(y.dtype)
        return y, xa

    broken(monkeypatch, "forward", flip)
    status, errors = check_quickly(capsys)
    assert status == 1
    assert "FAILED torch (library) on cpu, fp32, mask: 1 of 10201 mask bits in y differ" in errors


def test_a_wrong_branch_fails_and_is_named(monkeypatch, capsys):
    right = _branch_torch.backward
    monkeypatch.setattr(
        _branch_torch, "backward", lambda *args: tuple(2 * g if g is not None else g for g in right(*args))
    )
    status, errors = check_quickly(capsys)
    assert status == 1
    assert "FAILED torch (branch) on cpu, fp32, even: d_" in errors
    assert "FAILED torch (library)" not in errors
    assert ", mask:" not in errors  # doubled, but where it should be


def test_a_branch_whose_mask_is_off_fails(monkeypatch, capsys):
    right = _branch_torch.forward

    def flip(*args):
        y, xa = right(*args)
        if y.shape == (check.MASK_CASE.M, check.MASK_CASE.N):
            y[3, 5] = 1 - (y[3, 5] != 0).to(y.dtype)
        return y, xa

    monkeypatch.setattr(_branch_torch, "forward", flip)
    status, errors = check_quickly(capsys)
    assert status == 1
    assert "FAILED torch (branch) on cpu, bf16>fp32, mask: 1 of 10201 mask bits in y differ" in errors


def test_unwritten_memory_fails(monkeypatch, capsys):
    broken(monkeypatch, "forward", lambda y, xa: (torch.empty_like(y), xa))
    assert check_quickly(capsys)[0] == 1


def test_bits_that_change_from_run_to_run_fail(monkeypatch, capsys):
    monkeypatch.setattr(check, "_runs", lambda backend: 2)  # as of a kernel
    calls = iter(range(10**6))
    broken(monkeypatch, "forward", lambda y, xa: (y * (1 + next(calls) % 2 * torch.finfo(y.dtype).eps), xa))
    status, errors = check_quickly(capsys)
    assert status == 1
    assert "another run gave other bits in y" in errors


def test_an_exception_is_a_failed_row_and_the_rest_still_runs(monkeypatch, capsys):
    def refuse(y, xa):
        if y.dtype == torch.bfloat16:
            raise RuntimeError("out of resource: shared memory\nand a long trace")
        return y, xa

    broken(monkeypatch, "forward", refuse)
    status, errors = check_quickly(capsys)
    assert status == 1
    assert "RuntimeError: out of resource: shared memory\n" in errors
    assert ", fp32," not in errors


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
def test_a_backend_that_cannot_serve_is_not_passed_over(capsys):
    assert main(["check", "--backend", "triton", "--device", "cpu"]) == 2
    assert "triton on cpu: tensors are on the CPU" in capsys.readouterr().err


def test_an_unknown_device_is_named(capsys):
    assert main(["check", "--device", "abacus"]) == 2
    assert "--device must be a device of this machine; got 'abacus'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tune", "bench"])
@pytest.mark.parametrize("device", ["abacus", *([] if torch.cuda.is_available() else ["cuda"])])
def test_every_command_refuses_a_device_that_is_not_there(command, device, capsys):
    assert main([command, "--device", device]) == 2
    assert f"--device must be a device of this machine; got {device!r}" in capsys.readouterr().err


# -- bench


def test_bench_writes_its_files(tmp_path, capsys):
    shapes = ["--shapes", "48x40x32", "--rank", "4", "--dtype", "bf16", "--adapter-dtype", "fp32"]
    assert main(["bench", *shapes, "--device", "cpu", "--budget", "0.01", "--out", str(tmp_path)]) == 0
    with (tmp_path / "linear.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["mode"] for row in rows} == {"forward", "forward+backward"}
    assert {(row["M"], row["N"], row["K"], row["R"]) for row in rows} == {("48", "40", "32", "4")}
    assert {(row["dtype"], row["adapter_dtype"]) for row in rows} == {("bfloat16", "float32")}
    assert {row["status"] for row in rows} == {"ok"}
    assert json.loads((tmp_path / "linear.json").read_text())
    assert (tmp_path / "linear.png").stat().st_size > 1000
    assert "48x40x32" in capsys.readouterr().out


def test_bench_goes_on_after_an_exception_and_ends_with_status_1(monkeypatch, tmp_path, capsys):
    def refuse(y, xa):
        raise RuntimeError("out of resource: shared memory\nand a long trace")

    broken(monkeypatch, "forward", refuse)
    assert main(["bench", "--shapes", "48x40x32", "--device", "cpu", "--budget", "0.01", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "linear.json").read_text())
    status = {(row["mode"], row["provider"]): row["status"] for row in rows}
    for mode in ("forward", "forward+backward"):
        assert status[mode, "unfused chain"] == "ok"
        assert status[mode, "torch"] == "failed: RuntimeError: out of resource: shared memory"
    assert "torch failed: RuntimeError" in capsys.readouterr().out


def test_an_interrupted_bench_keeps_the_cases_it_has(monkeypatch, tmp_path):
    measure, calls = runner.run_case, []

    def stop(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(runner, "run_case", stop)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "--shapes", "48x40x32", "--device", "cpu", "--budget", "0.01", "--out", str(tmp_path)])
    modes = {row["mode"] for row in json.loads((tmp_path / "linear.json").read_text())}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--shapes", "4096x4096"), "--shapes must be MxNxK"),
        (("--shapes", "8x8x0"), "--shapes must be MxNxK"),
        (("--rank", "513"), "--rank must be an int from 1 to 512"),
        (("--shapes", "8x8x8", "--dropout", "1"), r"--dropout must be a number in \[0, 1\)"),
        (("--dropout", "0.1"), "--dropout goes with --shapes"),
        (("--only", "nothing"), "--only must match a case"),
        (("--budget", "0"), "--budget must be a positive number"),
    ],
)
def test_bench_refuses_before_any_work(argv, message, capsys, tmp_path):
    assert main(["bench", "--device", "cpu", "--out", str(tmp_path / "out"), *argv]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert not captured.out
    assert not (tmp_path / "out").exists()
