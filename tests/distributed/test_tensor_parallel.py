"""Column- and row-wise LoRA layers over several ranks: one process's results, its masks, and no more communication."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lora_kernels import (
    ArgumentError,
    LoRALinear,
    UnsupportedError,
    delete_adapter,
    load_lora,
    merge_lora,
    save_lora,
    set_adapter,
    unload_lora,
    unmerge_lora,
)
from lora_kernels.distributed import LoRAColwiseParallel, LoRARowwiseParallel, shard_dropout
from lora_kernels.testing import budget_rows
from tests.distributed.training import TARGETS, assert_within_budget, batch, new_model, together, train
from tests.equality import assert_same_numbers

STYLES = {"colwise": LoRAColwiseParallel, "rowwise": LoRARowwiseParallel}
BATCH, LENGTH, K, N, R = 3, 8, 64, 22, 4
ADAPTERS = {"fp64": (torch.float64, None), "fp32": (torch.float32, None), "bf16-mixed": (torch.bfloat16, torch.float32)}


def new_layer(dtype="fp64", *, dropout=0.0, bias=True, trains=(), backend="auto") -> LoRALinear:
    torch.manual_seed(0)
    kind, adapters = ADAPTERS[dtype]
    layer = LoRALinear(
        K, N, bias, r=R, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False, dtype=torch.float64
    )
    layer.backend = backend
    for name, parameter in layer.named_parameters():
        rounded = parameter.data.bfloat16()
        parameter.data = rounded.to((adapters or kind) if "lora_" in name else kind)
    for name in trains:
        getattr(layer, name).requires_grad_(True)
    return layer


def inputs_of(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    kind, _ = ADAPTERS[dtype]
    x, dy = (torch.randn(BATCH, LENGTH, size, generator=generator).bfloat16().to(kind) for size in (K, N))
    return x, dy


def run(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, *, calls: int = 2) -> dict[str, torch.Tensor]:
    """y, dx and the parameters' gradients of several calls, each with its own mask; y and dx are this rank's."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_()
    ys = [layer(x) for _ in range(calls)]
    for y in ys:
        y.backward(dy)
    gradients = {f"d_{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return {"y": torch.cat([y.detach() for y in ys]), "d_x": x.grad} | gradients


# Which dimension of x and of y a rank has a part of, by style and by whether the sequence is sharded.
PARTS = {
    ("colwise", False): (None, -1),
    ("rowwise", False): (-1, None),
    ("colwise", True): (1, -1),
    ("rowwise", True): (-1, 1),
}


def part(t: torch.Tensor, dim: int | None, rank: int, world_size: int) -> torch.Tensor:
    return t if dim is None else t.chunk(world_size, dim)[rank].contiguous()


def sharded(layer: LoRALinear, style: str, world_size: int, sequence: bool = False) -> nn.Module:
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
    layouts = {}
    if sequence:
        layouts = {"input_layouts": Shard(1)} if style == "colwise" else {"output_layouts": Shard(1)}
    return parallelize_module(layer, mesh, STYLES[style](**layouts))


def run_rank(rank, world_size, style, dtype, options, sequence):
    layer = sharded(new_layer(dtype, **options), style, world_size, sequence)
    x, dy = (part(t, dim, rank, world_size) for t, dim in zip(inputs_of(dtype), PARTS[style, sequence], strict=True))
    return run(layer, x, dy)


def run_ranks(pool, processes, style, dtype, options, sequence=False):
    """What the ranks found, put together; what all of them have is the same on all."""
    found = pool.run(run_rank, style, dtype, options, sequence, processes=processes)
    together = {}
    of_x, of_y = PARTS[style, sequence]
    for name, first in found[0].items():
        dim = {"y": of_y, "d_x": of_x}.get(name)
        pieces = [result[name] for result in found]
        together[name] = first if dim is None else torch.cat(pieces, dim)
        if dim is None:
            assert_same_numbers(pieces, [first] * len(pieces), name)
    return together


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("style", STYLES)
def test_computes_what_one_process_does(pool, style, processes, dropout, sequence):
    # In fp64, where a wrong term shows; N = 22 is 6, 6, 6 and 4 on four ranks.
    options = {"dropout": dropout, "trains": ("weight", "bias")}
    expected = run(new_layer(**options), *inputs_of("fp64"))
    found = run_ranks(pool, processes, style, "fp64", options, sequence)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("style", STYLES)
def test_budget(pool, style, dtype, dropout):
    options = {"dropout": dropout}
    found = run_ranks(pool, 2, style, dtype, options)
    x, dy = inputs_of(dtype)
    eager = run(new_layer(dtype, **options, backend="reference"), x, dy)
    truth = run(new_layer("fp64", **options, backend="reference"), x.double(), dy.double())
    rows = budget_rows(found, eager, truth)
    assert all(row.ok for row in rows), rows


# What a frozen layer's forward and backward communicate, and beside that only the gradient of what every rank has.
SUM, GATHER, SCATTER = "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"
COMMUNICATION = {
    # (style, sequence): forward, backward
    ("colwise", False): ({}, {SUM: 2}),  # dx, dA
    ("rowwise", False): ({SUM: 1}, {SUM: 1}),  # y; dB
    ("colwise", True): ({GATHER: 1}, {SCATTER: 1, SUM: 1}),  # x; dx, dA
    ("rowwise", True): ({SCATTER: 1}, {GATHER: 1, SUM: 1}),  # y; dy, dB
}


@pytest.mark.parametrize(("style", "sequence"), COMMUNICATION)
def test_communicates_what_the_frozen_layer_does_and_one_small_gradient(pool, style, sequence):
    for forward, backward, seeds in pool.run(run_communication, style, sequence, processes=2):
        assert (forward, backward) == COMMUNICATION[style, sequence]
        assert seeds == forward | {
            GATHER: forward.get(GATHER, 0) + 1
        }  # with dropout: that the ranks drew the same seed


def run_communication(rank, world_size, style, sequence):
    counts = []
    for dropout in (0.0, 0.4):
        layer = sharded(new_layer("fp32", dropout=dropout), style, world_size, sequence)
        x, dy = (
            part(t, dim, rank, world_size) for t, dim in zip(inputs_of("fp32"), PARTS[style, sequence], strict=True)
        )
        with CommDebugMode() as forward:
            y = layer(x.requires_grad_())
        with CommDebugMode() as backward:
            y.backward(dy)
        counts += [{str(op).split(".")[-1]: n for op, n in m.get_comm_counts().items()} for m in (forward, backward)]
    return counts[:3]


PLAN = {
    f"blocks.*.{name}": (LoRARowwiseParallel if name in ("o_proj", "down") else LoRAColwiseParallel) for name in TARGETS
}


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {name: style() for name, style in PLAN.items()})


