"""Every combination of a training stack, on a two-layer transformer: one process with plain PyTorch is what all equal.

{compiled} x {checkpointed} x {dropout} x {autocast} x {one process, DDP, FSDP2}: losses and adapter gradients of several
steps, with at most twice the error that the plain reference makes against fp64. The masks are those of one process with
the whole batch (`shard_dropout`), so that dropout is no excuse. `--write-table` writes the table in docs/training-stacks.md.
"""

from __future__ import annotations

import copy
import itertools
import os
import platform
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch._inductor.config
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lora_kernels.distributed import shard_dropout
from lora_kernels.testing import budget_rows
from tests.distributed.test_fsdp import shard
from tests.distributed.training import Results, Transformer, new_model, together, train, with_backend

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "training-stacks.md"
SEED = 11
HOW = {"one process": 1, "DDP": 2, "FSDP2": 2}


class Stack(NamedTuple):
    """What surrounds the layers."""

    compiled: bool
    checkpointed: bool
    dropout: float
    autocast: bool

    @property
    def label(self) -> tuple[str, ...]:
        return (
            "yes" if self.compiled else "",
            "yes" if self.checkpointed else "",
            str(self.dropout),
            "bf16" if self.autocast else "",
        )


STACKS = [Stack(*values) for values in itertools.product((False, True), (False, True), (0.0, 0.1), (False, True))]


def run(rank: int, world_size: int, how: str, stack: Stack) -> Results:
    model: Transformer = new_model(dropout=stack.dropout)
    model.checkpoints = "not reentrant" if stack.checkpointed else None
    if stack.compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=True)  # one compilation for the whole batch and for a part
    called, options = model, {}
    if how == "DDP":
        called = DistributedDataParallel(model)
    elif how == "FSDP2":
        shard(model, checkpoints=model.checkpoints)
        options["whole"] = DTensor.full_tensor
    shard_dropout(model)
    torch._dynamo.reset()
    # Inductor draws random numbers of its own unless told to draw PyTorch's: other masks, and nothing to compare with.
    with warnings.catch_warnings(), torch._inductor.config.patch(fallback_random=True):
        if stack.compiled:
            warnings.simplefilter("ignore")  # the compiler's own deprecations
        return train(model, rank, world_size, run=called, autocast=stack.autocast, seed=SEED, **options)


@lru_cache
def references(dropout: float, autocast: bool) -> tuple[Results, Results]:
    """(plain PyTorch's, in the same dtypes; the truth, in fp64)."""
    model = with_backend(new_model(dropout=dropout), "reference")
    exact = train(copy.deepcopy(model).double(), seed=SEED)
    return train(model, autocast=autocast, seed=SEED), exact


def share_of_budget(results: Results, stack: Stack) -> float:
    """The largest error, as a share of what is allowed."""
    return max(row.error / row.limit for row in budget_rows(results, *references(stack.dropout, stack.autocast)))


@pytest.fixture(scope="module")
def table() -> dict[tuple[Stack, str], float]:
    return {}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("stack", STACKS, ids=lambda s: "-".join(part or "no" for part in s.label))
def test_equals_the_plain_reference(pool, table, stack, how):
    results = together(pool.run(run, how, stack, processes=HOW[how], timeout=300))
    share = table[stack, how] = share_of_budget(results, stack)
    assert share <= 1, f"{share:.2f} of what is allowed"


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
