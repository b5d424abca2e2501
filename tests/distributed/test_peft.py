"""PEFT models after `patch_peft`, in DistributedDataParallel and under FSDP2: trained as PEFT's are in one process."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import patch_peft
from lora_kernels.interop import _peft_layers
from tests.distributed.training import STEPS, TARGETS, Block, Transformer, assert_within_budget, together, train

CALLS = 6 * 2 * STEPS  # layers, blocks


def new_peft_model() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Transformer(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))


def train_counting(model, rank, world_size, **options):
    """The results, and how many calls of layers were fused, whatever their size."""
    with (
        mock.patch.object(_peft_layers, "is_small", return_value=False),
        mock.patch.object(_peft_layers, "lora_linear", wraps=_peft_layers.lora_linear) as fused,
    ):
        return train(model, rank, world_size, **options), fused.call_count


@pytest.mark.parametrize("autocast", [False, True])
def test_in_ddp(pool, autocast):
    results = pool.run(run_in_ddp, autocast, processes=2)
    assert [fused for _, fused in results] == [CALLS] * 2
    assert_within_budget(together([result for result, _ in results]), new_peft_model(), autocast=autocast)


def run_in_ddp(rank, world_size, autocast):
    model = new_peft_model()
    patch_peft(model)
    return train_counting(model, rank, world_size, run=DistributedDataParallel(model), autocast=autocast)


@pytest.mark.parametrize(
    ("units", "patched_first", "fused"),
    [
        (Block, True, CALLS),
        (Block, False, CALLS),
        (lora.Linear, True, CALLS),
        (lora.Linear, False, 0),  # fully_shard has made it a class of its own, which patch_peft does not know
        (nn.Linear, True, 0),  # the layer would read the weights of A and B while they are sharded; PEFT calls them
    ],
)
def test_under_fsdp(pool, units, patched_first, fused):
    results = pool.run(run_under_fsdp, units, patched_first, processes=2)
    assert [count for _, count, _ in results] == [fused] * 2
    assert_within_budget(together([result for result, _, _ in results]), new_peft_model())
    assert [told for _, _, told in results] == [None] * 2


def run_under_fsdp(rank, world_size, units, patched_first):
    model = new_peft_model()
    if patched_first:
        report = patch_peft(model)
    for module in list(model.modules()):
        if isinstance(module, units):
            fully_shard(module)
    fully_shard(model)
    if not patched_first:
        report = patch_peft(model)
    again = patch_peft(model)
    return *train_counting(model, rank, world_size, whole=DTensor.full_tensor), (
        str(report).splitlines()[1::20],
        str(again).splitlines()[1::20],
    )
