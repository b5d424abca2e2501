"""`patch_peft`: the layers of a model that PEFT has made keep their parameters and get our computation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

from torch import nn

from lora_kernels.errors import ArgumentError, UnsupportedError


class PatchRow(NamedTuple):
    """One LoRA layer of the model, as it stood when it was patched.

    Attributes:
        name: the module's name in the model.
        layer: the name of its class in PEFT.
        operation: "lora_linear" or "lora_branch"; None where PEFT's own forward runs.
        reason: why it is not lora_linear; "" where it is.
    """

    name: str
    layer: str
    operation: str | None
    reason: str


@dataclass(frozen=True, repr=False)
class PatchReport:
    """What `patch_peft` found: a table when printed, data by `rows` or `as_dicts()`; as a context, it unpatches.

    It tells how things stood at the time: each call of a layer decides anew.

    Attributes:
        rows: one PatchRow for each LoRA layer of the model.
    """

    rows: tuple[PatchRow, ...]
    _patched: tuple[weakref.ref[nn.Module], ...] = field(default=(), compare=False)

    def as_dicts(self) -> list[dict[str, str | None]]:
        """The rows as dictionaries, for json or a data frame."""
        return [row._asdict() for row in self.rows]

    @property
    def fused(self) -> int:
        """The number of layers whose next call is a fused one."""
        return sum(row.operation is not None for row in self.rows)

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unpatches what this call of `patch_peft` patched, and nothing that was patched before it."""
        for reference in self._patched:
            if (module := reference()) is not None:
                _unpatch(module)

    def __repr__(self) -> str:
        table = [("layer", "class", "computed by", "because")]
        table += [(row.name, row.layer, row.operation or "PEFT", row.reason) for row in self.rows]
        by = Counter(row.operation for row in self.rows if row.operation is not None)
        counts = ", ".join(f"{count} by {operation}" for operation, count in sorted(by.items()))
        total = f"{self.fused} of {len(self.rows)} LoRA layers are fused" + (f": {counts}" if counts else "")
        return "\n".join([*_aligned(table), total])


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def patch_peft(model: nn.Module) -> PatchReport:
    """Gives the LoRA layers of a PEFT model our computation, in place: y = x W^T + b + scaling * (drop(x) A^T) B^T.

    Only the class of each layer changes, to a subclass of its own with the same name. Parameters, state_dict keys,
    saving and loading, merging, adding and switching adapters remain PEFT's. Each call of a layer decides whether
    `lora_linear` can serve it, or PEFT's forward has to run: docs/interop/peft.md has the table. Patching again is a
    no-op, and takes in layers that were adapted meanwhile.

    Args:
        model: any module with LoRA layers of PEFT's in it: a PeftModel, a Transformers or Diffusers model after
            `add_adapter`, a single layer.

    Returns:
        A PatchReport: one row for each LoRA layer, fused or the reason why not. It assumes inputs in the weight's
        dtype, and the autocast that is on where patch_peft is called. As a context manager it unpatches at the end what
        this call has patched.

    Raises:
        ArgumentError: model is no module, or has no LoRA layers.
        UnsupportedError: PEFT is not installed, or too old.

    Numerics:
        As `lora_linear`: fewer roundings than PEFT's chain, so results differ from it in the last bits. Dropout masks
        are others than nn.Dropout's for the same seed of torch's generator.

    Saved for backward:
        For each layer x as it came and M * R elements of the adapter's dtype; no fp32 copy of x, no mask.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from lora_kernels import patch_peft
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2"]))
        >>> patch_peft(model)
        layer               class   computed by  because
        base_model.model.0  Linear  lora_linear
        base_model.model.2  Linear  lora_linear
        2 of 2 LoRA layers are fused: 2 by lora_linear
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module; got {type(model).__name__}. Pass the model itself.")
    try:
        from lora_kernels.interop import _peft_layers
    except ImportError as error:
        raise UnsupportedError(
            f"patch_peft needs the layers of PEFT 0.21 or later, which cannot be imported here: {error}. "
            "pip install 'peft>=0.21'"
        ) from error

    rows: list[PatchRow] = []
    patched: list[weakref.ref[nn.Module]] = []
    for name, module, within in _peft_layers.lora_layers(model):
        if (fused := _fused_class(type(module))) is not None:
            module.__class__ = fused
            patched.append(weakref.ref(module))
        rows.append(PatchRow(name, type(module).__name__, *_peft_layers.outlook(module, within)))
    if not rows:
        raise ArgumentError(
            f"model must have LoRA layers of PEFT's; found none in {type(model).__name__}. Call get_peft_model or "
            "model.add_adapter first, patch_peft afterwards."
        )
    return PatchReport(tuple(rows), tuple(patched))


def _fused_class(stock: type) -> type | None:
    """Our class for one of PEFT's; None for every other."""
    if stock.__module__ == "peft.tuners.lora.bnb":  # importing it imports bitsandbytes
        from lora_kernels.interop._peft_bnb_layers import FUSED
    else:
        from lora_kernels.interop._peft_layers import FUSED
    return FUSED.get(stock)


def unpatch_peft(model: nn.Module) -> None:
    """Gives every layer that `patch_peft` changed its own class back; on a model without one, a no-op.

    Args:
        model: any module.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from lora_kernels import patch_peft, unpatch_peft
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
        >>> report = patch_peft(model)
        >>> unpatch_peft(model)
    """
    for module in model.modules():
        _unpatch(module)


def _unpatch(module: nn.Module) -> None:
    stock: Any = getattr(type(module), "_stock_class", None)
    if stock is not None:
        module.__class__ = stock
