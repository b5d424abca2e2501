"""Mechanisms of the launches that a bisection on a GPU switches off: each is off, and the others are not."""

import pytest

from bench import switches
from lora_kernels.planning import branch, plan
from tests.unit.test_planning import problem


@pytest.fixture
def planned(monkeypatch):
    """The plan of a large problem under a switch, which is put back."""
    asked = problem(m=8192, n=4096, k=4096, gluon=True)
    before = plan.kernel_choices(asked)
    for module in (plan, branch):
        monkeypatch.setattr(module, "kernel_choices", module.kernel_choices)

    def under(switch):
        switches.apply(switch)
        assert branch.kernel_choices is plan.kernel_choices
        return before, plan.kernel_choices(asked)

    return under


@pytest.mark.parametrize(
    ("switch", "off"),
    [
        ("dependent launch", {"use_pdl"}),
        ("descriptors", {"use_pdl", "use_tma"}),
        ("second stream", {"beside"}),
        ("pipelining", {"tiles"}),
    ],
)
def test_a_switch_changes_what_it_names(planned, switch, off):
    before, after = planned(switch)
    changed = {name for name in vars(before) if getattr(before, name) != getattr(after, name)}
    assert changed == off
    if switch == "pipelining":
        for kernel, tile in after.tiles:
            assert (tile.num_stages == 1) == ("persistent" not in kernel)
    else:
        assert not any(getattr(after, name) for name in off)


def test_launches_are_as_written_without_repeated_ones(monkeypatch):
    replay = pytest.importorskip("lora_kernels.kernels.replay", reason="Triton exists for Linux only")
    monkeypatch.setattr(replay, "is_profiled", replay.is_profiled)
    switches.apply("repeated launches")
    assert replay.is_profiled()  # under which nothing is repeated


def test_an_unknown_switch_is_refused():
    with pytest.raises(ValueError, match=r"LORA_KERNELS_WITHOUT must be one of dependent launch, .*; got 'pdl'"):
        switches.apply("pdl")
