"""Checkpoints of sharded models: torch.distributed.checkpoint, and `save_lora` and `load_lora`."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_kernels import AdapterFileError, ArgumentError, LoRALinear, load_lora, save_lora
from lora_kernels.adapters import save as save_module
from tests.distributed.test_fsdp import BF16_POLICY, shard
from tests.distributed.test_tensor_parallel import tensor_parallel
from tests.distributed.training import batch, losses, new_model, trainable
from tests.equality import assert_same_numbers

ADAPTERS_ONLY = StateDictOptions(ignore_frozen_params=True)


def new_training(sharded: bool = True, seed: int = 0):
    """A model, and an optimiser with a state; adapters depend on the seed, the base does not."""
    model = new_model()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.1)
    if sharded:
        shard(model)
    return model, torch.optim.AdamW(trainable(model).values(), lr=0.01)


def step(model, optimiser, rank, world_size):
    found = losses(model, *batch(rank, world_size))
    found.mean().backward()
    optimiser.step()
    optimiser.zero_grad()
    return found.detach()


def state_of(model, optimiser):
    return {
        "model": get_model_state_dict(model, options=ADAPTERS_ONLY),
        "optimiser": get_optimizer_state_dict(model, optimiser, options=ADAPTERS_ONLY),
    }


def whole_adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    options = StateDictOptions(ignore_frozen_params=True, full_state_dict=True)
    return get_model_state_dict(model, options=options)


def run_saved(rank, world_size, directory):
    model, optimiser = new_training()
    for _ in range(2):
        step(model, optimiser, rank, world_size)
    dcp.save(state_of(model, optimiser), checkpoint_id=directory)
    adapters = whole_adapters(model)
    return [step(model, optimiser, rank, world_size) for _ in range(2)], adapters


def run_resumed(rank, world_size, directory):
    model, optimiser = new_training(seed=1)
    state = state_of(model, optimiser)
    dcp.load(state, checkpoint_id=directory)
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimiser, state["optimiser"], options=ADAPTERS_ONLY)
    adapters = whole_adapters(model)
    return [step(model, optimiser, rank, world_size) for _ in range(2)], adapters


def test_distributed_checkpoint_resumes_anywhere(pool, tmp_path):
    saved = pool.run(run_saved, str(tmp_path), processes=2)
    resumed = pool.run(run_resumed, str(tmp_path), processes=2)
    for before, after in zip(saved, resumed, strict=True):
        assert_same_numbers(after[0], before[0])
    _, adapters = saved[0]
    assert set(adapters) == {name for name in new_model().state_dict() if "lora_" in name}
    on_four = pool.run(run_resumed, str(tmp_path), processes=4)
    assert all(torch.equal(on_four[0][1][name], value) for name, value in adapters.items())
    model, _ = new_training(sharded=False, seed=1)
    state = {"model": get_model_state_dict(model, options=ADAPTERS_ONLY)}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(state, checkpoint_id=str(tmp_path))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in adapters.items())


def files_in(directory: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, {}),
        (2, {"mp_policy": BF16_POLICY}),
        (4, {"mesh": (2, 2)}),
        (4, {"mesh": (2, 2), "tensor_parallel": True}),
    ],
    ids=["2 ranks", "2 ranks, bf16 policy", "4 ranks, 2 of which share a shard", "4 ranks, tensor parallel in pairs"],
)
def test_an_adapter_file_is_what_one_process_would_write(pool, tmp_path, processes, options):
    for name in ("sharded", "whole"):
        (tmp_path / name).mkdir()
    state = pool.run(run_save_and_load, str(tmp_path / "sharded"), options, processes=processes)[0]
    model = new_model()
    model.load_state_dict(state, strict=False)
    save_lora(model, tmp_path / "whole")
    assert files_in(tmp_path / "sharded") == files_in(tmp_path / "whole")


def run_save_and_load(rank, world_size, directory, options):
    model, _ = new_training(sharded=False)
    shard(model, reshard_after_forward=False, **options)
    with torch.no_grad():
        model(batch()[0])  # after which the units show gathered copies, rounded by the policy
    with mock.patch("lora_kernels.adapters.save._write_pair", wraps=save_module._write_pair) as written:
        save_lora(model, directory)
    assert written.call_count == (rank == 0)
    assert len(files_in(directory)) == 2  # on every rank, once the call is back
    adapters = whole_adapters(model)
    other, _ = new_training(sharded=False, seed=1)
    shard(other, reshard_after_forward=False, **options)
    with torch.no_grad():
        other(batch()[0])
    load_lora(other, directory)
    loaded = whole_adapters(other)
    assert all(torch.equal(loaded[name], value) for name, value in adapters.items())
    return adapters


@pytest.mark.parametrize(("processes", "layout"), [(4, "tensor parallel in pairs"), (2, "FSDP without adapters")])
def test_of_ranks_that_have_the_same_adapter_one_writes(pool, tmp_path, processes, layout):
    save_lora(new_model(seed=3), tmp_path / "whole")
    (tmp_path / "file").touch()
    for written, told in pool.run(run_same_adapter, str(tmp_path), layout, processes=processes):
        assert written == files_in(tmp_path / "whole")
        assert told == f"directory must be a directory, or not exist yet; got the file {tmp_path}/file."


def run_same_adapter(rank, world_size, directory, layout):
    model = new_model(seed=3)
    if layout == "FSDP without adapters":
        fully_shard(model, ignored_params=set(trainable(model).values()))
    else:
        tensor_parallel(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "tp"))["tp"])
    with mock.patch("lora_kernels.adapters.save._write_pair", wraps=save_module._write_pair) as written:
        save_lora(model, Path(directory) / "adapter")
    assert written.call_count == (rank == 0)
    with pytest.raises(ArgumentError) as caught:
        save_lora(model, Path(directory) / "file")
    return files_in(Path(directory) / "adapter"), str(caught.value)


def test_each_stage_of_a_pipeline_writes_its_own_directory(pool, tmp_path):
    save_lora(new_model(seed=3), tmp_path / "whole")
    assert sum(pool.run(run_stages, str(tmp_path), processes=4)) == 2
    for stage in range(2):
        assert files_in(tmp_path / f"stage-{stage}") == files_in(tmp_path / "whole")


def run_stages(rank, world_size, directory):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    model = fully_shard(new_model(seed=3), mesh=mesh["dp"])
    with mock.patch("lora_kernels.adapters.save._write_pair", wraps=save_module._write_pair) as written:
        save_lora(model, Path(directory) / f"stage-{mesh['pp'].get_local_rank()}")
    return written.call_count


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("a file in the way", "ArgumentError: directory must be a directory, or not exist yet; got the file {}/file."),
        ("a full disk", "OSError: no space"),
        ("an interruption", "KeyboardInterrupt: "),
    ],
)
def test_an_error_of_the_rank_that_writes_is_raised_on_all(pool, tmp_path, fault, told):
    old = new_model(seed=3)
    save_lora(old, tmp_path / "adapter")
    before = files_in(tmp_path / "adapter")
    (tmp_path / "file").touch()
    first, second = pool.run(run_failing_save, str(tmp_path), fault, processes=2)
    assert first == told.format(tmp_path)
    assert second == ("RuntimeError: on another rank: KeyboardInterrupt: " if fault == "an interruption" else first)
    assert files_in(tmp_path / "adapter") == before


def run_failing_save(rank, world_size, directory, fault):
    model, _ = new_training()
    replace = os.replace

    def failing(source, target):
        if Path(source).name == "adapter_config.json":  # the last of the renames
            raise OSError("no space") if fault == "a full disk" else KeyboardInterrupt
        replace(source, target)

    with mock.patch("os.replace", failing):
        try:
            save_lora(model, Path(directory) / ("file" if fault == "a file in the way" else "adapter"))
        except BaseException as error:
            return f"{type(error).__name__}: {error}"


def test_a_file_that_one_rank_cannot_read_is_loaded_by_none(pool, tmp_path):
    save_lora(new_model(seed=3), tmp_path / "0")
    for told, changed in pool.run(run_failing_load, str(tmp_path), processes=2):
        assert told.startswith(f"{tmp_path}/1: expected a directory with adapter_config.json")
        assert not changed


def run_failing_load(rank, world_size, directory):
    model, _ = new_training()
    before = whole_adapters(model)
    with pytest.raises(AdapterFileError) as caught:
        load_lora(model, Path(directory) / str(rank))
    after = whole_adapters(model)
    return str(caught.value), [name for name, value in before.items() if not torch.equal(after[name], value)]


def test_a_new_adapter_is_loaded_by_all_ranks_of_tensor_parallel_or_by_none(pool, tmp_path):
    save_lora(new_model(seed=3), tmp_path / "whole")
    for told in pool.run(run_new_adapter, str(tmp_path), processes=4):
        assert told.startswith(f"{tmp_path}/missing: expected a directory with adapter_config.json")
    assert files_in(tmp_path / "again") == files_in(tmp_path / "whole")


def run_new_adapter(rank, world_size, directory):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "tp"))
    model = tensor_parallel(new_model(), mesh["tp"])
    with pytest.raises(AdapterFileError) as caught:
        load_lora(model, Path(directory) / ("missing" if rank == 3 else "whole"), adapter_name="new")
    assert not any("new" in layer.adapters for layer in model.modules() if isinstance(layer, LoRALinear))
    load_lora(model, Path(directory) / "whole", adapter_name="new")
    save_lora(model, Path(directory) / "again", adapter_name="new")
    return str(caught.value)
