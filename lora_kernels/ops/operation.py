"""`Operation`: what one declaration of an operation's operands makes of it.

Every operation here is y = base(x) + scaling (drop(x) A^T) B^T over a base of its own. It declares its operands, what
its backward reads for which gradient, how it is planned, and a module for each backend; from that come two registered
ops, opaque to torch.compile, export and CUDA graphs:

    <name>_forward(operands, seed, scaling, dropout_p, backend) -> (y [*, N], xa [*, R])
    <name>_backward(dy, operands that it reads, xa, seed, scaling, dropout_p, dtypes, needs, backend) -> gradients

with their schemas, fakes and the path of empty inputs, and the autograd node around them (`ops.node`). The ops trust
their inputs, which the functions above have validated. They flatten [*, columns] to [M, columns] and plan from the real
sizes, so a compiled graph with a dynamic M does not specialise on it. Gradients that are not needed come back as empty
tensors: a schema has no optional returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from lora_kernels import config
from lora_kernels.errors import UnsupportedError
from lora_kernels.ops._registry import LIBRARY, flat, multiplies_in_tf32, plain, shaped
from lora_kernels.planning import Backend, Problem, Way
from lora_kernels.planning.device import device_traits, gluon_available
from lora_kernels.planning.measured import row_bucket

ADAPTERS = ("lora_A", "lora_B")
"""Handed to every backward, whose gradients have their sizes: lora_A [R, K], lora_B [N, R]."""
CALL = ("Tensor? seed", "float scaling", "float dropout_p", "str backend")
"""What a call has besides operands, none of which has a gradient."""
SAVED_FOR = {"xa": {"lora_B"}, "seed": {"x", "lora_A"}}
"""The gradients that read what the forward made, or was given besides operands."""


@dataclass(frozen=True)
class Operand:
    """One tensor that an operation takes.

    Attributes:
        name: as the function's argument.
        shape: a letter a dimension: M, N, K, R; "*" for the leading ones, which the ops flatten to M.
        optional: whether it may be None.
        saved_for: the gradients whose computation reads it; it is saved where one of them is needed.
        gradient: the dtype of its gradient in the backward op. "out": dy's. "adapters": lora_A's. "own": the operand's,
            which the op is told. "widest": of dy's and the adapters'; the node rounds to the operand's.
    """

    name: str
    shape: str
    optional: bool = False
    saved_for: tuple[str, ...] = ()
    gradient: Literal["out", "adapters", "own", "widest"] = "out"

    @property
    def spread(self) -> bool:
        """Whether it has the leading dimensions."""
        return self.shape[0] == "*"


DY, NONE = -2, -1


class Flow(NamedTuple):
    """What a node does for one set of operands that require a gradient.

    needs: as the backward op takes them. saved: what stands there of (*the forward's arguments, xa, None). rounded:
    (gradient, operand) for gradients that are rounded to their operand's dtype. returned: what stands there of
    (*gradients, dy, None), for each of the forward's arguments.
    """

    needs: tuple[bool, ...]
    saved: tuple[int, ...]
    rounded: tuple[tuple[int, int], ...]
    returned: tuple[int, ...]


class Plan(Protocol):
    """What an operation's plan says of itself."""

    @property
    def backend(self) -> Backend:
        """Of the forward."""

    @property
    def backward_way(self) -> Way:
        """Backend and strategy of the backward."""


class Implementation(Protocol):
    """A backend of an operation; what the two take and return, `Operation` says."""

    @property
    def forward(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """y and xa."""

    @property
    def backward(self) -> Callable[..., tuple[Tensor | None, ...]]:
        """The gradients."""


class Operation:
    """One operation by its declaration.

    Args:
        name: the stem of its ops and of its files.
        operands: in the order of its function's arguments; `lora_A` and `lora_B` are among them.
        out: the operand whose dtype y has; y is [*, N].
        needs: a NamedTuple of bools whose fields are the operands that the backward op makes gradients of.
        passes_dy: operands whose gradient is dy itself, none of them in `needs`.
        plan: plan(problem, out_dtype, backend, device), cached here by its arguments.
        backends: for each, what imports its module, in which are

            forward(*operands, seed, scaling, dropout_p, plan) -> (y [M, N], xa [M, R])
            backward(dy, *saved operands, xa, seed, scaling, dropout_p, *own dtypes, needs, plan) -> gradients

            for M >= 1, gradients in the order of `needs`, None where not needed; what a needed one reads is there.

    Raises:
        ValueError: the declaration contradicts itself.

    Attributes:
        forward, backward: the registered ops.
        plan_for: plan_for(backend, y's dtype, device, *what `problem_of` takes besides) -> plan.
    """

    def __init__(
        self,
        name: str,
        operands: tuple[Operand, ...],
        *,
        out: str,
        needs: type[Any],
        plan: Callable[[Problem, torch.dtype, str, torch.device], Plan],
        backends: Mapping[Backend, Callable[[], Implementation]],
        passes_dy: tuple[str, ...] = (),
    ) -> None:
        self.name, self.operands, self.needs, self.passes_dy = name, operands, needs, passes_dy
        self._plan, self._backends = plan, backends
        self.implementation = cache(self._implementation)
        self.plan_for: Callable[..., Plan] = self._cached_plans()

        place = {operand.name: index for index, operand in enumerate(operands)}
        named = {"x", out, *ADAPTERS, *needs._fields, *passes_dy}.union(*(operand.saved_for for operand in operands))
        if unknown := sorted(named - place.keys()):
            raise ValueError(f"{name} must declare every operand that it names, {list(place)}; got {unknown} besides.")
        for operand in operands:
            # A gradient in another dtype would be cast by PyTorch's engine without a word.
            dtype = "adapters" if operand.name in ADAPTERS else "own" if operand.name == "x" and out != "x" else None
            if operand.name in needs._fields and dtype not in (None, operand.gradient):
                raise ValueError(f"{name}'s gradient of {operand.name} must be {dtype!r}; got {operand.gradient!r}.")
            if operand.name in needs._fields and operand.name in passes_dy:
                raise ValueError(f"{name}'s gradient of {operand.name} must be computed or dy itself; got both.")
        self.gradients = tuple(operands[place[name]] for name in needs._fields)
        self.saved = tuple(operand for operand in operands if operand.saved_for or operand.name in ADAPTERS)
        self.own_dtypes = tuple(place[operand.name] for operand in self.gradients if operand.gradient == "own")
        # Among the operands, which are the forward's first arguments:
        self._x, self._out, self._A, self._B = (place[name] for name in ("x", out, *ADAPTERS))
        self._spread = tuple(place[operand.name] for operand in operands if operand.spread)
        # Among the backward's arguments: dy, what is saved, xa, seed, scaling, dropout_p, own dtypes, needs, backend.
        saved = {operand.name: 1 + index for index, operand in enumerate(self.saved)}
        self._saved_A, self._saved_B = (saved[name] for name in ADAPTERS)
        self._xa = 1 + len(saved)
        self._saved_spread = (0, *(saved[operand.name] for operand in self.saved if operand.spread), self._xa)
        self._spread_gradients = tuple(index for index, operand in enumerate(self.gradients) if operand.spread)
        self._own = {operands[index].name: self._xa + 4 + count for count, index in enumerate(self.own_dtypes)}

        self.flows = {
            (*flags, *(False,) * len(CALL)): self._flow(flags) for flags in product((False, True), repeat=len(operands))
        }
        """By whether each argument requires a gradient."""
        self.forward = self._define("forward", self._forward, self._fake_forward, self._forward_schema())
        self.backward = self._define("backward", self._backward, self._fake_backward, self._backward_schema())

    def _flow(self, required: tuple[bool, ...]) -> Flow:
        place = {operand.name: index for index, operand in enumerate(self.operands)}
        needs = tuple(required[place[operand.name]] for operand in self.gradients)
        needed = {operand.name for operand, need in zip(self.gradients, needs, strict=True) if need}
        seed, xa = len(self.operands), len(self.operands) + len(CALL)
        read_by = {place[o.name]: needed if o.name in ADAPTERS else needed & set(o.saved_for) for o in self.saved}
        read_by |= {xa: needed & SAVED_FOR["xa"], seed: needed & SAVED_FOR["seed"]}
        returned = [NONE] * (len(self.operands) + len(CALL))
        for index, operand in enumerate(self.gradients):
            if needs[index]:
                returned[place[operand.name]] = index
        for name in self.passes_dy:
            if required[place[name]]:
                returned[place[name]] = DY
        return Flow(
            needs=needs,
            saved=tuple(index if readers else NONE for index, readers in read_by.items()) if needed else (),
            rounded=tuple(
                (index, place[operand.name])
                for index, operand in enumerate(self.gradients)
                if needs[index] and operand.gradient == "widest"
            ),
            returned=tuple(returned),
        )

    # -- the registered ops --------------------------------------------------------------------------------------

    def _define(
        self, direction: str, run: Callable[..., object], fake: Callable[..., object], schema: str
    ) -> torch._ops.OpOverload[..., Any]:
        name = f"{self.name}_{direction}"
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lora_kernels::{name}", fake, lib=LIBRARY)
        op: torch._ops.OpOverload[..., Any] = getattr(torch.ops.lora_kernels, name).default
        return op

    def _forward_schema(self) -> str:
        operands = [f"Tensor{'?' if operand.optional else ''} {operand.name}" for operand in self.operands]
        return f"({', '.join([*operands, *CALL])}) -> (Tensor, Tensor)"

    def _backward_schema(self) -> str:
        saved = [f"Tensor{'' if operand.name in ADAPTERS else '?'} {operand.name}" for operand in self.saved]
        dtypes = [f"ScalarType {name}_dtype" for name in self._own]
        *call, backend = CALL
        arguments = ["Tensor dy", *saved, "Tensor? xa", *call, *dtypes, "bool[] needs", backend]
        return f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * len(self.gradients))})"

    def _forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        x: Tensor = args[self._x]
        if x.numel() == 0:
            return self._fake_forward(*args)
        leading = x.shape[:-1]
        if len(leading) != 1:
            flattened = list(args)
            for place in self._spread:
                if args[place] is not None:
                    flattened[place] = flat(args[place])
            args, x = tuple(flattened), flattened[self._x]
        lora_A, lora_B, out_dtype, seed = args[self._A], args[self._B], args[self._out].dtype, args[-4]
        plan = self._planned(x, x.dtype, lora_A, lora_B, out_dtype, seed, args[-1])
        with plain(x):
            y, xa = self.implementation(plan.backend).forward(*args[:-1], plan)
        return (y, xa) if len(leading) == 1 else (shaped(y, leading), shaped(xa, leading))

    def _fake_forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        leading, lora_A, lora_B = args[self._x].shape[:-1], args[self._A], args[self._B]
        return args[self._out].new_empty(*leading, lora_B.shape[0]), lora_A.new_empty(*leading, lora_A.shape[0])

    def _backward(self, *args: Any) -> tuple[Tensor, ...]:
        dy: Tensor = args[0]
        if dy.numel() == 0:
            return tuple(gradient.zero_() for gradient in self._fake_backward(*args))
        leading, needs = dy.shape[:-1], args[-2]
        if len(leading) != 1:
            flattened = list(args)
            for place in self._saved_spread:
                if args[place] is not None:
                    flattened[place] = flat(args[place])
            args, dy = tuple(flattened), flattened[0]
        lora_A, lora_B, seed = args[self._saved_A], args[self._saved_B], args[self._xa + 1]
        x_dtype = args[self._own["x"]] if "x" in self._own else dy.dtype
        plan = self._planned(dy, x_dtype, lora_A, lora_B, dy.dtype, seed, args[-1])
        with plain(dy):
            found = self.implementation(plan.backward_way.backend).backward(*args[:-2], self.needs(*needs), plan)
        gradients: list[Any] = list(found)
        for index, operand in enumerate(self.gradients):
            if gradients[index] is None:
                dtype = None if operand.gradient == "out" else self._dtype_of(operand, args)
                gradients[index] = dy.new_empty(0, dtype=dtype)
        if len(leading) != 1:
            for index in self._spread_gradients:
                gradients[index] = shaped(gradients[index], leading) if needs[index] else gradients[index]
        return tuple(gradients)

    def _fake_backward(self, *args: Any) -> tuple[Tensor, ...]:
        dy, needs = args[0], args[-2]
        r, k = args[self._saved_A].shape
        sizes = {"*": dy.shape[:-1], "N": dy.shape[-1:], "K": (k,), "R": (r,)}
        gradients = []
        for operand, needed in zip(self.gradients, needs, strict=True):
            shape = [size for letter in operand.shape for size in sizes[letter]] if needed else 0
            gradients.append(dy.new_empty(shape, dtype=self._dtype_of(operand, args)))
        return tuple(gradients)

    def _dtype_of(self, operand: Operand, args: Sequence[Any]) -> torch.dtype:
        """Of an operand's gradient, in a call of the backward op."""
        if operand.gradient == "own":
            return cast(torch.dtype, args[self._own[operand.name]])
        of = args[self._saved_A if operand.gradient == "adapters" else 0].dtype
        return torch.promote_types(of, args[self._saved_A].dtype) if operand.gradient == "widest" else of

    # -- plans and backends --------------------------------------------------------------------------------------

    def _planned(
        self,
        t: Tensor,
        x_dtype: torch.dtype,
        lora_A: Tensor,
        lora_B: Tensor,
        out_dtype: torch.dtype,
        seed: Tensor | None,
        backend: str,
    ) -> Plan:
        (r, k), n = lora_A.shape, lora_B.shape[0]
        m, device, tf32 = row_bucket(t.shape[0]), t.device, multiplies_in_tf32(t.device)
        return self.plan_for(backend, out_dtype, device, m, n, k, r, x_dtype, lora_A.dtype, seed is not None, tf32)

    def _cached_plans(self) -> Callable[..., Plan]:
        # A training step asks for the same few plans over and over.
        @lru_cache(maxsize=4096)
        def plan_for(backend: str, out_dtype: torch.dtype, device: torch.device, *problem: Any) -> Plan:
            return self._plan(problem_of(*problem, device=device), out_dtype, backend, device)

        return plan_for

    def forget_plans(self) -> None:
        """Make every plan anew, with what has been measured meanwhile."""
        self.plan_for = self._cached_plans()

    def _implementation(self, backend: Backend) -> Implementation:
        """The module that serves one direction of a plan: for the ops, and for checks that force a strategy."""
        if backend not in self._backends:
            raise UnsupportedError(
                f"the registered op serves {' and '.join(map(repr, sorted(self._backends)))}; got {backend!r}. "
                f"Call lora_{self.name} instead."
            )
        return self._backends[backend]()


def problem_of(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    tf32: bool | None = None,
    *,
    device: torch.device,
) -> Problem:
    """The planner's view of one call on `device`; tf32 None: as torch multiplies fp32 there at this moment."""
    traits = device_traits(device.type, device.index)
    return Problem(
        m, n, k, r, dtype, adapter_dtype, dropout,
        arch=traits.arch,
        device_type=device.type,
        sm_count=traits.sm_count,
        tf32=multiplies_in_tf32(device) if tf32 is None else tf32,
        interpreted=config.INTERPRETED,
        gluon=gluon_available() and not config.INTERPRETED,
        device=traits.name if device.type == "cuda" else "",
    )  # fmt: skip
