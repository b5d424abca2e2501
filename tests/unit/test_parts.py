"""`python -m tests.parts`: every part runs, each ends in a line, and the worst decides."""

import sys

import pytest

from tests import parts
from tests.parts import CPUS, PARTS, Part

ENDINGS = {
    "good": ("print('=' * 9, '7 passed in 0.10s', '=' * 9)", 0),
    "red": ("print('=' * 9, '1 failed, 6 passed in 3.20s (0:00:03)', '=' * 9); raise SystemExit(1)", 1),
    "brief": ("print('8 passed, 2 deselected in 306.88s (0:05:06)'); print('a word at exit')", 0),
    "gone": ("import os; os.abort()", -6),
    "late": ("from os import environ as e; print('got', e['MARK'], e.get('TRITON_INTERPRET')); raise SystemExit(2)", 2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PARTS", {name: Part((name,), {"MARK": name}) for name in ENDINGS})
    monkeypatch.setattr(parts, "CPUS", {})
    monkeypatch.setattr(parts, "command", lambda part, *_: [sys.executable, "-c", ENDINGS[part.arguments[0]][0]])
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_a_red_part_hides_none_behind_it_and_the_exit_status_is_the_worst(capfdbinary):
    assert parts.main([]) == 6
    out = capfdbinary.readouterr().out.decode()
    rows = out[out.rindex("====") + 4 :].strip().splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["good", "green"], ["red", "RED"], ["brief", "green"], ["gone", "RED"], ["late", "RED"],
    ]  # fmt: skip
    assert [row.split(maxsplit=3)[3] for row in rows] == [
        "7 passed", "1 failed, 6 passed", "8 passed, 2 deselected", "ended with status -6 and no closing line",
        "ended with status 2 and no closing line",
    ]  # fmt: skip
    assert "got late None" in out  # its own environment, and none that Triton would read


def test_one_part_alone_has_pytests_own_end(capfdbinary):
    assert parts.main(["good"]) == 0
    assert capfdbinary.readouterr().out.decode().strip().splitlines()[-1] == "========= 7 passed in 0.10s ========="


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        parts.main(["good", "bad"])
    assert "parts must be of good, red, brief, gone, late; got bad" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*PARTS, *CPUS])
def test_parts_name_what_is_there(name):
    part = {**PARTS, **CPUS}[name]
    paths = [argument for argument in part.arguments if argument.startswith("tests/")]
    assert paths
    assert all((parts.ROOT / path.partition("::")[0]).exists() for path in paths)


def test_workers_share_what_may_be_shared(monkeypatch):
    monkeypatch.undo()
    assert parts.command(PARTS["unit"], 2, ["-x"])[3:7] == ["-n", "2", "--dist", "worksteal"]
    assert "-n" not in parts.command(PARTS["distributed"], 2, [])
    assert "-n" not in parts.command(PARTS["unit"], 1, [])
    assert parts.command(PARTS["unit"], 2, ["-x"])[-1] == "-x"
