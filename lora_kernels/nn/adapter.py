"""What a LoRA layer keeps for each of its adapters: the numbers, and for all but the first kind a module of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lora_kernels import validation
from lora_kernels.errors import ArgumentError, DtypeError
from lora_kernels.functional._autocast import without_autocast
from lora_kernels.nn.sharding import is_dtensor, is_sharded, write

InitLoRAWeights = bool | Literal["gaussian"]

DEFAULT = "default"


@dataclass(frozen=True)
class AdapterSettings:
    """The numbers of one adapter in one layer."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    init_lora_weights: InitLoRAWeights
    backend: str
    scaling: float | torch.Tensor
    # Whether lora_A and lora_B are to be trained, kept while the adapter waits and neither requires a gradient.
    trains: tuple[bool, bool] = (True, True)

    @classmethod
    def checked(
        cls,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: InitLoRAWeights = True,
        backend: str = "auto",
    ) -> AdapterSettings:
        """With each number in its range, and the scaling that follows from them."""
        validation.check_rank("r", r)
        validation.check_finite("lora_alpha", lora_alpha)
        validation.check_dropout_p(lora_dropout, "lora_dropout")
        validation.check_backend(backend)
        if init_lora_weights not in (True, False, "gaussian"):
            raise ArgumentError(f"init_lora_weights must be True, False or 'gaussian'; got {init_lora_weights!r}.")
        scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        return cls(r, lora_alpha, float(lora_dropout), use_rslora, init_lora_weights, backend, scaling)


# Of a layer in which no adapter is active: a rank of 0.
NO_ADAPTER = AdapterSettings(0, 0, 0.0, False, True, "auto", 0.0)


class NamedAdapter(nn.Module):
    """The parameters of an adapter with a name other than "default": lora_A [R, K] and lora_B [N, R].

    A child of its layer, where it stays whether it is active or not: keys in a state_dict depend on names alone, and
    optimisers, FSDP and functional_call find each parameter where it was.
    """

    def __init__(self, lora_A: nn.Parameter, lora_B: nn.Parameter) -> None:
        super().__init__()
        self.lora_A, self.lora_B = lora_A, lora_B

    def extra_repr(self) -> str:
        """The shapes."""
        return f"lora_A={list(self.lora_A.shape)}, lora_B={list(self.lora_B.shape)}"


def child_name(adapter_name: str) -> str:
    """What the layer calls the child that holds the adapter; nothing else of a layer's begins like this."""
    return f"adapter_{adapter_name}"


def check_adapter_name(name: object) -> None:
    """A name that can stand in a state_dict's keys."""
    if not isinstance(name, str) or not name or "." in name:
        raise ArgumentError(
            f"adapter_name must be a non-empty string without dots, since it becomes part of the keys of a state_dict; "
            f"got {name!r}."
        )


def resolve_adapter_dtype(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """The adapters' dtype in a layer of `dtype`, both checked."""
    if dtype not in validation.LAYER_DTYPES:
        raise DtypeError(f"dtype must be float32, float16, bfloat16 or float64; got {dtype}. Choose one of them.")
    if adapter_dtype not in (None, dtype, torch.float32):
        raise DtypeError(f"adapter_dtype must be the layer's dtype, {dtype}, or torch.float32; got {adapter_dtype}.")
    return dtype if adapter_dtype is None else adapter_dtype


def new_parameters(
    in_features: int, out_features: int, r: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter]:
    """lora_A [R, K] and lora_B [N, R], not yet initialised."""
    return (
        nn.Parameter(torch.empty((r, in_features), device=device, dtype=dtype)),
        nn.Parameter(torch.empty((out_features, r), device=device, dtype=dtype)),
    )


@torch.no_grad()
def initialise(lora_A: torch.Tensor, lora_B: torch.Tensor, init_lora_weights: InitLoRAWeights) -> None:
    """A as PEFT's default does, B at zero unless init_lora_weights is False.

    Sharded ones become what whole ones would: ranks with the same seed would draw the same numbers into their parts,
    and an A whose rows repeat has a lower rank.
    """
    if is_dtensor(lora_A) or is_dtensor(lora_B):
        whole_A, whole_B = (torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (lora_A, lora_B))
        initialise(whole_A, whole_B, init_lora_weights)
        write(lora_A, whole_A)
        write(lora_B, whole_B)
        return
    if init_lora_weights == "gaussian":
        nn.init.normal_(lora_A, std=1 / lora_A.shape[0])
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if init_lora_weights is False:
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)


