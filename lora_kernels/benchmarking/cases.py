"""What is timed: linears of models people adapt, with the rank, dtypes and token counts they are adapted at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

Mode = Literal["forward", "forward+backward"]
MODES: tuple[Mode, ...] = ("forward", "forward+backward")
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@dataclass(frozen=True)
class LinearCase:
    """One linear with its adapter.

    Attributes:
        name: model and position, `bert-base.up`.
        model: the model the shape comes from.
        M: tokens. N: out_features. K: in_features. R: rank.
        dtype: of x, weight and bias, as torch spells it ("bfloat16").
        adapter_dtype: of lora_A and lora_B; `dtype` or "float32".
        dropout_p: on the LoRA path's input.
        bias: whether the base linear has a bias (frozen).
        mode: "forward" under `no_grad`, or "forward+backward" with gradients for x, lora_A and lora_B.
        graph: whether what is timed is the replay of a CUDA graph, as decoding servers run it.
    """

    name: str
    model: str
    M: int
    N: int
    K: int
    R: int = 16
    dtype: str = "float32"
    adapter_dtype: str = "float32"
    dropout_p: float = 0.0
    bias: bool = True
    mode: Mode = "forward+backward"
    graph: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a torch dtype."""
        return _torch_dtype(self.dtype)

    @property
    def torch_adapter_dtype(self) -> torch.dtype:
        """`adapter_dtype` as a torch dtype."""
        return _torch_dtype(self.adapter_dtype)

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.mode == "forward+backward"

    @property
    def dtypes(self) -> str:
        """`bf16`, or `bf16+fp32` when the adapters have their own dtype."""
        base, adapter = _SHORT.get(self.dtype, self.dtype), _SHORT.get(self.adapter_dtype, self.adapter_dtype)
        return base if base == adapter else f"{base}+{adapter}"


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype's name such as 'bfloat16'; got {name!r}")
    return dtype


# (name, model, M, N, K, bias). Tokens are batch x sequence of an ordinary fine-tuning step, cut to what two CPU cores
# can repeat often enough for a steady median.
_CPU_SHAPES = (
    ("minilm.attention", "MiniLM-L6", 2048, 384, 384, True),
    ("minilm.up", "MiniLM-L6", 2048, 1536, 384, True),
    ("minilm.down", "MiniLM-L6", 2048, 384, 1536, True),
    ("bert-base.attention", "BERT-base", 1024, 768, 768, True),
    ("bert-base.up", "BERT-base", 1024, 3072, 768, True),
    ("bert-base.down", "BERT-base", 1024, 768, 3072, True),
    ("vit-large.attention", "ViT-L", 1024, 1024, 1024, True),
    ("vit-large.down", "ViT-L", 1024, 1024, 4096, True),
    ("llama-1b.attention", "Llama-3.2-1B", 1024, 2048, 2048, False),
)
_CPU_FORWARD = ("minilm.up", "bert-base.attention", "vit-large.attention", "llama-1b.attention")
_CPU_DROPOUT = ("minilm.down", "bert-base.attention")
_CPU_MIXED = ("bert-base.attention",)

_LLAMA3_8B = (
    ("q", 4096, 4096),
    ("k", 1024, 4096),
    ("v", 1024, 4096),
    ("o", 4096, 4096),
    ("gate", 14336, 4096),
    ("up", 14336, 4096),
    ("down", 4096, 14336),
)


def cpu_suite() -> tuple[LinearCase, ...]:
    """MiniLM-L6, BERT-base, ViT-L and one 2048-wide Llama linear, fp32 and bf16."""
    shapes = {name: (name, model, m, n, k, bias) for name, model, m, n, k, bias in _CPU_SHAPES}
    cases = []
    for dtype in ("float32", "bfloat16"):
        for name, model, m, n, k, bias in shapes.values():
            case = LinearCase(name, model, m, n, k, dtype=dtype, adapter_dtype=dtype, bias=bias)
            cases.append(case)
            if name in _CPU_DROPOUT:
                cases.append(dataclasses.replace(case, dropout_p=0.1))
            if name in _CPU_MIXED and dtype != "float32":
                cases.append(dataclasses.replace(case, adapter_dtype="float32"))
            if name in _CPU_FORWARD:
                cases.append(dataclasses.replace(case, mode="forward"))
    return tuple(cases)


def gpu_suite() -> tuple[LinearCase, ...]:
    """Llama-3-8B's seven linears in bf16: training at 8192 tokens with p = 0 and 0.1, decoding at 16 tokens."""
    cases = []
    for position, n, k in _LLAMA3_8B:
        for adapter_dtype in ("float32", "bfloat16"):
            train = LinearCase(
                f"llama3-8b.{position}",
                "Llama-3-8B",
                8192,
                n,
                k,
                dtype="bfloat16",
                adapter_dtype=adapter_dtype,
                bias=False,
            )
            cases += [train, dataclasses.replace(train, dropout_p=0.1)]
            cases.append(dataclasses.replace(train, mode="forward"))
            cases.append(dataclasses.replace(train, M=16, mode="forward"))
    return tuple(cases)


def suite_for(device: torch.device) -> tuple[LinearCase, ...]:
    """The suite that fits a device."""
    return gpu_suite() if device.type == "cuda" else cpu_suite()


def select(cases: Iterable[LinearCase], pattern: str) -> tuple[LinearCase, ...]:
    """Those cases whose `name dtypes mode p=… M=… r=… [graph]` contains every word of `pattern`."""
    words = pattern.split()

    def haystack(case: LinearCase) -> str:
        graph = " graph" if case.graph else ""
        return f"{case.name} {case.dtypes} {case.mode} p={case.dropout_p:g} M={case.M} r={case.R}{graph}"

    return tuple(case for case in cases if all(word in haystack(case) for word in words))
