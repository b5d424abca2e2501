"""Sharded LoRA layers where more is sharded, shared or given: one process's results, or a clear error."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import parallelize_module

from lora_kernels import ArgumentError, LoRALinear, UnsupportedError, set_adapter, unload_lora
from lora_kernels.distributed import LoRAColwiseParallel, LoRARowwiseParallel, shard_dropout
from tests.distributed.test_tensor_parallel import (
    PARTS,
    STYLES,
    inputs_of,
    new_layer,
    part,
    run,
    sharded,
    tensor_parallel,
)
from tests.distributed.training import Results, adapt, batch, losses, new_model, trainable


def refusal(error: type[Exception], call) -> str:
    with pytest.raises(error) as info:
        call()
    return str(info.value)


@pytest.mark.parametrize("cut", [False, True], ids=["FSDP2", "FSDP2 over tensor parallel"])
@pytest.mark.parametrize("first", ["default", "b"])
def test_the_default_adapter_beside_another_under_fsdp(pool, first, cut):
    # FSDP reads a layer's lora_A by that name, whichever adapter is active.
    expected = run_adapters(0, 1, first, False)
    for found in pool.run(run_adapters, first, cut, processes=4 if cut else 2):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def run_adapters(rank: int, world_size: int, first: str, cut: bool) -> Results:
    """Gradients with one adapter and then the other, and the parameters after all of that."""
    model = new_model()
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.add_adapter("b", r=3, init_lora_weights=False)
    model.double()
    set_adapter(model, first)
    if world_size > 1:
        mesh = None
        if cut:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            tensor_parallel(model, mesh["tp"])
            mesh = mesh["dp"]
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    found = {}
    for name in (first, "b" if first == "default" else "default", first):
        set_adapter(model, name)
        model.load_state_dict(model.state_dict())
        losses(model, *batch()).mean().backward()  # every rank has the whole batch, whose mean is its own
        for key, parameter in trainable(model).items():
            found[f"{name}: d_{key}"] = whole(parameter.grad)
            parameter.grad = None
    return found | {key: whole(value) for key, value in model.state_dict().items()}


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


@pytest.mark.parametrize("style", STYLES)
def test_a_scaling_that_is_trained(pool, style):
    layer = new_layer()
    layer.scaling = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    run(layer, *inputs_of("fp64"))
    for gradient in pool.run(run_scaling, style, processes=2):
        torch.testing.assert_close(gradient, layer.scaling.grad)


def run_scaling(rank, world_size, style):
    layer = new_layer()
    scaling = layer.scaling = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    layer = sharded(layer, style, world_size)
    x, dy = (part(t, dim, rank, world_size) for t, dim in zip(inputs_of("fp64"), PARTS[style, False], strict=True))
    run(layer, x, dy)
    return scaling.grad


def new_uneven() -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(22, 6, r=4, init_lora_weights=False, dtype=torch.float64)
    layer.bias.data[2] = float("inf")
    return layer


def test_parts_of_different_sizes_and_an_infinite_bias(pool):
    x = torch.randn(3, 22, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = new_uneven()
    expected = outputs(layer, x)
    for found in pool.run(run_uneven, x, processes=4):  # 6, 6, 6 and 4 columns
        torch.testing.assert_close(found, expected)


def outputs(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    ys = [layer(x)]
    layer.merge()
    ys.append(layer(x))
    layer.set_adapter(None)
    return [y.detach() for y in (*ys, layer(x))]


def run_uneven(rank, world_size, x):
    return outputs(sharded(new_uneven(), "rowwise", world_size), x.chunk(world_size, -1)[rank])


def test_a_disagreement_about_the_seed_is_told_to_ranks_that_agree(pool):
    # Rank 1 draws another seed: 0 shares rows with it, 3 columns, and 2 neither.
    told = pool.run(run_one_other_seed, processes=4)
    assert all(text.startswith("dropout_seed must be the same on every rank") for text in told)


def run_one_other_seed(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = new_layer("fp32", dropout=0.4)
    shard_dropout(layer, mesh["dp"])
    layer = parallelize_module(layer, mesh["tp"], LoRAColwiseParallel())
    torch.manual_seed(int(rank == 1))
    return refusal(ArgumentError, lambda: layer(inputs_of("fp32")[0]))


def test_what_is_told_alike_on_every_rank(pool):
    first, *others = pool.run(run_refusals, processes=4)
    assert all(told == first for told in others)
    assert first["dp x"] == (
        "x must be a tensor, or a DTensor on the mesh that the layer is sharded over, MESH; got one on MESH. Pass its "
        "local tensor: x.to_local()."
    )
    for order in ("dropout first", "dropout last", "dropout of all"):
        assert first[order] == (
            "mesh must hold ranks with different parts of the batch; got MESH, and a layer is sharded over MESH. Name "
            "the dimension of the batch alone: shard_dropout(model, mesh['dp'])."
        )
    assert first["by name"] == "x must be passed by position to a sharded layer; got it by name. Call layer(x)."
    assert first["assigned"] == (
        "parameters of ColwiseLoRALinear '0' must stay DTensors, this rank's parts; got a whole tensor of [22, 64]. "
        "Load a state_dict by torch.distributed.checkpoint.state_dict.set_model_state_dict, and without assign=True."
    )
    for sharded_already in ("fully_shard first", "torch's style first"):
        assert first[sharded_already] == (
            "LoRARowwiseParallel must be given a LoRALinear over an nn.Linear that is not sharded yet; got one whose "
            "parameters FSDP or another style has sharded. Call parallelize_module first, then fully_shard."
        )


def run_refusals(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    column = parallelize_module(new_layer("fp32"), mesh["tp"], LoRAColwiseParallel())
    x = inputs_of("fp32")[0]
    elsewhere = DTensor.from_local(x, mesh["dp"], [Shard(0)], run_check=False)
    told = {
        "dp x": refusal(ArgumentError, lambda: column(elsewhere)),
        "by name": refusal(ArgumentError, lambda: column(input=x)),
        "dropout last": refusal(ArgumentError, lambda: shard_dropout(column, mesh["tp"])),
        "dropout of all": refusal(ArgumentError, lambda: shard_dropout(column)),
    }
    model = nn.Sequential(column)
    model.load_state_dict({f"0.{key}": value for key, value in new_layer("fp32").state_dict().items()}, assign=True)
    told["assigned"] = refusal(UnsupportedError, lambda: model(x))
    layer = new_layer("fp32")
    shard_dropout(layer, mesh["tp"])
    told["dropout first"] = refusal(ArgumentError, lambda: parallelize_module(layer, mesh["tp"], LoRARowwiseParallel()))
    for name, shard in (
        ("fully_shard first", lambda layer: fully_shard(layer, mesh=mesh["dp"])),
        ("torch's style first", lambda layer: distribute_module(layer, mesh["tp"])),
    ):
        layer = shard(new_layer("fp32"))
        kind = type(layer)
        told[name] = refusal(UnsupportedError, partial(parallelize_module, layer, mesh["tp"], LoRARowwiseParallel()))
        assert type(layer) is kind
    return {name: re.sub(r"DeviceMesh\(.*?\)\)", "MESH", text) for name, text in told.items()}


def test_a_layer_that_is_unloaded_keeps_nothing_of_it(pool):
    assert pool.run(run_unloaded, processes=2) == [set(), set()]


def run_unloaded(rank, world_size):
    model = nn.Sequential(nn.Linear(16, 16))
    adapt(model, target_modules=["0"])
    mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("dp", "tp"))
    shard_dropout(model, mesh["dp"])
    parallelize_module(model, mesh["tp"], {"0": LoRAColwiseParallel(output_layouts=Replicate())})
    unload_lora(model)
    return {"mesh", "batch_shard"} & vars(model[0]).keys()


class Helpful(nn.Linear):
    def columns(self):
        return self.in_features


class Shadowing(nn.Linear):
    placements = ()


def test_methods_of_a_subclass_stay_in_a_sharded_layer(pool):
    for found, told in pool.run(run_subclasses, processes=2):
        assert found
        assert told == (
            "LoRAColwiseParallel must be given a linear without attributes of a sharded layer's; got Shadowing, which "
            "has a placements. Rename it, or do not shard this layer."
        )


def run_subclasses(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    model = nn.Sequential(Helpful(16, 16), Shadowing(16, 16))
    adapt(model, target_modules=["0", "1"])
    x = torch.ones(2, 16)
    y, kind = model[0](x), type(model[1])
    layer = parallelize_module(model[0], mesh, LoRAColwiseParallel(output_layouts=Replicate()))
    told = refusal(UnsupportedError, lambda: parallelize_module(model[1], mesh, LoRAColwiseParallel()))
    assert type(model[1]) is kind
    torch.testing.assert_close(layer(x), y)
    return layer.columns() == 16 and isinstance(layer, Helpful), told
