"""torch.compile of the unfused chain: the compiler's answer to the same question.

In a case's shapes, static, forward and backward. `max-autotune` lets Inductor choose among the library's and its own
Triton products by timing them, which takes long: it exists on a GPU only, and runs where it is named.
"""

from __future__ import annotations

import importlib.util
import shutil
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import CaseInputs, Provider, unfused_chain

MAX_AUTOTUNE = "max-autotune-no-cudagraphs"  # graphs are the suite's to choose, for all contenders alike


def _compile(mode: str) -> Callable[..., Tensor]:
    # A code object of its own for each case: after eight recompilations of one, Dynamo would run the chain eagerly.
    chain = types.FunctionType(unfused_chain.__code__.replace(), unfused_chain.__globals__)
    chain.__defaults__, chain.__kwdefaults__ = unfused_chain.__defaults__, unfused_chain.__kwdefaults__
    compiled: Any = torch.compile(chain, mode=mode, dynamic=False, fullgraph=True)
    return compiled


def _forward(mode: str) -> Callable[[CaseInputs, float], Tensor]:
    def forward(inputs: CaseInputs, dropout_p: float) -> Tensor:
        i = inputs
        chain = i.build(("compiled", mode), lambda: _compile(mode))
        return chain(i.x, i.weight, i.lora_A, i.lora_B, i.bias, scaling=i.scaling, dropout_p=dropout_p)

    return forward


@cache
def _no_compiler(device_type: str) -> str | None:
    """Inductor writes C++ for a CPU and Triton for a GPU."""
    if device_type == "cpu":
        return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler is on the path"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _why_not(case: LinearCase, device: torch.device) -> str | None:
    return _no_compiler(device.type)


def _why_not_max(case: LinearCase, device: torch.device) -> str | None:
    if device.type == "cpu":
        return "autotuning chooses among GPU kernels; on a CPU it is the default mode with a longer compilation"
    return _no_compiler(device.type)


COMPILED = Provider("torch.compile", _forward("default"), why_not=_why_not)
COMPILED_MAX = Provider("compile-max", _forward(MAX_AUTOTUNE), why_not=_why_not_max)
