"""One call of a patched layer, held against PEFT's own forward of the same layer: y and every gradient, in fp64.

A call is recorded as it happens (copies of the layer and of x, the state of torch's generator) and judged later, when
the test that made it is over: nothing that the judging does can reach the test. Judging runs three copies of the layer:

- PEFT's forward, in the call's dtypes and autocast, with the mask that lora_kernels.reference makes of the call's seed
  in the place of nn.Dropout: eager;
- the same in fp64: the truth;
- the patched forward from the same generator state, once with the gradients that the call itself could be asked for,
  once with those of x, of the adapter and of every bias.

The call's own y and all that the patched forward returns must be within the project's error budget: at most twice
eager's error. On tensors of a few elements a norm of errors is a matter of luck, so a small call that misses the budget
is repeated with other inputs, and the errors are judged together. That leaves calls on which eager happens to be exact,
because an adapter holds 16-bit numbers or its columns cancel. There an fp32 tensor may also be within the bound that
rounding has in the worst case, which is wider; such calls are counted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import validation
from lora_kernels.interop._peft_layers import LINEAR
from lora_kernels.reference.linear import drop
from lora_kernels.testing import BudgetRow, budget_rows

ROUNDINGS = 100  # independent ones: the norm of so many errors varies by 7 %
MOST_PROBLEMS = 50

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """What a fused call was given and what it returned.

    Attributes:
        layer: a copy of the patched layer, as it was.
        adapter: name of the adapter that was applied.
        operation: the fused operation.
        x: [*, K], a copy.
        needs: names of the tensors that required a gradient; none without grad mode.
        autocast: the dtype of autocast, or None.
        generator: state of torch's CPU generator before the call, from which its dropout seed is drawn.
        y: [*, N], a copy.
    """

    layer: Any
    adapter: str
    operation: str
    x: Tensor
    needs: frozenset[str]
    autocast: torch.dtype | None
    generator: Tensor
    y: Tensor

    @property
    def kind(self) -> tuple[str, ...]:
        """(operation, base, dtypes, what else was on), for the summary."""
        lora_A, lora_B = self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter]
        x, adapter = dtype_name(self.x.dtype), dtype_name(lora_A.dtype)
        extras = [
            *(["dropout"] if self.dropout_p else []),
            *(["lora_bias"] if lora_B.bias is not None else []),
            *([f"autocast {dtype_name(self.autocast)}"] if self.autocast else []),
        ]
        dtypes = x if x == adapter else f"{x}, adapter {adapter}"
        return self.operation, type(self.layer.base_layer).__name__, dtypes, ", ".join(extras)

    @property
    def dropout_p(self) -> float:
        """The probability that was really applied: 0 outside training."""
        dropout = self.layer.lora_dropout[self.adapter]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def begin(layer: Any, adapter: str, operation: str, x: Tensor) -> Call:
    """The call as it is about to happen; its y is not known yet."""
    needs = {name for name, t in tensors_of(layer, adapter, x).items() if t.requires_grad and torch.is_grad_enabled()}
    # Inside inference mode the copies could never require a gradient. Switching it off switches grad mode on.
    with torch.inference_mode(False), torch.no_grad():
        return Call(
            layer=copy_of(layer),
            adapter=adapter,
            operation=operation,
            x=x.detach().clone(),
            needs=frozenset(needs),
            autocast=autocast_dtype(x.device.type),
            generator=torch.get_rng_state(),
            y=x,
        )


def copy_of(layer: Any) -> Any:
    """A copy that shares nothing with the layer and has no part in any graph.

    Where FSDP has put views of its flat parameter in the place of a layer's parameters, the copy has parameters again.
    """
    views = (t for m in layer.modules() for t in (*m._parameters.values(), *vars(m).values()))
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.detach().clone(), requires_grad=False)
        for t in views
        if isinstance(t, Tensor) and not t.is_leaf
    }
    copied = copy.deepcopy(layer, memo)
    for module in copied.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, nn.Parameter):
                del vars(module)[name]
                module._parameters[name] = value
    return copied


def tensors_of(layer: Any, adapter: str, x: Tensor) -> Results:
    """Everything that the call's output depends on, and so may want a gradient, by name."""
    base, lora_A, lora_B = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    base = base.base if isinstance(base, GivenBase) else base
    named = {
        "x": x,
        "lora_A": lora_A.weight,
        "lora_B": lora_B.weight,
        "lora_bias": lora_B.bias,
        "weight": getattr(base, "weight", None),
        "bias": getattr(base, "bias", None),
    }
    return {name: t for name, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()}


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to at this moment; None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


