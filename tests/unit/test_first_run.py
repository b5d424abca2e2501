"""The script for a lent GPU, rehearsed on a CPU: every part's command, what a part's end costs, what comes home."""

import json
import os
import signal
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch

from bench import compiled_ahead, first_run, gpu_parts
from bench.first_run import LIMITS, failed_tests, ratios, run, summary
from bench.gpu_parts import Part, parts
from lora_kernels.benchmarking.records import Record, read_csv, write_csv

SLEEPER = "import signal, time; signal.signal(2, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
TEST = "tests/gpu/test_linear.py::test_a[plain-(150, 200, 168)-bf16]"
RED = f"FAILED {TEST} - AssertionError: 3 - 2"


def part(title, code, limit_s=20.0, needs_gib=0.0):
    return Part(title, limit_s, ("-c", code), "nothing", needs_gib)


PARTS = [
    part("a crash", "import os; os.abort()"),
    part("a hang", SLEEPER, limit_s=1.0),
    part("garbage", "import sys; sys.stdout.buffer.write(bytes(range(256)) * 9)"),
    part("a red test", f"print({RED!r}); raise SystemExit(1)"),
    part("what is right", "print('the last line')"),
]


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(first_run, "parts", lambda *_, **__: PARTS)
    monkeypatch.setattr(first_run, "KEEP_S", 0.2)
    monkeypatch.setattr(first_run, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(compiled_ahead, "FOLDER", tmp_path / "compiled")
    return tmp_path / "out"


# Of call 1 all; of the others what it does not have. Parts that compare times are no matter of right and wrong here.
@pytest.mark.parametrize(
    ("call", "words"),
    [("1", ""), ("2", "Llama,kernels by,torch.compile,tune,tests of what"), ("later", "headline,long")],
)
def test_every_command_is_one_that_runs(tmp_path, monkeypatch, call, words):
    monkeypatch.setattr(first_run, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(compiled_ahead, "CACHE", tmp_path / "cache")  # else whatever this machine has compiled ahead
    asked = [
        p.title
        for p in parts(call, "cpu", tmp_path, [], warmed=False)
        if any(word in p.title for word in words.split(","))
    ]
    status = run(call, "cpu", tmp_path / "out", words)
    text = (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8")
    assert status == 0, text
    for title in asked:
        assert f"== {title}: 0, " in text
    assert "What only a GPU can show:" in text
    with tarfile.open(tmp_path / "out" / "all.tgz") as archive:
        logs = [name for name in archive.getnames() if name.endswith(".log")]
    assert len(logs) == len(asked)


def test_a_part_costs_only_itself(out):
    start = time.perf_counter()
    assert first_run.main(["--device", "cpu", "--out", str(out)]) == 1
    assert time.perf_counter() - start < 40
    text = (out / "summary.txt").read_text(encoding="utf-8")
    assert "running: nothing" in text
    for line in ("== a crash: -6", "== a hang: stopped after 1 s", "== garbage: 0", "== what is right: 0"):
        assert line in text
    assert "begun" in text
    assert "the last line" in text
    assert f"1 tests failed:\n  {TEST}\n" in text
    with tarfile.open(out / "all.tgz") as archive:
        logs = sorted(name for name in archive.getnames() if name.endswith(".log"))
    slugs = ("a-crash", "a-hang", "garbage", "a-red-test", "what-is-right")
    assert logs == [f"run/1-{n:02}-{slug}.log" for n, slug in enumerate(slugs)]


def test_call_2_looks_into_what_call_1_left_red(out, monkeypatch):
    asked = []
    monkeypatch.setattr(first_run, "parts", lambda *given, **_: asked.append(given[3]) or PARTS)
    first_run.main(["--device", "cpu", "--out", str(out), "--only", "red"])
    first_run.main(["--device", "cpu", "--out", str(out), "--only", "right", "--call", "2"])
    assert asked[-2] == [TEST]
    assert "call 1 left 1 failed tests" in (out / "summary.txt").read_text(encoding="utf-8")
    red, green = (gpu_parts.parts("2", "cuda", out, failed, warmed=True) for failed in ([TEST], []))
    assert {p.title for p in red} - {p.title for p in green} >= {"what failed, under memcheck"}


def test_what_is_done_is_at_home_while_a_part_runs(out, monkeypatch):
    seen = []

    def slow(part, log, folder, limit_s):
        log.write_text("half a line", encoding="utf-8")
        deadline = time.perf_counter() + 20
        while not ((out / "all.tgz").exists() and "running: a crash" in (out / "summary.txt").read_text()):
            assert time.perf_counter() < deadline
            time.sleep(0.05)
        seen.append(part.title)
        return first_run.Outcome(part.title, "0", 0.0, log)

    monkeypatch.setattr(first_run, "run_part", slow)
    assert run("1", "cpu", out, "crash") == 0
    assert seen == ["a crash"]


def test_what_does_not_fit_is_named_and_left_out(out, monkeypatch):
    monkeypatch.setattr(first_run, "parts", lambda *_, **__: [part("large", "", needs_gib=75), PARTS[-1]])
    monkeypatch.setattr(first_run, "memory_gib", lambda _: 40.0)
    assert run("1", "cpu", out, "") == 1
    assert "large: left out: needs 75 GiB of GPU memory, there are 40" in (out / "summary.txt").read_text()
    monkeypatch.setattr(first_run, "parts", lambda *_, **__: [PARTS[-1]])
    monkeypatch.setitem(LIMITS, "1", 3.0)
    assert run("1", "cpu", out, "") == 1
    assert "== what is right: left out, for want of time" in (out / "summary.txt").read_text()


@pytest.mark.parametrize("warmed", [False, True])
@pytest.mark.parametrize("failed", [[], [TEST]], ids=["green", "red"])
@pytest.mark.parametrize("call", LIMITS)
def test_a_call_fits_its_limit(tmp_path, call, failed, warmed):
    listed = parts(call, "cuda", tmp_path, failed, warmed=warmed)
    # Of each part, beside its time: its start, and up to eight seconds to end it.
    assert sum(each.limit_s for each in listed) <= LIMITS[call] - 10
    assert len({each.title for each in listed}) == len(listed)
    assert sum(LIMITS[c] for c in ("1", "2")) <= 760  # of 900 s, with two starts of a machine
    assert all(each.shows for each in listed)
    # Tests in many processes that compile would compile the same kernels in each.
    assert any(each.command[1:3] == ("bench.gpu_parts", "warm") for each in listed) == (call != "2" and not warmed)


def test_the_summary_has_the_ratio_with_the_hosts_time_and_in_a_graph_beside_it(tmp_path):
    folder = Path(__file__).parents[2] / "bench" / "results" / "nvidia-h200"
    rows = read_csv(folder / "linear.csv", Record)
    ours = next(r for r in rows if r.provider == "auto" and r.cost)
    (tmp_path / "headline").mkdir()
    changed = Record(**vars(ours) | {"host_us": 214.2, "graph_cost": 1.12})
    frozen = next(r for r in rows if r.provider == "frozen linear")
    write_csv([frozen, changed], tmp_path / "headline" / "linear.csv")
    (line,) = ratios(tmp_path)
    assert f"auto {ours.cost:.2f} (graph 1.12, host 214 us)" in line
    assert line in summary([], "", 0.0, tmp_path)
    (tmp_path / "headline" / "linear.csv").write_text("gar,bage\n1,2\n", encoding="utf-8")
    assert summary([], "", 0.0, tmp_path)  # half-written rows are no reason to lose the rest


def test_failed_tests_are_found_in_a_run_that_was_stopped(tmp_path):
    log = tmp_path / "log"
    log.write_text(f"[gw0] PASSED tests/gpu/x.py::a\n[gw1] [  3%] FAILED tests/gpu/x.py::b[(1, 2)-p] \n{RED}\n{RED}\n")
    found = failed_tests([first_run.Outcome("tests", "stopped after 9 s", 9.0, log)])
    assert found == ["tests/gpu/x.py::b[(1, 2)-p]", TEST]


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first_run.main([]) == first_run.NO_GPU
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_interrupt_ends_the_part_that_runs_and_brings_home_what_it_had(out, monkeypatch):
    monkeypatch.setattr(
        first_run, "parts", lambda *_, **__: [part("a sleeper", f"import os; print(os.getpid()); {SLEEPER}", 60.0)]
    )
    log = out.parent / "out-work" / "1-00-a-sleeper.log"

    def terminate():
        while not (log.exists() and "begun" in log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as make and timeout do

    thread = threading.Thread(target=terminate, daemon=True)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        first_run.main(["--device", "cpu", "--out", str(out)])
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split()[0]), 0)
    assert "running: a sleeper" in (out / "summary.txt").read_text()


def test_a_child_of_a_stopped_part_does_not_hold_it_up(out, monkeypatch):
    # An inductor's workers have the same output.
    script = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    monkeypatch.setattr(first_run, "parts", lambda *_, **__: [part("two", script, 1.0)])
    start = time.perf_counter()
    assert run("1", "cpu", out, "") == 1
    assert time.perf_counter() - start < 30


# -- compiled ahead ----------------------------------------------------------------------------------------------------


def test_a_canary_that_differs_is_said_with_its_part(tmp_path):
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    assert "nothing compiled ahead" in compiled_ahead.unpack(tmp_path)
    with tarfile.open(tmp_path / compiled_ahead.KERNELS, "w:xz"):
        pass
    told = compiled_ahead.canary() | {"ptxas": "11.0"}
    (tmp_path / compiled_ahead.CANARY).write_text(json.dumps(told), encoding="utf-8")
    line = compiled_ahead.unpack(tmp_path)
    assert "CANARY DIFFERS" in line
    assert "ptxas is" in line
    assert "was '11.0'" in line
    assert "Python" not in line


def test_what_is_packed_comes_out_at_the_same_path(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    cache = tmp_path / "cache"
    monkeypatch.setattr(compiled_ahead, "CACHE", cache)
    (cache / "KEY").mkdir(parents=True)
    for name in ("k.cubin", "k.json", "launcher.so", "k.ptx"):
        (cache / "KEY" / name).write_text(name, encoding="utf-8")
    compiled_ahead.pack(tmp_path / "packed")
    for path in sorted(cache.glob("*/*")):
        path.unlink()
    assert compiled_ahead.unpack(tmp_path / "packed") == "1 kernels compiled ahead"
    assert sorted(p.name for p in cache.glob("*/*")) == ["k.cubin", "k.json", "launcher.so"]