CASES = {
    "fp32": {},
    "bf16 autocast": {"autocast": True},
    "dropout": {"dropout": 0.25},
    "dropout, checkpointed": {"dropout": 0.25, "checkpoints": "not reentrant"},
    "dropout, checkpointed and reentrant": {"dropout": 0.25, "checkpoints": "reentrant"},
    "dropout, compiled": {"dropout": 0.25, "compiled": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_transformer_trains_as_on_one_process(pool, case):
    options = CASES[case]
    first, second = pool.run(run_transformer, options, processes=2)
    assert_same_numbers(second, first)
    model = new_model(dropout=options.get("dropout", 0.0))
    assert_within_budget(first, model, autocast=options.get("autocast", False), seed=11)


def run_transformer(rank, world_size, options):
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
    model = tensor_parallel(new_model(dropout=options.get("dropout", 0.0)), mesh)
    model.checkpoints = options.get("checkpoints")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own
        if options.get("compiled"):
            for block in model.blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        return train(model, whole=DTensor.full_tensor, autocast=options.get("autocast", False), seed=11)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_two_dimensions(pool, dropout):
    # Two replicas' worth of the batch, each sharded by FSDP over one dimension of the mesh and cut over the other.
    results = pool.run(run_two_dimensions, dropout, processes=4)
    for first in (0, 2):
        assert_same_numbers(results[first + 1]["losses"], results[first]["losses"])
    assert_within_budget(together([results[0], results[2]]), new_model(dropout=dropout), seed=11)


def run_two_dimensions(rank, world_size, dropout):
    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(new_model(dropout=dropout), mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    shard_dropout(model, mesh["dp"])
    return train(model, mesh["dp"].get_local_rank(), 2, whole=DTensor.full_tensor, seed=11)


def test_adapters_come_go_and_are_saved(pool, tmp_path):
    model = new_model()
    expected = manage(model, tmp_path / "one")
    for found in pool.run(run_manage, tmp_path / "two", processes=2):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
    one, two = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two
    configs = [(tmp_path / folder / "adapter_config.json").read_text() for folder in ("one", "two")]
    assert configs[0] == configs[1]


def run_manage(rank, world_size, folder):
    return manage(tensor_parallel(new_model(), torch.distributed.init_device_mesh("cpu", (world_size,))), folder)


def manage(model, folder):
    """Outputs after each change; those of a model in one process, and of one that is cut."""
    model.double().eval()
    tokens, _ = batch()
    seen = {"before": model(tokens)}
    save_lora(model, folder)
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.add_adapter("second", r=3, init_lora_weights=False)
    seen["second"] = model(tokens)
    merge_lora(model)
    seen["second, merged"] = model(tokens)
    set_adapter(model, "default")
    seen["default, merged"] = model(tokens)
    unmerge_lora(model)
    seen["default"] = model(tokens)
    delete_adapter(model, "second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    seen["base"] = model(tokens)
    load_lora(model, folder)
    seen["loaded"] = model(tokens)
    unload_lora(model)
    seen["unloaded"] = model(tokens)
    return {name: output.detach() for name, output in seen.items()}


def test_what_a_layer_has_when_it_is_sharded_comes_along(pool):
    x, _ = inputs_of("fp64")
    layer = with_two_adapters()
    expected = {"merged": layer(x)}
    layer.unmerge()
    expected["second"] = layer(x)
    layer.set_adapter("default")
    expected["default"] = layer(x)
    for found in pool.run(run_two_adapters, processes=4):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.detach(), msg=lambda text, name=name: f"{name}: {text}")


def with_two_adapters() -> LoRALinear:
    layer = new_layer()
    layer.add_adapter("second", r=3, init_lora_weights=False)
    layer.merge()
    return layer


def run_two_adapters(rank, world_size):
    # Whole outputs of parts that differ in size: N = 22 is 6, 6, 6 and 4.
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
    layer = parallelize_module(with_two_adapters(), mesh, LoRAColwiseParallel(output_layouts=Replicate()))
    assert layer.merged
    x, _ = inputs_of("fp64")
    found = {"merged": layer(x)}
    layer.unmerge()
    found["second"] = layer(x)
    layer.set_adapter("default")
    found["default"] = layer(x)
    return {name: y.detach() for name, y in found.items()}


@pytest.mark.parametrize("source", [0, None])
def test_whose_numbers_are_sharded(pool, source):
    # As parallelize_module says: rank 0's, or each rank's part of its own.
    for rank, of_kinds in enumerate(pool.run(run_source, source, processes=2)):
        assert of_kinds == [{0.0 if source == 0 else float(rank)}] * 2


def run_source(rank, world_size, source):
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
    found = []
    for layer in (LoRALinear(8, 8, r=4), nn.Linear(8, 8)):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(rank)
        parallelize_module(layer, mesh, LoRARowwiseParallel(), src_data_rank=source)
        found.append({value for p in layer.parameters() for value in p.to_local().flatten().tolist()})
    return found


@pytest.mark.parametrize("style", STYLES)
def test_different_seeds_are_detected_on_every_rank(pool, style):
    told = pool.run(run_seeds, style, processes=2)
    for error in told:
        assert error.startswith("dropout_seed must be the same on every rank that shares a mask")


def run_seeds(rank, world_size, style):
    layer = sharded(new_layer("fp32", dropout=0.4), style, world_size)
    x = part(inputs_of("fp32")[0], PARTS[style, False][0], rank, world_size)
    torch.manual_seed(1)
    layer(x)
    layer.eval()(x)  # where nothing is drawn, nothing differs
    torch.manual_seed(rank)
    with pytest.raises(ArgumentError) as info:
        layer.train()(x)
    return str(info.value)


def test_a_rank_without_a_part_is_refused(pool):
    # 5 over 4 ranks is 2, 2, 1 and nothing.
    told = pool.run(run_five, processes=4)
    assert told == ["out_features must leave every rank a part; got 5 for 4 ranks. Do not shard this layer."] * 4


def run_five(rank, world_size):
    with pytest.raises(ArgumentError) as info:
        sharded(LoRALinear(8, 5), "colwise", world_size)
    return str(info.value)


def test_what_cannot_be_sharded_is_refused_alike_on_every_rank(pool):
    first, second = pool.run(run_refusals, processes=2)
    assert first == second
    assert first == {
        "too few": "out_features must leave every rank a part; got 1 for 2 ranks. Do not shard this layer.",
        "twice": (
            "LoRARowwiseParallel must be given a LoRALinear over an nn.Linear that is not sharded yet; got "
            "ColwiseLoRALinear. Transposed weights (Conv1D) are not sharded."
        ),
        "columns": (
            "in_features must be sharded in multiples of 8 for dropout, since so many columns share one random number; "
            "got 24 over 2 ranks, 12 each. Set lora_dropout to 0 for this layer, or do not shard it."
        ),
        "torch's own style": first["torch's own style"],
    }
    assert first["torch's own style"].startswith("x of LoRALinear '0' must be a whole tensor; got a DTensor of [2, 64]")


def run_refusals(rank, world_size):
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
    told = {}

    def refused(name, error, call):
        with pytest.raises(error) as info:
            call()
        told[name] = str(info.value)

    refused("too few", ArgumentError, lambda: parallelize_module(LoRALinear(8, 1), mesh, LoRAColwiseParallel()))
    layer = parallelize_module(new_layer("fp32"), mesh, LoRAColwiseParallel())
    refused("twice", UnsupportedError, lambda: parallelize_module(layer, mesh, LoRARowwiseParallel()))
    odd = parallelize_module(LoRALinear(24, 8, lora_dropout=0.1), mesh, LoRARowwiseParallel())
    refused("columns", ArgumentError, lambda: odd(torch.ones(2, 12)))
    stock = nn.Sequential(new_layer("fp32"))
    parallelize_module(stock, mesh, {"0": ColwiseParallel()})
    refused("torch's own style", UnsupportedError, lambda: stock(torch.ones(2, K)))
    return told


def test_other_modules_get_torchs_styles(pool):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    expected = new_plain()(x)
    for found in pool.run(run_plain, x, processes=2):
        torch.testing.assert_close(found, expected)


def new_plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))


def run_plain(rank, world_size, x):
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
    plan = {"0": LoRAColwiseParallel(use_local_output=False), "1": LoRARowwiseParallel()}
    y = parallelize_module(new_plain(), mesh, plan)(x)
    return (y + 0).detach()  # a sum that torch's style has begun is waited for by what reads it
