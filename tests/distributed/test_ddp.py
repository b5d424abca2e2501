"""LoRA layers in DistributedDataParallel: the ranks' training is that of one process with the whole batch."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.training import (
    Transformer,
    assert_within_budget,
    batch,
    losses,
    new_model,
    together,
    train,
    trainable,
)
from tests.equality import assert_same_numbers

CASES = {
    "fp32": {},
    "bf16 autocast": {"autocast": True},
    "accumulation": {"pieces": 2},
    "static graph, checkpointed": {"checkpoints": "not reentrant", "static_graph": True},
    "static graph, checkpointed and reentrant": {"checkpoints": "reentrant", "static_graph": True},
}


def train_wrapped(rank, world_size, model, static_graph=False, checkpoints=None, **options):
    model.checkpoints = checkpoints
    wrapped = DistributedDataParallel(model, static_graph=static_graph)
    if options.get("pieces", 1) > 1:
        options["synchronise"] = lambda last: nullcontext() if last else wrapped.no_sync()
    return train(model, rank, world_size, run=wrapped, **options)


@pytest.mark.parametrize("case", CASES)
def test_trains_as_one_process_does(pool, case):
    options = CASES[case]
    results = pool.run(run_case, options, processes=2)
    assert_within_budget(together(results), new_model(), autocast=options.get("autocast", False))


def run_case(rank, world_size, options):
    return train_wrapped(rank, world_size, new_model(), **options)


@pytest.mark.parametrize("checkpoints", ["reentrant", "not reentrant"])
def test_a_recomputed_mask_is_the_same_mask(pool, checkpoints):
    for kept, recomputed in pool.run(run_dropout, checkpoints, processes=2):
        assert_same_numbers(recomputed, kept)


def run_dropout(rank, world_size, checkpoints):
    results = []
    for how in (None, checkpoints):
        model = new_model(dropout=0.25)
        torch.manual_seed(rank)
        results.append(train_wrapped(rank, world_size, model, static_graph=True, checkpoints=how))
    return results


def test_only_the_active_adapter_is_synchronised_and_trained(pool):
    for sent, expected, changed in pool.run(run_several, processes=2):
        assert sent == expected
        assert changed == {f"adapter_b.{part}" for part in ("lora_A", "lora_B")}


def run_several(rank, world_size):
    model = new_model(adapter_names=("a", "b"))
    before = copy.deepcopy(model.state_dict())
    wrapped = DistributedDataParallel(model)
    sent = []

    def hook(_, bucket):
        sent.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    train(model, rank, world_size, run=wrapped, steps=1)
    expected = sum(p.nbytes for name, p in model.named_parameters() if ".adapter_b." in name)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    return sum(sent), expected, {".".join(key.split(".")[-2:]) for key in changed}


class Branching(nn.Module):
    """A model that calls its second block on the first rank only."""

    def __init__(self, model: Transformer, rank: int) -> None:
        super().__init__()
        self.model, self.rank = model, rank

    def forward(self, tokens):
        x = self.model.blocks[0](self.model.embed(tokens))
        if self.rank == 0:
            x = self.model.blocks[1](x)
        return self.model.head(self.model.norm(x))


def test_a_layer_that_only_one_rank_calls(pool):
    on_ranks = pool.run(run_branching, processes=2)
    single = [gradients_of(Branching(new_model(), rank), *batch(rank, 2)) for rank in range(2)]
    for name, first in single[0].items():
        second = single[1][name]
        mean = first / 2 if second is None else (first + second) / 2
        for gradients in on_ranks:
            assert_same_numbers(gradients[name], mean, name)


def gradients_of(model, tokens, targets, run=None):
    losses(run or model, tokens, targets).mean().backward()
    return {name: p.grad for name, p in trainable(model).items()}


def run_branching(rank, world_size):
    model = Branching(new_model(), rank)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    return gradients_of(model, *batch(rank, world_size), wrapped)