def move_scalings(scalings: Iterable[float | torch.Tensor], fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Takes scalings in tensors along with a layer's parameters, on which nn.Module's `_apply` calls `fn`.

    To another device only, each as the same object: a scaling's dtype is its own, and on meta its value would be lost.
    """
    for scaling in scalings:
        if isinstance(scaling, torch.Tensor):
            device = fn(scaling.detach()).device
            if device.type != "meta" and device != scaling.device:
                scaling.data = scaling.detach().to(device)


def merged_weight(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float | torch.Tensor, *, transposed: bool
) -> torch.Tensor:
    """W + scaling B A, added in fp32 or wider and rounded once; transposed: W is stored as [K, N]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(weight.device.type):  # which would round the product, and the sum with it
        update = (scaling * lora_B.to(wide)) @ lora_A.to(wide)
    if transposed:
        update = update.T.contiguous()
    return update.add_(weight).to(weight.dtype)


def merge_again(layer: Any, _incompatible_keys: Any) -> None:
    """After load_state_dict, which loads children after their parent: a named adapter was merged too early."""
    if layer.merged and layer._named is not None:
        layer.unmerge()
        layer.merge()


# What a subclass of nn.Linear may redefine and still be one: making itself is over, `adopt` keeps what resets or prints
# it, and the rest is Python's.
_NO_BEHAVIOUR = frozenset(
    {
        "__annotate_func__",
        "__annotations__",
        "__annotations_cache__",
        "__constants__",
        "__dict__",
        "__doc__",
        "__final__",
        "__firstlineno__",
        "__init__",
        "__module__",
        "__qualname__",
        "__slotnames__",
        "__static_attributes__",
        "__weakref__",
        "extra_repr",
        "reset_parameters",
    }
)


def names_of(layer_class: type[nn.Module]) -> set[str]:
    """The attributes that a class and its ancestors define or declare."""
    declared = {name for ancestor in layer_class.__mro__[:-1] for name in ancestor.__annotations__}
    return {*dir(layer_class), *declared}


_OF_LINEAR = names_of(nn.Linear) | {"bias"}  # which nn.Linear does not declare


def own_names(linear_class: type[nn.Module]) -> set[str]:
    """What a subclass of nn.Linear has from elsewhere than nn.Linear; names without behaviour are left out."""
    first: dict[str, type] = {}
    for ancestor in linear_class.__mro__:
        for name in vars(ancestor):
            first.setdefault(name, ancestor)
    return {name for name, ancestor in first.items() if ancestor not in nn.Linear.__mro__} - _NO_BEHAVIOUR


def obstacle(linear: Any) -> str | None:
    """Why a module is no plain linear: its weight is packed or parametrized, or it computes something else."""
    found = type(linear).__name__
    if not isinstance(linear, nn.Linear):
        return found
    own = own_names(type(linear))
    if "forward" in own:
        return f"{found}, which has its own forward"
    of_weight = weight_obstacle(linear, (linear.out_features, linear.in_features))
    if of_weight is not None:
        return of_weight
    # Python calls names with two underscores by itself: for one nn.Linear has not, there is a behaviour, too.
    changed = sorted(name for name in own if name in _OF_LINEAR or name.startswith("__"))
    return f"{found}, which has its own {', '.join(changed[:3])}" if changed else None


def check_plain(linear: Any) -> None:
    """A module is a plain linear.

    Raises:
        DtypeError: it is not.
    """
    found = obstacle(linear)
    if found is not None:
        raise DtypeError(
            "linear must be an nn.Linear with a floating-point weight parameter [out_features, in_features]; "
            f"got {found}. Dequantise it, merge its adapter or remove its parametrization "
            "first, or adapt another layer."
        )


def weight_obstacle(module: nn.Module, shape: tuple[int, int]) -> str | None:
    """Why a module's weight is not a plain floating-point parameter of this shape."""
    found = type(module).__name__
    weight: Any = module._parameters.get("weight")
    if is_sharded(module):
        return f"{found} that FSDP has sharded"
    if weight is None:
        return f"{found} without a weight parameter"
    if is_lazy(weight):
        return f"{found} whose weight has no shape yet"
    if weight.dtype not in validation.LAYER_DTYPES or weight.shape != shape:
        return f"{found} with weight {list(weight.shape)} {weight.dtype}"
    return None
