"""What is timed, declared: models, sweeps over their linears, and the named suites made of sweeps.

The whole product of models, tokens, ranks, dtypes, dropout and modes is tens of thousands of cases. It exists as the
suite `full`, to select from and to fill whatever time there is; the other suites are the parts that answer a question.
Cases come in order of importance: where a time budget ends a run, what is left out is the end of the list.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from lora_kernels.benchmarking import cases as package_cases
from lora_kernels.benchmarking.cases import MODES, LinearCase, Mode


@dataclass(frozen=True)
class Linear:
    """One linear of a model's layer: its name there, out_features, in_features, bias."""

    position: str
    N: int
    K: int
    bias: bool = False


@dataclass(frozen=True)
class Model:
    """A model by the linears of one of its layers.

    Attributes:
        name: as its authors write it.
        slug: as cases are named.
        linears: in the order of a forward pass.
    """

    name: str
    slug: str
    linears: tuple[Linear, ...]

    @property
    def distinct(self) -> tuple[Linear, ...]:
        """The linears with those of one shape joined, `gate+up`: timing a shape twice tells nothing new."""
        positions: dict[tuple[int, int, bool], list[str]] = {}
        for linear in self.linears:
            positions.setdefault((linear.N, linear.K, linear.bias), []).append(linear.position)
        return tuple(Linear("+".join(names), *shape) for shape, names in positions.items())


def decoder(
    name: str, slug: str, *, hidden: int, query: int, key_value: int, intermediate: int, qkv_bias: bool = False
) -> Model:
    """A layer of the Llama family: q, k, v, o, and the gated MLP.

    Args:
        name: the model's.
        slug: the model's, in cases.
        hidden: hidden_size.
        query: num_attention_heads * head_dim.
        key_value: num_key_value_heads * head_dim.
        intermediate: intermediate_size.
        qkv_bias: whether q, k and v have a bias (Qwen2 and Qwen2.5).
    """
    linears = (
        Linear("q", query, hidden, qkv_bias),
        Linear("k", key_value, hidden, qkv_bias),
        Linear("v", key_value, hidden, qkv_bias),
        Linear("o", hidden, query),
        Linear("gate", intermediate, hidden),
        Linear("up", intermediate, hidden),
        Linear("down", hidden, intermediate),
    )
    return Model(name, slug, linears)


def encoder(name: str, slug: str, *, hidden: int, intermediate: int) -> Model:
    """A layer of the first Transformers: four square projections and a two-layer MLP, all with bias."""
    square = tuple(Linear(position, hidden, hidden, True) for position in ("q", "k", "v", "o"))
    mlp = (Linear("up", intermediate, hidden, True), Linear("down", hidden, intermediate, True))
    return Model(name, slug, square + mlp)


# Sizes from each model's published config.json. Where a family has several sizes, the one that is fine-tuned most on a
# single node stands for it: of Gemma, gemma-2-9b, whose heads (16 x 256) are wider than its hidden size.
LLAMA3_8B = decoder("Llama-3-8B", "llama3-8b", hidden=4096, query=4096, key_value=1024, intermediate=14336)
LLAMA3_70B = decoder("Llama-3-70B", "llama3-70b", hidden=8192, query=8192, key_value=1024, intermediate=28672)
QWEN25_7B = decoder(
    "Qwen2.5-7B", "qwen2.5-7b", hidden=3584, query=3584, key_value=512, intermediate=18944, qkv_bias=True
)
QWEN25_32B = decoder(
    "Qwen2.5-32B", "qwen2.5-32b", hidden=5120, query=5120, key_value=1024, intermediate=27648, qkv_bias=True
)
MISTRAL_7B = decoder("Mistral-7B", "mistral-7b", hidden=4096, query=4096, key_value=1024, intermediate=14336)
GEMMA2_9B = decoder("Gemma-2-9B", "gemma2-9b", hidden=3584, query=4096, key_value=2048, intermediate=14336)
BERT_BASE = encoder("BERT-base", "bert-base", hidden=768, intermediate=3072)
VIT_L = encoder("ViT-L", "vit-large", hidden=1024, intermediate=4096)
MODELS = (LLAMA3_8B, LLAMA3_70B, QWEN25_7B, QWEN25_32B, MISTRAL_7B, GEMMA2_9B, BERT_BASE, VIT_L)

TOKENS = (8192, 2048, 16384, 512, 64, 16, 1)
RANKS = (16, 64, 8, 32, 128, 256)
DROPOUTS = (0.0, 0.1)
# (base, adapters). fp16 is bf16's speed with another exponent; it is timed in the full suite only.
BF16 = ("bfloat16", "bfloat16")
BF16_FP32 = ("bfloat16", "float32")
DTYPES = (BF16, BF16_FP32, ("float16", "float16"), ("float16", "float32"), ("float32", "float32"))


