"""Parameters that other ranks hold a part of, and what must not happen to them.

FSDP keeps the parameters of its units itself, as DTensors, and puts them into their modules: gathered before a forward,
sharded after it. Whatever anybody else puts there is gone at the next forward, and a gathered parameter, which looks
like any other, is a copy that nobody reads again.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.errors import UnsupportedError

ADD_FIRST = "Add every adapter that the model is to have first, then shard it."
MERGE_ELSEWHERE = (
    "Save the adapter with save_lora on all ranks, load it into a model that is not sharded, and merge it there."
)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP holds parameters of the module or of one below it, be they gathered just now or not."""
    # fully_shard and FullyShardedDataParallel set it, for torch.compile, on every module whose parameters they hold.
    return any(getattr(one, "_is_fsdp_managed_module", False) for one in module.modules())


def check_not_sharded(module: nn.Module, call: str, remedy: str, name: str = "") -> None:
    """FSDP holds no parameters of the module.

    Raises:
        UnsupportedError: it does; named as the model calls it, or by what it is.
    """
    if is_sharded(module):
        raise UnsupportedError(
            f"{call} needs parameters that FSDP does not hold, since FSDP would put its own back in their place; got "
            f"{repr(name) if name else _described(module)}, which is sharded. {remedy}"
        )


def check_not_gathered(layer: nn.Module, call: str) -> None:
    """What is done to the layer's parameters lasts.

    Raises:
        UnsupportedError: FSDP has gathered them: they are copies.
    """
    own = getattr(layer, "mesh", None)  # in tensor parallel, what is gathered is a DTensor, too, but over this mesh
    meshes = [p.device_mesh for p in layer.parameters() if is_dtensor(p)]  # type: ignore[attr-defined]
    if is_sharded(layer) and all(mesh == own for mesh in meshes):
        raise UnsupportedError(
            f"{call} needs the parameters that FSDP keeps; got {_described(layer)}, which holds gathered copies of "
            f"them, as after a forward. Call {call} of the package on the whole model, or reshard() on its FSDP "
            "modules. (Models in FullyShardedDataParallel are not supported: use fully_shard.)"
        )


def reshard(model: nn.Module) -> None:
    """Has every unit of FSDP in the model show the parameters that it keeps, instead of gathered copies."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # nobody has sharded anything where it was not imported
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def dtensors() -> tuple[type, ...]:
    """The class torch.distributed.tensor.DTensor, or nothing where that was not imported: then there are none."""
    found: Any = sys.modules.get("torch.distributed.tensor")
    return () if found is None else (found.DTensor,)


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor."""
    return isinstance(tensor, dtensors())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where ranks hold parts of it, all of them have to ask."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def write(parameter: Tensor, values: Tensor) -> None:
    """Writes a whole tensor into a parameter, or each rank its part of what the first one has."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        to: Any = parameter
        values = distribute_tensor(values.to(to.device, to.dtype), to.device_mesh, to.placements)
    parameter.copy_(values)


def _described(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"
