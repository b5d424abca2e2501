"""`shard_dropout`: the masks of data-parallel ranks are the rows of one process's, whoever holds how many of them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import ArgumentError, LoRALinear
from lora_kernels.distributed import shard_dropout
from tests.distributed.test_fsdp import shard
from tests.distributed.training import assert_within_budget, new_model, together, train
from tests.equality import assert_same_numbers, differ

SEED = 11
K, N, P = 24, 16, 0.5


def new_layer() -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(K, N, r=4, lora_dropout=P, init_lora_weights=False).double()


def x_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, 2, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("rows", [(3, 3), (1, 4), (5, 0), (0, 2), (2, 1, 0, 3)], ids=str)
def test_masks_are_the_rows_of_one_processes(pool, rows):
    torch.manual_seed(SEED)
    layer = new_layer()
    torch.manual_seed(SEED)
    expected = [layer(x_of(sum(rows))).detach() for _ in range(2)]
    assert not torch.allclose(*expected)  # each call has a mask of its own
    found = pool.run(run_rows, rows, processes=len(rows))
    for call, whole in enumerate(expected):
        torch.testing.assert_close(torch.cat([ys[call] for ys in found]), whole)


def run_rows(rank, world_size, rows):
    layer = new_layer()
    shard_dropout(layer)
    torch.manual_seed(SEED)
    x = x_of(sum(rows)).split(rows)[rank]
    return [layer(x).detach() for _ in range(2)]


@pytest.mark.parametrize("checkpoints", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_trains_with_the_masks_of_one_process(pool, how, checkpoints):
    results = pool.run(run_training, how, checkpoints, processes=2)
    assert_within_budget(together(results), new_model(dropout=0.25), seed=SEED)


def run_training(rank, world_size, how, checkpoints):
    model = new_model(dropout=0.25)
    model.checkpoints = checkpoints
    shard_dropout(model)
    if how == "FSDP2":
        return train(shard(model, checkpoints=checkpoints), rank, world_size, whole=DTensor.full_tensor, seed=SEED)
    wrapped = DistributedDataParallel(model, static_graph=checkpoints == "reentrant")
    return train(model, rank, world_size, run=wrapped, seed=SEED)


def test_without_it_ranks_repeat_each_others_masks_and_with_it_they_must_agree(pool):
    for alike, told in pool.run(run_seeds, processes=2):
        assert alike
        assert told == (
            "dropout_seed must be the same on every rank that shares a mask; the ranks of this group drew different "
            "ones. Call torch.manual_seed with the same seed on all of them before training, and draw random numbers "
            "alike on all of them afterwards."
        )


def run_seeds(rank, world_size):
    layer, x = new_layer(), x_of(4)
    torch.manual_seed(SEED)
    y = layer(x).detach()
    everyones = [torch.empty_like(y) for _ in range(world_size)]
    torch.distributed.all_gather(everyones, y)
    shard_dropout(layer)
    torch.manual_seed(SEED)
    layer(x)
    torch.manual_seed(rank)
    layer.eval()(x)  # where nothing is drawn, nothing is compared
    with pytest.raises(ArgumentError) as info:
        layer.train()(x)
    return not any(differ(y, other) for other in everyones), str(info.value)


def test_a_compiled_layer_says_the_same(pool):
    for told in pool.run(run_compiled, processes=2):
        assert told.startswith("dropout_seed must be the same on every rank that shares a mask")


def run_compiled(rank, world_size):
    layer, x = new_layer(), x_of(4)
    shard_dropout(layer)
    torch.manual_seed(SEED)
    expected = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.manual_seed(SEED)
        assert_same_numbers(compiled(x), expected)
        torch.manual_seed(rank)
        with pytest.raises(RuntimeError) as info:
            compiled(x)
    return str(info.value)


def test_a_layer_is_copied_and_pickled_with_its_place(pool):
    assert pool.run(run_copies, processes=2) == [None, None]


def run_copies(rank, world_size):
    layer, x = new_layer(), x_of(4)
    shard_dropout(layer, init_device_mesh("cpu", (world_size,)))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    torch.manual_seed(SEED)
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        torch.manual_seed(SEED)
        assert_same_numbers(copied(x), expected)


def test_what_it_is_not_for(pool):
    assert pool.run(run_refusals, processes=4)[0] == [
        "model must have LoRALinear layers; got Linear without any. Call add_lora first; the layers of a patched PEFT "
        "model draw their own seeds.",
        "mesh must have one dimension; got 2. Name the one of the batch: mesh['dp'].",
    ]


def run_refusals(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    told = []
    for model, given in ((torch.nn.Linear(2, 2), mesh["dp"]), (new_layer(), mesh)):
        with pytest.raises(ArgumentError) as info:
            shard_dropout(model, given)
        told.append(str(info.value))
    return told
