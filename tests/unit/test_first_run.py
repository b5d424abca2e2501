"""The script for a lent GPU, walked through on a CPU: what a part's end costs the others, and what is brought home."""

import tarfile
import time

import pytest
import torch

from bench import first_run
from bench.first_run import Part

SLEEPER = "import signal, time; signal.signal(2, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"


def part(title, code, limit_s=20.0):
    return Part(title, limit_s, ("-c", code))


@pytest.fixture
def out(tmp_path, monkeypatch):
    parts = [
        part("a crash", "import os; os.abort()"),
        part("a hang", SLEEPER, limit_s=1.0),
        part("garbage", "import sys; sys.stdout.buffer.write(bytes(range(256)) * 9)"),
        part("what is right", "print('the last line')"),
    ]
    monkeypatch.setattr(first_run, "parts", lambda *_: parts)
    monkeypatch.setattr(first_run, "KEEP_S", 0.2)
    return tmp_path / "out"


def test_a_part_costs_only_itself(out, capsys):
    start = time.perf_counter()
    assert first_run.main(["--device", "cpu", "--out", str(out)]) == 1
    assert time.perf_counter() - start < 30
    text = (out / "summary.txt").read_text(encoding="utf-8")
    assert "running: nothing" in text
    for line in ("== a crash: -6", "== a hang: stopped after 1 s", "== garbage: 0", "== what is right: 0"):
        assert line in text
    assert "begun" in text
    assert text.rstrip().endswith("the last line")
    with tarfile.open(out / "all.tgz") as archive:
        logs = sorted(name for name in archive.getnames() if name.endswith(".log"))
    assert logs == [f"run/1{n}-{slug}.log" for n, slug in enumerate(("a-crash", "a-hang", "garbage", "what-is-right"))]


def test_what_is_done_is_at_home_while_a_part_runs(out, monkeypatch):
    seen = []

    def slow(part, log, folder):
        log.write_text("half a line", encoding="utf-8")
        deadline = time.perf_counter() + 20
        while not ((out / "all.tgz").exists() and "running: a crash" in (out / "summary.txt").read_text()):
            assert time.perf_counter() < deadline
            time.sleep(0.05)
        seen.append(part.title)
        return first_run.Outcome(part.title, "0", 0.0, log)

    monkeypatch.setattr(first_run, "run_part", slow)
    assert first_run.run(1, "cpu", out, "crash") == 0
    assert seen == ["a crash"]


def test_parts_are_chosen_by_their_words(out):
    assert first_run.main(["--device", "cpu", "--out", str(out), "--only", "right"]) == 0


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_call_fits_its_limit(tmp_path, call):
    listed = first_run.parts(call, "cuda", tmp_path)
    assert sum(each.limit_s for each in listed) <= 420
    assert len({each.title for each in listed}) == len(listed)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first_run.main([]) == first_run.NO_GPU
    assert "needs a GPU" in capsys.readouterr().out
