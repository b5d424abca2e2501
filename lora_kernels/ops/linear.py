"""`lora_kernels::linear_forward` and `lora_kernels::linear_backward`: opaque to torch.compile, export and CUDA graphs.

They take inputs that the caller has validated: x [*, K], dy and y [*, N], xa [*, R]. The implementation flattens them
to [M, ...] and makes the plan from the real sizes, so a compiled graph with a dynamic M does not specialise on it.
Gradients that are not needed come back as empty tensors: a schema has no optional returns. The bias's comes in the
wider of the two dtypes that a bias may have, dy's and the adapters'.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Protocol

import torch
from torch import Tensor

from lora_kernels import config
from lora_kernels.errors import UnsupportedError
from lora_kernels.ops import _linear_torch
from lora_kernels.ops._needs import Needs
from lora_kernels.ops._registry import LIBRARY, flat, multiplies_in_tf32, plain, shaped
from lora_kernels.planning import Backend, Plan, Problem, make_plan
from lora_kernels.planning.device import device_traits, gluon_available, triton_available
from lora_kernels.planning.measured import row_bucket, table_of

LIBRARY.define(
    "linear_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, float scaling, "
    "float dropout_p, str backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? xa, Tensor? seed, "
    "float scaling, float dropout_p, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def problem_of(
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    device: torch.device,
    tf32: bool | None = None,
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


def _plan(t: Tensor, n: int, lora_A: Tensor, seed: Tensor | None, backend: str) -> Plan:
    r, k = lora_A.shape
    m, device, tf32 = row_bucket(t.shape[0]), t.device, multiplies_in_tf32(t.device)
    return _plan_for(backend, m, n, k, r, t.dtype, lora_A.dtype, seed is not None, device, tf32)


@lru_cache(maxsize=4096)
def _plan_for(
    backend: str,
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    device: torch.device,
    tf32: bool,
) -> Plan:
    # A training step asks for the same few plans over and over.
    problem = problem_of(
        m, n, k, r, dtype=dtype, adapter_dtype=adapter_dtype, dropout=dropout, device=device, tf32=tf32
    )
    return plan_of(problem, backend, device)


def plan_of(problem: Problem, backend: str, device: torch.device) -> Plan:
    """The plan for a problem on a device that is here, with what has been measured on it."""
    measured = table_of(device_traits(device.type, device.index).name)
    return make_plan(problem, backend, triton_available=triton_available(), measured=measured)


def forget_plans() -> None:
    """Make every plan anew, with what has been measured meanwhile."""
    _plan_for.cache_clear()


class LinearImplementation(Protocol):
    """What a backend's module offers: both directions, under a plan that names it."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        """(y [M, N], xa [M, R]) for x [M, K], M >= 1."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        xa: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        needs: Needs,
        plan: Plan,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, lora_A, lora_B, bias; None where not needed."""


@cache
def linear_implementation(backend: Backend) -> LinearImplementation:
    """The module that serves one direction of a plan: for the ops below, and for checks that force a strategy."""
    if backend == "triton":
        from lora_kernels.ops import _linear_triton

        return _linear_triton
    if backend == "torch":
        return _linear_torch
    raise UnsupportedError(f"the registered op serves 'torch' and 'triton'; got {backend!r}. Call lora_linear instead.")


@torch.library.impl(LIBRARY, "linear_forward", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0]), lora_A.new_empty(*x.shape[:-1], lora_A.shape[0])
    leading = x.shape[:-1]
    x = flat(x)
    plan = _plan(x, weight.shape[0], lora_A, seed, backend)
    with plain(x):
        y, xa = linear_implementation(plan.backend).forward(
            x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, plan
        )
    return shaped(y, leading), shaped(xa, leading)


@torch.library.register_fake("lora_kernels::linear_forward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    leading = x.shape[:-1]
    return x.new_empty(*leading, weight.shape[0]), lora_A.new_empty(*leading, lora_A.shape[0])


@torch.library.impl(LIBRARY, "linear_backward", "CompositeExplicitAutograd")
def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    if dy.numel() == 0:
        empty = _fake_backward(dy, x, weight, lora_A, lora_B, xa, seed, scaling, dropout_p, needs, backend)
        return tuple(gradient.zero_() for gradient in empty)
    leading = dy.shape[:-1]
    dy = flat(dy)
    x, xa = None if x is None else flat(x), None if xa is None else flat(xa)
    plan = _plan(dy, dy.shape[1], lora_A, seed, backend)
    with plain(dy):
        dx, d_weight, d_lora_A, d_lora_B, d_bias = linear_implementation(plan.backward_way.backend).backward(
            dy, x, weight, lora_A, lora_B, xa, seed, scaling, dropout_p, Needs(*needs), plan
        )
    return (
        dy.new_empty(0) if dx is None else shaped(dx, leading),
        dy.new_empty(0) if d_weight is None else d_weight,
        lora_A.new_empty(0) if d_lora_A is None else d_lora_A,
        lora_B.new_empty(0) if d_lora_B is None else d_lora_B,
        dy.new_empty(0, dtype=torch.promote_types(dy.dtype, lora_A.dtype)) if d_bias is None else d_bias,
    )


@torch.library.register_fake("lora_kernels::linear_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    asked = Needs(*needs)
    n, k = dy.shape[-1], lora_A.shape[1]
    return (
        dy.new_empty((*dy.shape[:-1], k) if asked.x else 0),
        dy.new_empty((n, k) if asked.weight else 0),
        lora_A.new_empty(lora_A.shape if asked.lora_A else 0),
        lora_B.new_empty(lora_B.shape if asked.lora_B else 0),
        dy.new_empty(n if asked.bias else 0, dtype=torch.promote_types(dy.dtype, lora_A.dtype)),
    )


linear_forward = torch.ops.lora_kernels.linear_forward.default
linear_backward = torch.ops.lora_kernels.linear_backward.default
