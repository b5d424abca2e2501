"""Small models for the tests of whole-model adapters, and what must not change when an operation on one fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import LoRALinear


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.q_proj(x)) * self.v_proj(x)


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.attn, self.up = Attention(width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.norm(x + self.attn(x)))


class Stack(nn.Module):
    """Two blocks and a head: the smallest model with indices, nesting and a name that is used once."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width) for _ in range(2)])
        self.head = nn.Linear(width, 9)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a failed operation must leave alone: which objects, of which class, in which mode, with which values."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state[name] = (id(module), type(module), module.training, sorted(vars(module)), list(module._modules))
        if isinstance(module, LoRALinear):
            state[f"{name}()"] = (module.active_adapter, module.adapters, module.merged, repr(module))
    for name, p in model.named_parameters(remove_duplicate=False):
        here = p.to_local() if hasattr(p, "to_local") else p  # what this rank holds of a DTensor
        values = None if p.is_meta else here.detach().to(torch.float64).tolist()
        state[f"{name}="] = (id(p), p.dtype, p.device, p.requires_grad, values)
    return state
