"""What `add_lora` and `load_lora` did, as data and as a table."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from lora_kernels.adapters.tree import lora_places


@dataclass(frozen=True)
class AdaptedModule:
    """One layer with the adapter: parameters = r * (in_features + out_features)."""

    name: str
    in_features: int
    out_features: int
    r: int
    scaling: float
    parameters: int


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter was put on; printed, a table.

    Attributes:
        adapter_name: its name.
        modules: the layers that have it, each once.
        trainable: elements of all parameters of the model that require a gradient now.
        base: elements of all parameters that belong to no adapter.
        unmatched: those of several target_modules that matched nothing.

    Example:
        >>> import torch
        >>> from lora_kernels import add_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False))
        >>> print(add_lora(model, r=8, target_modules=["0"]))
        adapter 'default': 8,192 trainable parameters, 3.125 % of the base model's 262,144
        modules     in    out    r  scaling  parameters
        1 x *      512    512    8        1       8,192
    """

    adapter_name: str
    modules: tuple[AdaptedModule, ...]
    trainable: int
    base: int
    unmatched: tuple[str, ...] = ()

    @property
    def percent(self) -> float:
        """Trainable elements in percent of the base model's; 0 where that has none."""
        return 100 * self.trainable / self.base if self.base else 0.0

    def __str__(self) -> str:
        # Layers of a stack differ in their index alone: one row for all that are the same.
        kinds = Counter(
            (re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", m.name), m.in_features, m.out_features, m.r, m.scaling)
            for m in self.modules
        )
        names = [f"{count} x {name or '(the model)'}" for (name, *_), count in kinds.items()]
        width = max(map(len, ("modules", *names)))
        lines = [
            f"adapter {self.adapter_name!r}: {self.trainable:,} trainable parameters, "
            f"{self.percent:.4g} % of the base model's {self.base:,}",
            f"{'modules':{width}} {'in':>6} {'out':>6} {'r':>4} {'scaling':>8} {'parameters':>11}",
        ]
        for label, ((_, k, n, r, scaling), count) in zip(names, kinds.items(), strict=True):
            lines.append(f"{label:{width}} {k:6} {n:6} {r:4} {scaling:8.4g} {count * r * (k + n):11,}")
        if self.unmatched:
            lines.append(f"target_modules that matched nothing: {', '.join(map(repr, self.unmatched))}")
        return "\n".join(lines)


def report_on(model: nn.Module, adapter_name: str, unmatched: tuple[str, ...] = ()) -> AdapterReport:
    """The report on an adapter of a model."""
    modules, others = [], set()
    for place, layer in lora_places(model):
        others |= {id(parameter) for pair in map(layer.parameters_of, layer.adapters) for parameter in pair}
        if layer.merged:
            others.add(id(layer.weight))  # the sum; the base's own weight is counted
        if adapter_name in layer.adapters:
            settings, (lora_A, lora_B) = layer.settings_of(adapter_name), layer.parameters_of(adapter_name)
            modules.append(
                AdaptedModule(
                    place.name,
                    layer.in_features,
                    layer.out_features,
                    settings.r,
                    float(settings.scaling),
                    lora_A.numel() + lora_B.numel(),
                )
            )
    parameters = list(model.parameters())
    return AdapterReport(
        adapter_name,
        tuple(modules),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        base=sum(p.numel() for p in parameters if id(p) not in others),
        unmatched=unmatched,
    )
