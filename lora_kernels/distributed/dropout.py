"""One dropout mask over several ranks: the same seed on each, and each rank's place in the whole input.

A mask is a function of (seed, row, column), so ranks that hold parts of one input need to agree on the seed and to know
where their part begins; nothing of the mask's size is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lora_kernels.errors import ArgumentError
from lora_kernels.nn import LoRALinear

_TOLD = (
    "dropout_seed must be the same on every rank that shares a mask; the ranks of this group drew different ones. Call "
    "torch.manual_seed with the same seed on all of them before training, and draw random numbers alike on all of them "
    "afterwards."
)


def draw_seed(device: torch.device) -> Tensor:
    """[1] int64 from torch's generator for `device`, as `lora_linear` draws it."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def gather_seeds(mesh: DeviceMesh, drawn: Tensor) -> Tensor:
    """Every rank's [seed, ...] as the rows of a tensor, in the mesh's order, from this rank's; the seeds are the same.

    Raises:
        ArgumentError: they are not, on every rank. On a GPU the check is an assertion on the device, since nothing here
            waits for it; so it is in a compiled graph.
    """
    of_ranks = DTensor.from_local(drawn[None], mesh, [Shard(0)], run_check=False).full_tensor()
    agree = (of_ranks[:, 0] == of_ranks[0, 0]).all()
    if torch.compiler.is_compiling() or not agree.is_cpu:
        torch._assert_async(agree, _TOLD)
    elif not agree:
        raise ArgumentError(_TOLD)
    return of_ranks


@dataclass(frozen=True)
class BatchShard:
    """The part of a batch that a rank of a 1-D mesh holds: the ranks' rows lie one after another, in its order."""

    mesh: DeviceMesh

    def first_row(self, seed: Tensor, x: Tensor) -> Tensor:
        """Where this rank's rows of x [*, K] begin; other ranks may have other numbers of them."""
        rows = torch.full((1,), x.shape[:-1].numel(), dtype=torch.int64, device=x.device)
        of_ranks = gather_seeds(self.mesh, torch.cat([seed, rows]))
        return of_ranks[: self.mesh.get_local_rank(), 1].sum()

    def __call__(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, int]]:
        """(seed, (first row, 0)) of a call with x, for `lora_linear`."""
        seed = draw_seed(x.device)
        return seed, (self.first_row(seed, x), 0)


def shard_dropout(model: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Makes the LoRA dropout of data-parallel ranks that of one process with the whole batch.

    Without it each rank draws masks for its part of the batch as if that were all: a valid training run, and another
    one than on another number of ranks. With it, the ranks draw the same seed for a call, and each applies the rows of
    the mask that are its part's: the first rank's rows come first in the whole batch, then the second's, in the mesh's
    order. Ranks may have different numbers of rows. Each training call of a layer with dropout gathers two integers
    from every rank.

    Args:
        model: its `LoRALinear` layers, of which there is at least one, are changed in place; call it before or after
            DistributedDataParallel, fully_shard and parallelize_module.
        mesh: the ranks that share a batch, one-dimensional, such as mesh_2d["dp"]; None for all ranks.

    Raises:
        ArgumentError: the model has no LoRALinear, or the mesh more than one dimension. In a layer's call: the ranks
            drew different seeds; they need the same `torch.manual_seed`.

    Example:
        >>> import torch
        >>> from lora_kernels import LoRALinear
        >>> from lora_kernels.distributed import shard_dropout
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> layer = LoRALinear(64, 32, r=8, lora_dropout=0.1)
        >>> shard_dropout(layer)
        >>> layer(torch.randn(4, 64)).shape
        torch.Size([4, 32])
        >>> torch.distributed.destroy_process_group()
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if not layers:
        raise ArgumentError(
            f"model must have LoRALinear layers; got {type(model).__name__} without any. Call add_lora first; the "
            "layers of a patched PEFT model draw their own seeds."
        )
    if mesh is None:
        mesh = init_device_mesh(layers[0].weight.device.type, (torch.distributed.get_world_size(),))
    if mesh.ndim != 1:
        raise ArgumentError(f"mesh must have one dimension; got {mesh.ndim}. Name the one of the batch: mesh['dp'].")
    for layer in layers:
        layer.batch_shard = BatchShard(mesh)
