"""bench.anatomy: its stages compute what they say, and add up to the operation."""

import torch

from bench import anatomy
from lora_kernels.benchmarking.records import read_csv, write_csv
from tests.equality import assert_same_numbers


def test_the_last_two_stages_compute_the_same_and_the_first_what_is_frozen(monkeypatch) -> None:
    monkeypatch.setattr(anatomy, "M", 24)
    frozen, expands, shrinks, gradients, operation = (stage() for stage in anatomy.stages(40).values())
    assert len(frozen) == len(expands) == len(shrinks) == 2
    for ours, whole in zip(gradients[1:], operation, strict=True):
        torch.testing.assert_close(ours, whole)
    for partial, whole in zip(shrinks, gradients, strict=False):
        assert_same_numbers(partial, whole)
    assert not torch.allclose(frozen[0], gradients[0])


def test_rows(tmp_path) -> None:
    rows = anatomy.measure(32, budget_s=0.01)
    assert [row.stage for row in rows] == list(anatomy.stages(32))
    assert rows[0].over_frozen == 1
    write_csv(rows, tmp_path / "anatomy.csv")
    assert read_csv(tmp_path / "anatomy.csv", anatomy.StageRow) == rows