class SeededDropout(nn.Module):
    """nn.Dropout with the mask of lora_kernels.reference: the tokens are x's rows after flattening."""

    def __init__(self, p: float, seed: Tensor) -> None:
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x: Tensor) -> Tensor:
        return drop(x.reshape(-1, x.shape[-1]), self.p, self.seed).reshape(x.shape)


class GivenBase(nn.Module):
    """A base layer of any kind, quantised perhaps, in an fp64 chain: its output and its gradient are given facts."""

    def __init__(self, base: nn.Module, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.base, self.dtype, self.autocast = base, dtype, autocast

    def forward(self, x: Tensor) -> Tensor:
        with _autocast(self.autocast):
            return self.base(x.to(self.dtype)).double()


@contextmanager
def generator_state(state: Tensor) -> Iterator[None]:
    """torch's CPU generator in `state`, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        yield


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False) if dtype is None else torch.autocast("cpu", dtype)


def run(
    forward: Callable[[Tensor], Tensor], layer: Any, adapter: str, x: Tensor, dy: Tensor, needs: Iterable[str]
) -> Results:
    """y of a copied layer as `forward` computes it, and d_<name> for the tensors in needs."""
    leaves = tensors_of(layer, adapter, x.detach())
    needs = [name for name in leaves if name in set(needs)]
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    for name in needs:
        leaves[name].requires_grad_(True)
    with torch.set_grad_enabled(bool(needs)):
        y = forward(leaves["x"])
    gradients = torch.autograd.grad(y, [leaves[name] for name in needs], dy) if needs else ()
    return {"y": y.detach()} | {f"d_{name}": g for name, g in zip(needs, gradients, strict=True)}


@dataclass
class Problem:
    """A call's layer with one input: the call's own, or another of the same kind."""

    call: Call
    x: Tensor
    dy: Tensor
    generator: Tensor
    y: Tensor | None = None

    def fused(self, needs: Iterable[str]) -> Results:
        """The patched forward, from the call's generator state."""
        layer, adapter, operation = self.call.layer, self.call.adapter, self.call.operation

        def forward(x: Tensor) -> Tensor:  # past the rules that choose: they must not choose PEFT's here
            return layer._fused_forward(x, adapter, operation)

        with generator_state(self.generator), _autocast(self.call.autocast):
            return run(forward, layer, adapter, self.x, self.dy, needs)

    def stock(self, *, double: bool = False, absolute: bool = False) -> Results:
        """PEFT's forward with the call's mask; in fp64 the truth, over absolute values what bounds its rounding."""
        call, x, dy = self.call, self.x, self.dy
        layer = copy_of(call.layer)
        layer.__class__ = layer._stock_class
        if call.dropout_p:
            with generator_state(self.generator):
                seed = validation.seed_tensor(None, None, x.device)
            layer.lora_dropout[call.adapter] = SeededDropout(call.dropout_p, seed)
        if double:
            base = layer.base_layer
            if call.operation != LINEAR:
                layer.base_layer = nn.Identity()
            layer.double()
            if call.operation != LINEAR:
                layer.base_layer = GivenBase(base, x.dtype, call.autocast)
            x, dy = x.double(), dy.double()
        if absolute:
            x, dy = x.abs(), dy.abs()
            layer.scaling[call.adapter] = abs(layer.scaling[call.adapter])
            for parameter in layer.parameters():
                parameter.data.abs_()
        with _autocast(None if double else call.autocast):
            return run(layer, layer, call.adapter, x, dy, tensors_of(layer, call.adapter, x))

    def results(self) -> list[Results]:
        """What is to be judged: y of the call and the gradients it could be asked for; the same with all of them."""
        call = self.call
        asked = self.fused(call.needs) if call.needs or self.y is None else {}
        if self.y is not None:
            asked["y"] = self.y
        everything = set(tensors_of(call.layer, call.adapter, self.x)) - {"weight"}
        return [asked, *([] if everything <= call.needs else [self.fused(everything)])]


class Verdict(NamedTuple):
    """What became of a call.

    Attributes:
        rows: one for y and one for each gradient, of both replays: its error and its limit.
        by_bound: whether a row is within the bound of rounding, and not within the budget.
    """

    rows: list[BudgetRow]
    by_bound: bool = False

    @property
    def beyond(self) -> list[BudgetRow]:
        """The rows that are not within their limits."""
        return [row for row in self.rows if not row.ok]


def judge(call: Call) -> Verdict:
    """The call's errors beside eager's, after repetition where it is small."""
    problem = Problem(call, call.x, _dy(call.y, 0), call.generator, call.y)
    if call.x.dtype == torch.float64:
        return Verdict(_bound_rows(problem, torch.float64))
    rows = _rows([problem])
    if all(row.ok for row in rows):
        return Verdict(rows)
    rows = _rows([problem, *_others(call)])
    if all(row.ok for row in rows):
        return Verdict(rows)
    bound = _bound_rows(problem, torch.float32)
    chances = [bounded if not row.ok and bounded.ok else row for row, bounded in zip(rows, bound, strict=True)]
    return Verdict(chances, by_bound=chances != rows)


def _dy(y: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def _others(call: Call) -> Iterator[Problem]:
    """As many inputs more as make ROUNDINGS roundings in the smallest tensor, normal, of x's root mean square."""
    (r, k), n = call.layer.lora_A[call.adapter].weight.shape, call.y.shape[-1]
    m = call.x.numel() // k
    fewest = max(1, min(m * n, m * k, m * r, r * k, n * r, n))
    scale = call.x.double().square().mean().sqrt()
    for seed in range(1, min(MOST_PROBLEMS, math.ceil(ROUNDINGS / (fewest * (1 - call.dropout_p))))):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(call.x.shape, generator=generator, dtype=torch.float64) * scale
        yield Problem(call, x.to(call.x.dtype), _dy(call.y, seed), generator.get_state())


def _rows(problems: Sequence[Problem]) -> list[BudgetRow]:
    """The problems' tensors of one name are judged as one."""
    ours = [problem.results() for problem in problems]
    eager = _joined([problem.stock() for problem in problems])
    truth = _joined([problem.stock(double=True) for problem in problems])
    rows = []
    for variant in zip(*ours, strict=True):
        actual = _joined(variant)
        rows += budget_rows(actual, eager, {name: truth[name] for name in actual})
    return rows


def _joined(sides: Sequence[Mapping[str, Tensor]]) -> Results:
    return {name: torch.cat([side[name].reshape(-1) for side in sides]) for name in sides[0]}


def _bound_rows(problem: Problem, dtype: torch.dtype) -> list[BudgetRow]:
    """The largest element of each error, over the same chain of sums over absolute values, beside the textbook's bound.

    A chain with n roundings of u errs by at most n u times that (Higham, "Accuracy and Stability of Numerical
    Algorithms", section 3.1). For what is fp64, where there is no better truth: against PEFT's own result, whose error
    is bounded likewise. Tensors of other dtypes than `dtype` are beyond any bound.
    """
    layer, adapter = problem.call.layer, problem.call.adapter
    r, k = layer.lora_A[adapter].weight.shape
    n, m = problem.dy.shape[-1], problem.x.numel() // k
    expected, majorant = problem.stock(double=True), problem.stock(double=True, absolute=True)
    chains = 2 if dtype == torch.float64 else 1
    limit = chains * (m + n + k + r + 8) * torch.finfo(dtype).eps / 2
    rows = []
    for results in problem.results():
        for name, actual in results.items():
            difference = (actual - expected[name]).abs()
            alike = (difference == 0) | (actual.isnan() & expected[name].isnan())
            excess = torch.where(alike, 0.0, difference / majorant[name]).nan_to_num(nan=math.inf, posinf=math.inf)
            error = excess.max().item() if excess.numel() else 0.0
            rows.append(BudgetRow(name, error if actual.dtype == dtype else math.inf, 0.0, limit))
    return rows
