"""Combinations of a training stack, on a two-layer transformer: all equal one process with plain PyTorch.

{compiled} x {checkpointed} x {dropout} x {autocast} x {one process, DDP, FSDP2}: losses and adapter gradients of
several steps, with at most twice the error that the plain reference makes against fp64. The masks are those of one
process with the whole batch (`shard_dropout`), so that dropout is no excuse.

Every pair of settings is met by six of the 48 combinations, which are run by default; --whole-product runs them all
(`make test-matrix`), and --write-table writes what they show into docs/training-stacks.md.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lora_kernels.benchmarking.records import Environment
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


SETTINGS = ((False, True), (False, True), (0.0, 0.1), (False, True))
STACKS = [Stack(*values) for values in itertools.product(*SETTINGS)]
# Two stacks for each way, one with what the other is without. So each way meets each setting; and any two settings
# agree in the two stacks of one way and differ in those of another, hence meet in all four combinations.
PAIRS = [
    (Stack(compiled=True, checkpointed=True, dropout=0.1, autocast=True), "one process"),
    (Stack(compiled=False, checkpointed=False, dropout=0.0, autocast=False), "one process"),
    (Stack(compiled=True, checkpointed=False, dropout=0.1, autocast=False), "DDP"),
    (Stack(compiled=False, checkpointed=True, dropout=0.0, autocast=True), "DDP"),
    (Stack(compiled=True, checkpointed=True, dropout=0.0, autocast=False), "FSDP2"),
    (Stack(compiled=False, checkpointed=False, dropout=0.1, autocast=True), "FSDP2"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "stack" in metafunc.fixturenames:
        options = metafunc.config.getoption
        whole = options("--whole-product") or options("--write-table")
        cases = list(itertools.product(STACKS, HOW)) if whole else PAIRS
        ids = ["-".join(part or "no" for part in (*stack.label, how)) for stack, how in cases]
        metafunc.parametrize(("stack", "how"), cases, ids=ids)


def compiler(how: str, stack: Stack) -> str:
    """The backend of torch.compile: most of inductor's time goes into C++, which is the same for the stacks of a dtype.

    So under DDP and FSDP2, which change what is traced and not what is generated, inductor compiles the stack with
    everything on, and the others run as they are traced.
    """
    return "inductor" if how == "one process" or all(stack) else "aot_eager"


def run(rank: int, world_size: int, how: str, stack: Stack) -> Results:
    model: Transformer = new_model(dropout=stack.dropout)
    model.checkpoints = "not reentrant" if stack.checkpointed else None
    if stack.compiled:
        for block in model.blocks:
            # One compilation for the whole batch and for a part.
            block.compile(backend=compiler(how, stack), fullgraph=True, dynamic=True)
    called, options = model, {}
    if how == "DDP":
        called = DistributedDataParallel(model)
    elif how == "FSDP2":
        shard(model, checkpoints=model.checkpoints)
        options["whole"] = DTensor.full_tensor
    shard_dropout(model)
    # Inductor draws random numbers of its own unless told to draw PyTorch's: other masks, and nothing to compare with.
    of_inductor = torch._inductor.config.patch(fallback_random=True)
    # A process keeps what it compiled for the stacks before, as a long training script does.
    of_dynamo = torch._dynamo.config.patch(recompile_limit=64)
    with warnings.catch_warnings(), of_inductor, of_dynamo:
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
def shares() -> dict[tuple[Stack, str], float]:
    """What the tests of this run have found."""
    return {}


def test_every_pair_of_settings_is_met():
    every, met = (
        {pair for values in cases for pair in itertools.combinations(enumerate(values), 2)}
        for cases in (itertools.product(*SETTINGS, HOW), [(*stack, how) for stack, how in PAIRS])
    )
    assert met == every


def test_equals_the_plain_reference(pool, shares, stack, how):
    results = together(pool.run(run, how, stack, processes=HOW[how], timeout=300))
    share = shares[stack, how] = share_of_budget(results, stack)
    assert share <= 1, f"{share:.2f} of what is allowed"


HEADER = ("torch.compile", "checkpointing", "dropout", "autocast", *HOW)
BEGIN, END = "<!-- The table is written by tests/distributed/test_matrix.py --write-table. -->\n", "<!-- End. -->\n"


def line(cells) -> str:
    return f"| {' | '.join(cells)} |\n"


def table_of(shares: dict[tuple[Stack, str], float]) -> str:
    rows = [line([*stack.label, *(f"{shares[stack, how]:.2f}" for how in HOW)]) for stack in STACKS]
    where = Environment.current(torch.device("cpu")).line
    return f"{where} · gloo\n\n{line(HEADER)}{line(['---'] * len(HEADER))}{''.join(rows)}"


def test_the_table_in_the_document_is_of_this_matrix(shares, request):
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    written, _, after = rest.partition(END)
    if request.config.getoption("--write-table"):
        written = table_of(shares)
        DOCUMENT.write_text(f"{before}{BEGIN}{written}{END}{after}", encoding="utf-8")
    header, _, *rows = [row for row in written.splitlines() if row.startswith("|")]
    assert header + "\n" == line(HEADER)
    cells = [tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in rows]
    assert [row[: len(HEADER) - len(HOW)] for row in cells] == [stack.label for stack in STACKS]
    assert all(0 < float(share) <= 1 for row in cells for share in row[-len(HOW) :])
