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


def is_adapter_linear(name: str, module: nn.Module) -> bool:
    return type(module) is nn.Linear and ".lora_" in name


def is_layer(_: str, module: nn.Module) -> bool:
    return isinstance(module, lora.Linear)


def is_block(_: str, module: nn.Module) -> bool:
    return isinstance(module, Block)


@pytest.mark.parametrize(
    ("is_unit", "patched_first", "reason"),
    [
        (is_block, True, ""),
        (is_block, False, ""),
        (is_layer, True, ""),
        (is_layer, False, "lora.FSDPLinear is not a layer that can be fused"),
        (is_adapter_linear, True, "lora_A is a FSDPLinear"),  # PEFT calls it, and so has it gathered; we would read it
    ],
)
def test_under_fsdp(pool, is_unit, patched_first, reason):
    results = pool.run(run_under_fsdp, is_unit, patched_first, processes=2)
    assert [count for _, count, _ in results] == [0 if reason else CALLS] * 2
    assert [reasons for *_, reasons in results] == [{reason}] * 2
    assert_within_budget(together([result for result, *_ in results]), new_peft_model())


def run_under_fsdp(rank, world_size, is_unit, patched_first):
    model = new_peft_model()
    if patched_first:
        patch_peft(model)
    for name, module in list(model.named_modules()):
        if is_unit(name, module):
            fully_shard(module)
    fully_shard(model)
    reasons = {row.reason for row in patch_peft(model).rows}
    return *train_counting(model, rank, world_size, whole=DTensor.full_tensor), reasons
