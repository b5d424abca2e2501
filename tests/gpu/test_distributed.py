"""Sharded LoRA layers over NCCL: one GPU as a mesh of one rank; two, where they are, against one process on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module
from torch.multiprocessing import spawn

from lora_kernels import LoRALinear
from lora_kernels.distributed import LoRAColwiseParallel, LoRARowwiseParallel, shard_dropout
from lora_kernels.testing import budget_rows

STYLES = {"colwise": LoRAColwiseParallel, "rowwise": LoRARowwiseParallel, "fsdp": None}
M, K, N = 96, 256, 128


def results_of(layer, device, x_dtype):
    """y and the adapter's gradients of one call with dropout, whole and on the CPU."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(M, size, generator=generator).bfloat16().to(device, x_dtype) for size in (K, N))
    y = layer(x)
    y.backward(dy)
    found = {"y": y, "d_lora_A": layer.lora_A.grad, "d_lora_B": layer.lora_B.grad}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu() for name, t in found.items()}


def new_layer(p):
    torch.manual_seed(0)
    return LoRALinear(
        K, N, r=8, lora_dropout=p, init_lora_weights=False, dtype=torch.bfloat16, adapter_dtype=torch.float32
    )


def run_rank(rank, world_size, store, style, folder):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=world_size, device_id=device
    )
    mesh = init_device_mesh("cuda", (world_size,))
    # On several GPUs without dropout: a mask's seed comes from the device's generator, and the CPU's is another.
    layer = new_layer(0.25 if world_size == 1 else 0.0).to(device)
    alone = copy.deepcopy(layer)
    if style == "fsdp":
        # Each rank has the whole batch: the mean of equal gradients is that of one process.
        fully_shard(layer, mesh=mesh)
    else:
        if world_size == 1:
            shard_dropout(layer, mesh)
        layouts = {"output_layouts": Replicate()} if style == "colwise" else {"input_layouts": Replicate()}
        parallelize_module(layer, mesh, STYLES[style](**layouts))
    found = results_of(layer, device, torch.bfloat16)
    if rank == 0:
        torch.save({"found": found, "alone": results_of(alone, device, torch.bfloat16)}, folder)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_computes_what_one_process_does(style, processes, tmp_path):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs; torch sees {torch.cuda.device_count()}")
    out = tmp_path / "results"
    spawn(run_rank, (processes, str(tmp_path / "store"), style, str(out)), processes)
    results = torch.load(out)
    if processes == 1:  # nothing is cut, so that every product is the same
        for name, value in results["alone"].items():
            assert torch.equal(results["found"][name], value), name
        return
    eager, truth = new_layer(0.0), new_layer(0.0).double()
    eager.backend = truth.backend = "reference"
    rows = budget_rows(
        results["found"],
        results_of(eager, torch.device("cpu"), torch.bfloat16),
        results_of(truth, torch.device("cpu"), torch.float64),
    )
    assert all(row.ok for row in rows), rows