@dataclass(frozen=True)
class Sweep:
    """A product of lists; the last one varies fastest.

    Attributes:
        models: whose linears.
        modes, dtypes, ranks, tokens, dropouts: what they are run with; `dtypes` are (base, adapters).
        positions: only shapes that one of these linears has; none means all.
        graph: as a CUDA graph.
    """

    models: tuple[Model, ...] = (LLAMA3_8B,)
    modes: tuple[Mode, ...] = ("forward+backward",)
    dtypes: tuple[tuple[str, str], ...] = (BF16,)
    ranks: tuple[int, ...] = (16,)
    tokens: tuple[int, ...] = (8192,)
    dropouts: tuple[float, ...] = (0.0,)
    positions: tuple[str, ...] = ()
    graph: bool = False

    def __len__(self) -> int:
        linears = sum(1 for model in self.models for _ in self._linears(model))
        return linears * len(list(self._settings()))

    def cases(self) -> Iterator[LinearCase]:
        """Every case of the product, settings outermost, so that a model's layer is complete before the next setting.

        Dropout is a matter of training: forward alone is timed at p = 0.
        """
        for mode, (dtype, adapter_dtype), rank, m, p in self._settings():
            for model in self.models:
                for linear in self._linears(model):
                    yield LinearCase(
                        f"{model.slug}.{linear.position}", model.name, m, linear.N, linear.K, rank,
                        dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=p, bias=linear.bias, mode=mode,
                        graph=self.graph,
                    )  # fmt: skip

    def _settings(self) -> Iterator[tuple[Mode, tuple[str, str], int, int, float]]:
        product = itertools.product(self.modes, self.dtypes, self.ranks, self.tokens, self.dropouts)
        return (setting for setting in product if setting[0] != "forward" or setting[-1] == 0)

    def _linears(self, model: Model) -> Iterator[Linear]:
        wanted = set(self.positions)
        return (x for x in model.distinct if not wanted or wanted & set(x.position.split("+")))


DECODE = Sweep(modes=("forward",), tokens=(16, 1, 64), graph=True)
SUITES: dict[str, tuple[Sweep, ...]] = {
    # The table of targets in docs/benchmarks: each row of it needs some of these and nothing else.
    "headline": (
        Sweep(),
        Sweep(dropouts=(0.1,)),
        DECODE,
        Sweep(dtypes=(BF16_FP32,), dropouts=(0.1, 0.0)),
    ),
    "decode": (DECODE, dataclasses.replace(DECODE, models=(LLAMA3_8B, QWEN25_7B), ranks=(64, 8))),
    "ranks": (Sweep(ranks=RANKS, dropouts=DROPOUTS, positions=("q", "k", "gate", "down")),),
    "models": (Sweep(models=MODELS[1:], tokens=(8192,)), Sweep(models=MODELS, tokens=(2048,), dropouts=(0.1,))),
    # Every strategy beside every other, where the planner has to choose among them.
    "strategies": (
        Sweep(dtypes=(BF16, BF16_FP32), dropouts=(0.0, 0.1)),
        Sweep(modes=("forward",), tokens=(16, 512)),
        Sweep(tokens=(1024,)),
    ),
    "full": (Sweep(MODELS, tuple(reversed(MODES)), DTYPES, RANKS, TOKENS, DROPOUTS),),
}
# What fills nine minutes of a GPU.
SUITES["gpu"] = tuple(sweep for name in ("headline", "models", "ranks", "decode") for sweep in SUITES[name])
CPU = "cpu"
NAMES = (CPU, *SUITES)


def suite(name: str) -> tuple[LinearCase, ...]:
    """The cases of a suite, each once, in order of importance; `cpu` is what two cores can time in two minutes.

    Raises:
        ValueError: the name is none of `NAMES`.
    """
    if name == CPU:
        return tuple(sorted(package_cases.cpu_suite(), key=_cpu_importance))
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(NAMES)}; got {name!r}")
    return tuple(dict.fromkeys(case for sweep in SUITES[name] for case in sweep.cases()))


def _cpu_importance(case: LinearCase) -> tuple[bool, str, str]:
    """The cases that targets are about before the others, and the dtypes of one shape one after the other."""
    target = case.backward and case.dropout_p == 0 and case.dtype == case.adapter_dtype
    order = ("bert-base.attention", "llama-1b.attention", "minilm.up")  # where peers run, too
    place = order.index(case.name) if case.name in order else len(order)
    return not target, f"{place}{case.name}", case.mode


def distinct(cases: Iterable[LinearCase]) -> tuple[LinearCase, ...]:
    """The cases without those that repeat another model's: Mistral-7B's linears are Llama-3-8B's, shape for shape."""
    first: dict[LinearCase, LinearCase] = {}
    for case in cases:
        first.setdefault(dataclasses.replace(case, name="", model=""), case)
    return tuple(first.values())


def default_suite(device: torch.device) -> str:
    """The suite that is run where none is asked for."""
    return "headline" if device.type == "cuda" else CPU
