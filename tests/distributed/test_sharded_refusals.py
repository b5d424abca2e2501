"""Where a sharded parameter, or a gathered copy, would be taken for a whole one that lasts: refused, with a remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from lora_kernels import (
    LoRALinear,
    UnsupportedError,
    add_lora,
    delete_adapter,
    load_lora,
    merge_lora,
    save_lora,
    set_adapter,
    unload_lora,
    unmerge_lora,
)
from lora_kernels.distributed import LoRAColwiseParallel
from tests.adapter_models import state_of
from tests.distributed.test_fsdp import shard
from tests.distributed.training import TARGETS, batch, new_model
from tests.equality import assert_same_numbers

NAME = r"'blocks\.0\.q_proj'"
LAYER = r"LoRALinear\(in_features=32, .*\)"
ADDED = "FSDP would put its own back in their place; got {}, which is sharded. Add every adapter"
MERGED = "FSDP would put its own back in their place; got {}, which is sharded. Save the adapter with save_lora"

# What is called with a sharded model and a directory with an adapter, and what is said.
CALLS = {
    "merge_lora": (lambda model, _: merge_lora(model), f"^merge_lora .*{MERGED.format(NAME)}"),
    "merge_lora of a part": (lambda model, _: merge_lora(model.last), f"^merge_lora .*{MERGED.format(LAYER)}"),
    "merge": (lambda model, _: model.last.merge(), f"^merge .*{MERGED.format(LAYER)}"),
    "unload_lora": (lambda model, _: unload_lora(model), f"^unload_lora .*{MERGED.format(NAME)}"),
    "add_lora": (
        lambda model, _: add_lora(model, target_modules=TARGETS, adapter_name="b"),
        f"^A new adapter .*{ADDED.format('.*')}",
    ),
    "add_adapter": (lambda model, _: model.last.add_adapter("b"), f"^add_adapter .*{ADDED.format(LAYER)}"),
    "delete_adapter": (lambda model, _: delete_adapter(model, "default"), f"^delete_adapter .*{ADDED.format(NAME)}"),
    "load_lora of a new adapter": (
        lambda model, directory: load_lora(model, directory, adapter_name="b"),
        f"^A new adapter .*{ADDED.format('.*')}",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_fsdp_would_undo_is_refused(pool, tmp_path, call):
    save_lora(new_model(), tmp_path)
    for told in pool.run(run_call, call, str(tmp_path), processes=2):
        assert len(told) == 2
        for one in told:
            assert re.search(CALLS[call][1], one), one


def run_call(rank, world_size, call, directory):
    """What is said while parameters are sharded, and while the root's are gathered."""
    model = new_model()
    model.last = LoRALinear(32, 32, r=4)
    shard(model)
    told = []
    for _ in range(2):
        before = state_of(model)
        with pytest.raises(UnsupportedError) as caught:
            CALLS[call][0](model, directory)
        told.append(str(caught.value))
        assert state_of(model) == before
        with torch.no_grad():
            model(batch()[0])
    return told


def test_a_model_that_was_merged_before_stays_as_it_is(pool):
    for told in pool.run(run_merged, processes=2):
        assert [re.match(r"^[a-z_]+( [a-z ]+)? needs", one) is not None for one in told] == [True] * 4, told


def run_merged(rank, world_size):
    model = new_model(adapter_names=("a", "b"))
    merge_lora(model)
    expected = model(batch()[0])
    shard(model)
    told = []
    for call in (
        lambda: unmerge_lora(model),
        lambda: set_adapter(model, "a"),
        model.blocks[0].up.unmerge,
        lambda: unload_lora(model),
    ):
        with pytest.raises(UnsupportedError) as caught:
            call()
        told.append(str(caught.value))
        assert_same_numbers(model(batch()[0]), expected)
    return told


@pytest.mark.parametrize(("processes", "kind"), [(2, "LoRALinear"), (4, "ColwiseLoRALinear")])
def test_a_gathered_copy_is_not_switched_loaded_or_saved_by_itself(pool, tmp_path, processes, kind):
    save_lora(nn.Sequential(LoRALinear(32, 32, r=4)), tmp_path)
    for told in pool.run(run_gathered, str(tmp_path), processes=processes):
        assert [one.partition(",")[0] for one in told] == [
            f"{call} needs the parameters that FSDP keeps; got {kind}(in_features=32"
            for call in ("set_adapter", "save_lora", "load_lora")
        ]


def run_gathered(rank, world_size, directory):
    """On four ranks, FSDP over tensor parallel, where gathered copies are DTensors, too."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    model = new_model()
    model.part = nn.Sequential(LoRALinear(32, 32, r=4))
    if world_size == 4:
        parallelize_module(model.part, mesh["tp"], {"0": LoRAColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    set_adapter(model.part, None)  # what FSDP keeps is switched
    set_adapter(model.part, "default")
    with torch.no_grad():
        model(batch()[0])
    told = []
    for call in (
        lambda: set_adapter(model.part, None),
        lambda: save_lora(model.part, f"{directory}/not made"),
        lambda: load_lora(model.part, directory),
    ):
        with pytest.raises(UnsupportedError) as caught:
            call()
        told.append(str(caught.value))
    assert not Path(directory, "not made").exists()
    assert model.part[0].active_adapter == "default"
    return told


def test_the_older_fsdp_is_refused(pool, tmp_path):
    for told in pool.run(run_older_fsdp, str(tmp_path / "not made"), processes=2):
        assert "(Models in FullyShardedDataParallel are not supported: use fully_shard.)" in told
    assert not (tmp_path / "not made").exists()


def run_older_fsdp(rank, world_size, directory):
    wrapped = FullyShardedDataParallel(new_model(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedError) as caught:
        save_lora(wrapped, directory)
    return str(caught.value)


def test_a_shard_that_reaches_the_operation_is_refused_by_name(pool):
    rule = "must be a whole tensor; got a DTensor"
    for called_alone, adapter_unit in pool.run(run_shards, processes=2):
        assert re.search(rf"^\w+ of LoRALinear .*{rule} of \[96, 32\]", called_alone), called_alone
        assert adapter_unit.startswith(f"lora_A of LoRALinear 'blocks.0.q_proj' {rule}"), adapter_unit


def run_shards(rank, world_size):
    x, tokens = torch.randn(2, 32), batch()[0]
    told = []
    model = shard(new_model())
    named = new_model(adapter_names=("a",))
    fully_shard(named.blocks[0].q_proj.adapter_a)
    for call in (lambda: model.blocks[0].up(x), lambda: shard(named)(tokens)):
        with pytest.raises(UnsupportedError) as caught:
            call()
        told.append(str(caught.value))
    return told
