"""What the tests of patch_peft share: small adapted models, one run of them, and stock PEFT with our masks."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import patch_peft, validation
from lora_kernels.interop import _peft_layers
from lora_kernels.reference.philox import dropout_scale, keep_mask

K, HIDDEN, N, R = 96, 80, 72, 8


class Net(nn.Module):
    """Two bases with a nonlinearity between them, so that the second one's dx matters."""

    def __init__(self, kind: str = "linear", bias: bool = True) -> None:
        super().__init__()
        if kind == "conv1d":
            self.up, self.down = Conv1D(HIDDEN, K), Conv1D(N, HIDDEN)
            for layer in (self.up, self.down):
                nn.init.normal_(layer.weight, std=layer.nx**-0.5)
                nn.init.normal_(layer.bias)
        else:
            self.up, self.down = nn.Linear(K, HIDDEN, bias=bias), nn.Linear(HIDDEN, N, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(
    dtype: torch.dtype = torch.float32, *, kind: str = "linear", bias: bool = True, seed: int = 0,
    autocast_adapter_dtype: bool = True, **config: Any,
) -> Any:  # fmt: skip
    """A PeftModel over Net whose B is not zero, in training mode."""
    torch.manual_seed(seed)
    defaults = {"r": R, "lora_alpha": 16, "target_modules": ["up", "down"], "init_lora_weights": False}
    config = LoraConfig(**{**defaults, "fan_in_fan_out": kind == "conv1d", **config})
    model = get_peft_model(Net(kind, bias).to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    return model.train()


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _peft_layers.lora.LoraLayer)]


class SeededDropout(nn.Module):
    """nn.Dropout with the mask that a patched layer applies from the same state of torch's generator."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        seed = validation.seed_tensor(None, None, x.device)
        keep = keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], self.p).view(x.shape)
        return torch.where(keep, x, 0) * dropout_scale(self.p)


def stock_twin(model: nn.Module) -> Any:
    """A copy that PEFT computes, with our masks."""
    twin = copy.deepcopy(model)
    for layer in layers_of(twin):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = SeededDropout(dropout.p).train(dropout.training)
    return twin


def patched_twin(model: nn.Module) -> Any:
    """A copy that is patched."""
    twin = copy.deepcopy(model)
    patch_peft(twin)
    return twin


@dataclass
class Calls:
    """What the fused path served."""

    operations: list[str] = field(default_factory=list)


@contextmanager
def fused_calls() -> Iterator[Calls]:
    """Counts the calls that do not run PEFT's forward."""
    calls, original = Calls(), _peft_layers.FusedLayer._fused_forward

    def counted(self: Any, x: Tensor, adapter: str, operation: str) -> Tensor:
        calls.operations.append(operation)
        return original(self, x, adapter, operation)

    with mock.patch.object(_peft_layers.FusedLayer, "_fused_forward", counted):
        yield calls


def run(model: nn.Module, x: Tensor, *, autocast: torch.dtype | None = None, seed: int = 7) -> dict[str, Tensor]:
    """y, and the gradient of x and of each parameter that takes one."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    model.zero_grad()
    torch.manual_seed(seed)
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        y = model(x)
    if y.requires_grad:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "d_x": x.grad}
    found |= {f"d_{name}": parameter.grad for name, parameter in model.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def inputs(dtype: torch.dtype, *leading: int, features: int = K, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = leading or (4, 37)
    return torch.randn(*shape, features, generator=generator, dtype=torch.float64).to(dtype)


def assert_within_budget(
    model: nn.Module,
    x: Tensor,
    *,
    autocast: torch.dtype | None = None,
    forward: Callable[[nn.Module], nn.Module] = lambda model: model,
    operations: tuple[str, ...] = ("lora_linear", "lora_linear"),
) -> None:
    """The patched model's y and gradients err at most twice as much as stock PEFT's, against stock PEFT in fp64."""
    from lora_kernels.testing import budget_rows

    with fused_calls() as calls:
        actual = run(forward(patched_twin(model)), x, autocast=autocast)
    assert tuple(calls.operations) == operations
    eager = run(stock_twin(model), x, autocast=autocast)
    truth = run(stock_twin(model).double(), x.double())
    assert set(actual) == set(eager) == set(truth)
    if x.dtype == torch.float64:
        for name, value in actual.items():
            torch.testing.assert_close(value, truth[name], rtol=1e-12, atol=1e-12)
        return
    failed = [row for row in budget_rows(actual, eager, truth) if not row.ok]
    table = "\n".join(f"{row.name}: {row.error:.2e} > {row.limit:.2e}" for row in failed)
    assert not failed, table
    assert not any(math.isnan(row.error) for row in budget_rows(actual, eager, truth))
