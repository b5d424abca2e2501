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
from lora_kernels.validation import draw_seed

_TOLD = (
    "dropout_seed must be the same on every rank that shares a mask; the ranks of this group drew different ones. Call "
    "torch.manual_seed with the same seed on all of them before training, and draw random numbers alike on all of them "
    "afterwards."
)


def gather(mesh: DeviceMesh, drawn: Tensor) -> Tensor:
    """Every rank's [seed, ...] as the rows of a tensor, in the order of a 1-D mesh, from this rank's."""
    return DTensor.from_local(drawn[None], mesh, [Shard(0)], run_check=False).full_tensor()


def same_seed(of_ranks: Tensor) -> Tensor:
    """Whether they begin with the same seed, as a 0-d bool."""
    return (of_ranks[:, 0] == of_ranks[0, 0]).all()


def require(agree: Tensor) -> None:
    """The ranks that share a mask drew the same seed.

    Raises:
        ArgumentError: they did not. On a GPU the check is an assertion on the device, since nothing here waits for it;
            so it is in a compiled graph.
    """
    if torch.compiler.is_compiling() or not agree.is_cpu:
        torch._assert_async(agree, _TOLD)
    elif not agree:
        raise ArgumentError(_TOLD)


def check_apart(batch: DeviceMesh, tensor: DeviceMesh) -> None:
    """The ranks of a batch and those that a layer is sharded over are two dimensions of one mesh.

    Raises:
        ArgumentError: they share more ranks than this one: ranks with the same rows would count as parts of the batch.
    """
    shared = set(batch.mesh.flatten().tolist()) & set(tensor.mesh.flatten().tolist())
    if len(shared) > 1:
        raise ArgumentError(
            f"mesh must hold ranks with different parts of the batch; got {batch}, and a layer is sharded over "
            f"{tensor}. Name the dimension of the batch alone: shard_dropout(model, mesh['dp'])."
        )


@dataclass(frozen=True)
class BatchShard:
    """The part of a batch that a rank of a 1-D mesh holds: the ranks' rows lie one after another, in its order."""

    mesh: DeviceMesh

    def first_row(self, seed: Tensor, x: Tensor, agree: Tensor | None = None) -> Tensor:
        """Where this rank's rows of x [*, K] begin; other ranks may have other numbers of them.

        agree: whether the ranks that share these rows drew the same seed. A disagreement anywhere is told to all: a
        rank that raised alone would leave others waiting for it.
        """
        rows = torch.full((1,), x.shape[:-1].numel(), dtype=torch.int64, device=x.device)
        agrees = torch.ones_like(rows) if agree is None else agree.to(torch.int64)[None]
        of_ranks = gather(self.mesh, torch.cat([seed, rows, agrees]))
        require(same_seed(of_ranks) & of_ranks[:, 2].all())
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
        mesh: the ranks that share a batch, one-dimensional, such as mesh["dp"]; None for all ranks, where no
            layer is sharded over some.

    Raises:
        ArgumentError: the model has no LoRALinear; or the mesh has more than one dimension, or contains ranks that a
            layer is sharded over. In a layer's call: the ranks drew different seeds; they need the same
            `torch.manual_seed`.

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
        if isinstance(of_tensor := layer.__dict__.get("mesh"), DeviceMesh):
            check_apart(mesh, of_tensor)
    for layer in layers:
        layer.batch_shard = BatchShard(mesh)
