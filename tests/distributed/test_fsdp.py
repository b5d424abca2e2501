"""LoRA layers under FSDP2 (`fully_shard`): the ranks' training is that of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.func import functional_call

from lora_kernels import LoRALinear, set_adapter
from lora_kernels.distributed import LoRAColwiseParallel, LoRARowwiseParallel
from tests.distributed.training import (
    Transformer,
    adapt,
    assert_within_budget,
    batch,
    new_model,
    together,
    train,
    trainable,
)
from tests.equality import assert_same_numbers

BF16_POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
MIXED = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32}

# (new_model's options, shard's, train's)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "fp32": ({}, {}, {}),
    "bf16 base, fp32 adapters": (MIXED, {}, {}),
    "bf16 policy": ({}, {"mp_policy": BF16_POLICY}, {}),
    "bf16 autocast": ({}, {}, {"autocast": True}),
    "resharded after forward": ({}, {"reshard_after_forward": True}, {}),
    "kept after forward": ({}, {"reshard_after_forward": False}, {}),
    "a unit for each layer": ({}, {"units": LoRALinear}, {}),
    "checkpointed": ({}, {"checkpoints": "not reentrant"}, {}),
    "accumulation": ({}, {}, {"pieces": 2}),
    "clipped": ({}, {}, {"max_norm": 0.05}),
    "4 ranks, 2 of which share a shard": ({}, {"mesh": (2, 2)}, {}),
}


TENSOR_PARALLEL = {"up": LoRAColwiseParallel(), "down": LoRARowwiseParallel()}


def shard(
    model: nn.Module,
    units: type[nn.Module] | None = None,
    checkpoints: str | None = None,
    mesh: tuple[int, int] | None = None,
    tensor_parallel: bool = False,
    **options: Any,
) -> nn.Module:
    """Each block a unit, or each module of a type, and the rest one more.

    The first dimension of a mesh replicates what the second shards; or shards what the second does in tensor parallel.
    """
    if mesh is not None:
        options["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("first", "second"))
    if tensor_parallel:
        for block in model.blocks:
            parallelize_module(block, options["mesh"]["second"], TENSOR_PARALLEL)
        options["mesh"] = options["mesh"]["first"]
    model.checkpoints = checkpoints
    for module in list(model.modules()):
        if isinstance(module, units) if units else type(module).__name__ == "Block":
            fully_shard(module, **options)
    return fully_shard(model, **options)


def train_sharded(model, rank, world_size, **options):
    if options.get("pieces", 1) > 1:
        options["synchronise"] = model.set_requires_gradient_sync
    return train(model, rank, world_size, whole=DTensor.full_tensor, **options)


class InBFloat16(nn.Module):
    """What a MixedPrecisionPolicy says, in one process: parameters rounded for each step, gradients kept in fp32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens):
        wide = self.model.head.weight.dtype == torch.float64
        rounded = {name: p if wide else p.bfloat16() for name, p in self.model.named_parameters()}
        return functional_call(self.model, rounded, (tokens,))


@pytest.mark.parametrize("case", CASES)
def test_trains_as_one_process_does(pool, case):
    of_model, of_shard, of_train = CASES[case]
    results = pool.run(run_case, case, processes=4 if "mesh" in of_shard else 2)
    model = new_model(**of_model)
    of_train = {name: value for name, value in of_train.items() if name != "pieces"}
    assert_within_budget(together(results), InBFloat16(model) if "mp_policy" in of_shard else model, **of_train)


def run_case(rank, world_size, case):
    of_model, of_shard, of_train = CASES[case]
    model = shard(new_model(**of_model), **of_shard)
    return train_sharded(model, rank, world_size, **of_train)


def test_a_recomputed_mask_is_the_same_mask(pool):
    for kept, recomputed in pool.run(run_dropout, processes=2):
        assert_same_numbers(recomputed, kept)


def run_dropout(rank, world_size):
    results = []
    for checkpoints in (None, "not reentrant"):
        model = shard(new_model(dropout=0.25), checkpoints=checkpoints)
        torch.manual_seed(rank)
        results.append(train_sharded(model, rank, world_size))
    return results


def test_one_dtype_of_trained_parameters_in_a_unit(pool):
    """What FSDP says of two, which is why trained biases and norms get the adapters' dtype, or a unit of their own."""
    for told in pool.run(run_two_dtypes, processes=2):
        assert told == "FSDP expects uniform original parameter dtype but got"


def run_two_dtypes(rank, world_size):
    model = new_model(**MIXED)
    model.blocks[0].norm1.weight.requires_grad_()
    shard(model)
    with pytest.raises(AssertionError) as caught:
        model(batch(rank, world_size)[0])
    return str(caught.value).partition(" {")[0]


def test_an_adapter_is_switched_after_sharding(pool):
    results = pool.run(run_switched, processes=2)
    for name in ("a", "b"):
        model = new_model(adapter_names=("a", "b"))
        set_adapter(model, name)
        assert_within_budget(together([result[name] for result in results]), model)


def run_switched(rank, world_size):
    model = shard(new_model(adapter_names=("a", "b")), reshard_after_forward=False)
    results = {}
    for name in ("a", "b"):
        with torch.no_grad():
            model(batch()[0])  # after which the units show gathered copies, where a change would be lost
        assert not isinstance(model.blocks[0].up.weight, DTensor)
        set_adapter(model, name)
        assert all(f".adapter_{name}." in key for key in trainable(model))
        results[name] = train_sharded(model, rank, world_size)
    return results


def test_a_model_is_made_without_data_and_initialised_sharded(pool):
    expected = made_without_data()
    expected.to_empty(device="cpu")
    torch.manual_seed(5)
    initialise(expected)
    for state in pool.run(run_initialised, processes=2):
        assert all(torch.equal(state[name], p) for name, p in trainable(expected).items())


def made_without_data() -> Transformer:
    with torch.device("meta"):
        model = Transformer()
    adapt(model)
    return model


def initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.reset_lora_parameters()


def run_initialised(rank, world_size):
    model = shard(made_without_data())
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    initialise(model)
    return {name: p.full_tensor() for name, p in trainable(model).items()}
