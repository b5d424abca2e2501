"""`lora_kernels::branch_forward` and `lora_kernels::branch_backward`: as `ops.linear`, without the base product.

They take inputs that the caller has validated: base_out, y and dy [*, N], x [*, K], xa [*, R]. base_out's gradient is
dy and needs no op. Gradients that are not needed come back as empty tensors: a schema has no optional returns.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Protocol

import torch
from torch import Tensor

from lora_kernels.errors import UnsupportedError
from lora_kernels.ops import _branch_torch
from lora_kernels.ops._needs import BranchNeeds
from lora_kernels.ops._registry import LIBRARY, flat, multiplies_in_tf32, plain, shaped
from lora_kernels.ops.linear import problem_of
from lora_kernels.planning import Backend, BranchPlan, make_branch_plan
from lora_kernels.planning.device import triton_available
from lora_kernels.planning.measured import row_bucket

LIBRARY.define(
    "branch_forward(Tensor base_out, Tensor x, Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, "
    "float dropout_p, str backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "branch_backward(Tensor dy, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor? xa, Tensor? seed, float scaling, "
    "float dropout_p, ScalarType x_dtype, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
)


def _plan(out: Tensor, x_dtype: torch.dtype, lora_A: Tensor, seed: Tensor | None, backend: str) -> BranchPlan:
    r, k = lora_A.shape
    return branch_plan_of(
        backend, row_bucket(out.shape[0]), out.shape[1], k, r, x_dtype, lora_A.dtype, out.dtype, seed is not None,
        out.device, multiplies_in_tf32(out.device),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def branch_plan_of(
    backend: str,
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    out_dtype: torch.dtype,
    dropout: bool,
    device: torch.device,
    tf32: bool,
) -> BranchPlan:
    """The plan for one problem on a device that is here; kept, since a training step asks for the same few again."""
    problem = problem_of(
        m, n, k, r, dtype=dtype, adapter_dtype=adapter_dtype, dropout=dropout, device=device, tf32=tf32
    )
    return make_branch_plan(problem, out_dtype, backend, triton_available=triton_available())


class BranchImplementation(Protocol):
    """What a backend's module offers: both directions, under a plan that names it."""

    def forward(
        self,
        base_out: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        plan: BranchPlan,
    ) -> tuple[Tensor, Tensor]:
        """(y [M, N], xa [M, R]) for x [M, K], M >= 1."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        xa: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        x_dtype: torch.dtype,
        needs: BranchNeeds,
        plan: BranchPlan,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, lora_A, lora_B; None where not needed."""


@cache
def branch_implementation(backend: Backend) -> BranchImplementation:
    """The module that serves one direction of a plan: for the ops below, and for checks that force a strategy."""
    if backend == "triton":
        from lora_kernels.ops import _branch_triton

        return _branch_triton
    if backend == "torch":
        return _branch_torch
    raise UnsupportedError(f"the registered op serves 'torch' and 'triton'; got {backend!r}. Call lora_branch instead.")


@torch.library.impl(LIBRARY, "branch_forward", "CompositeExplicitAutograd")
def _forward(
    base_out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return base_out.new_empty(base_out.shape), lora_A.new_empty(*x.shape[:-1], lora_A.shape[0])
    leading = x.shape[:-1]
    base_out, x = flat(base_out), flat(x)
    plan = _plan(base_out, x.dtype, lora_A, seed, backend)
    with plain(x):
        y, xa = branch_implementation(plan.backend).forward(base_out, x, lora_A, lora_B, seed, scaling, dropout_p, plan)
    return shaped(y, leading), shaped(xa, leading)


@torch.library.register_fake("lora_kernels::branch_forward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_forward(
    base_out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return base_out.new_empty(base_out.shape), lora_A.new_empty(*x.shape[:-1], lora_A.shape[0])


@torch.library.impl(LIBRARY, "branch_backward", "CompositeExplicitAutograd")
def _backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    x_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    if dy.numel() == 0:
        empty = _fake_backward(dy, x, lora_A, lora_B, xa, seed, scaling, dropout_p, x_dtype, needs, backend)
        return tuple(gradient.zero_() for gradient in empty)
    leading = dy.shape[:-1]
    dy = flat(dy)
    x, xa = None if x is None else flat(x), None if xa is None else flat(xa)
    plan = _plan(dy, x_dtype, lora_A, seed, backend)
    with plain(dy):
        dx, d_lora_A, d_lora_B = branch_implementation(plan.backward.backend).backward(
            dy, x, lora_A, lora_B, xa, seed, scaling, dropout_p, x_dtype, BranchNeeds(*needs), plan
        )
    return (
        dy.new_empty(0, dtype=x_dtype) if dx is None else shaped(dx, leading),
        lora_A.new_empty(0) if d_lora_A is None else d_lora_A,
        lora_B.new_empty(0) if d_lora_B is None else d_lora_B,
    )


@torch.library.register_fake("lora_kernels::branch_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    x_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    asked = BranchNeeds(*needs)
    return (
        dy.new_empty((*dy.shape[:-1], lora_A.shape[1]) if asked.x else 0, dtype=x_dtype),
        lora_A.new_empty(lora_A.shape if asked.lora_A else 0),
        lora_B.new_empty(lora_B.shape if asked.lora_B else 0),
    )


branch_forward = torch.ops.lora_kernels.branch_forward.default
branch_backward = torch.ops.lora_kernels.branch_backward.default
