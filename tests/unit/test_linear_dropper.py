"""The `torch` backend's dropout, held to the specification's masks bit for bit."""

import pytest
import torch

from lora_kernels.ops._dropout import COUNTERS_AT_A_TIME, Dropper
from lora_kernels.reference.philox import keep_mask

SEEDS = [0, 5, -1, 2**63 - 1, -(2**63), 123456789123]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("rows", "columns", "first_row"),
    [
        (1, 1, 0),
        (37, 45, 5),
        (300, 2048, 0),
        (2, 8 * COUNTERS_AT_A_TIME + 24, 7),
        (65, 8, 2**31 - 20),
        (9, 15, 2**32 - 9),
    ],
)
def test_zeroes_what_the_specification_drops(seed, rows, columns, first_row):
    expected = keep_mask(torch.tensor([seed]), rows, columns, 0.3, first_row=first_row)
    blocks = [torch.ones(rows, columns), torch.ones(rows, columns)]
    outs = [torch.empty(rows, columns), blocks[1]]
    drop = Dropper(torch.tensor([seed]), 0.3, rows=rows, columns=columns, dtype=torch.float32)
    drop(list(zip(blocks, outs, strict=True)), first_row=first_row)
    for out in outs:
        assert torch.equal(out, expected.float())


def test_in_fp64_and_where_elements_are_not_finite():
    block = torch.full((64, 40), float("inf"), dtype=torch.float64)
    drop = Dropper(torch.tensor([3]), 0.5, rows=24, columns=40, dtype=torch.float64)
    for rows in (slice(0, 24), slice(24, 48), slice(48, 64)):
        drop([(block[rows], block[rows])], first_row=rows.start)
    keep = keep_mask(torch.tensor([3]), 64, 40, 0.5)
    assert torch.equal(block, torch.where(keep, float("inf"), 0.0).double())
