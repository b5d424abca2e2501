"""A training step of a Llama-shaped model with LoRA on every linear: stock PEFT and the same model patched.

    python -m bench.llama_step [--size tiny] [--device DEVICE] [--only WORDS] [--total SECONDS] [--out FOLDER]

The layers have Llama-3-8B's sizes and there are four of them, with random weights in bf16. The vocabulary is small: an
8B model's, over four layers instead of 32, would be most of the step. Adapters are fp32, PEFT's default, plainly and
under bf16 autocast as `Trainer(bf16=True)` has it, or bf16; dropout 0 and 0.05; with and without gradient
checkpointing. Both contenders share one set of parameters and take turns. A step is forward, backward and AdamW.

Before it is timed, a case has to be right: the adapter's gradients at dropout 0 may err at most twice as much as stock
PEFT's, against the same model in fp32. `--size tiny` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peft_layers import PATCHED, STOCK
from lora_kernels import patch_peft
from lora_kernels.benchmarking.memory import peak_bytes, saved_bytes
from lora_kernels.benchmarking.records import Environment, device_slug, write_csv
from lora_kernels.benchmarking.report import mebibytes
from lora_kernels.benchmarking.timer import interleave
from lora_kernels.reference.budget import error_limit, relative_error

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_THERE = 3


@dataclass(frozen=True)
class Size:
    """Of the model and of a batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int
    rank: int


SIZES = {
    "8b-layers": Size(4096, 14336, 4, 32, 8, 1024, batch=4, length=2048, rank=16),
    "tiny": Size(256, 512, 2, 4, 2, 97, batch=4, length=128, rank=8),  # as large as it takes to be fused on a CPU
}


@dataclass(frozen=True)
class Case:
    """One setting; both contenders run it."""

    adapters: str  # "fp32" or "bf16"
    autocast: bool
    dropout_p: float
    checkpointing: bool

    @property
    def label(self) -> str:
        words = [f"{self.adapters} adapters", *(["autocast"] if self.autocast else []), f"p={self.dropout_p:g}"]
        return " ".join([*words, *(["checkpointing"] if self.checkpointing else [])])


# The most usual first: what the time does not suffice for is left out from the end.
CASES = tuple(
    Case(adapters, autocast, p, checkpointing)
    for checkpointing, (adapters, autocast), p in product(
        (False, True), (("fp32", False), ("fp32", True), ("bf16", False)), (0.05, 0.0)
    )
)


@dataclass(frozen=True)
class LlamaRow:
    """One contender in one case.

    `ratio` is stock's time over its own, a median of ratios within a round. `peak_bytes` is above what was allocated
    before the step, parameters and optimiser. `saved_bytes` is what forward keeps for backward, and None under
    checkpointing, which keeps inputs where no hook of autograd's sees them. `error` is that of the adapter's gradients
    at dropout 0, against fp32.
    """

    size: str
    layers: int
    tokens: int
    rank: int
    adapters: str
    autocast: bool
    dropout_p: float
    checkpointing: bool
    contender: str
    rounds: int
    ms: float
    ms_p10: float
    ms_p90: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    peak_bytes: int
    saved_bytes: int | None
    error: float
    error_budget: float
    device: str
    driver: str
    torch: str
    triton: str
    peft: str
    commit: str
    date: str

    @property
    def case(self) -> Case:
        """The setting it was taken in."""
        return Case(self.adapters, self.autocast, self.dropout_p, self.checkpointing)


def why_not() -> str | None:
    """Why nothing can run here."""
    missing = [name for name in ("peft", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)} (pip install '.[dev]')" if missing else None


@contextmanager
def _old_names() -> Iterator[None]:
    """peft and this script call transformers by names that every version of 5 has; the newest warns of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated")
        yield


def stock_model(size: Size, case: Case, device: torch.device) -> Any:
    """The model as PEFT makes it, in training mode, with a B that is not zero."""
    import transformers
    from peft import LoraConfig, get_peft_model

    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=max(size.length, 64),
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device), _default_dtype(torch.bfloat16), _old_names():
        model = transformers.LlamaForCausalLM(config)
        adapter = LoraConfig(
            r=size.rank,
            lora_alpha=2 * size.rank,
            lora_dropout=case.dropout_p,
            target_modules=TARGETS,
            init_lora_weights=False,
        )
        model = get_peft_model(model, adapter, autocast_adapter_dtype=case.adapters == "fp32")
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
    return model.train()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def patched_twin(stock: nn.Module) -> nn.Module:
    """The same parameters in another tree of modules, which is patched."""
    twin = copy.deepcopy(stock, {id(tensor): tensor for tensor in (*stock.parameters(), *stock.buffers())})
    report = patch_peft(twin)
    assert report.fused == len(report.rows), report
    return twin


def loss_of(model: nn.Module, ids: Tensor, case: Case) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=case.autocast):
        loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def adapter_gradient(model: nn.Module, ids: Tensor, case: Case) -> Tensor:
    """All of the adapter's gradients at dropout 0, in one fp32 vector on the CPU."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for dropout in dropouts:
        dropout.eval()
    gradients = torch.autograd.grad(loss_of(model, ids, case), parameters)
    for dropout in dropouts:
        dropout.train()
    return torch.cat([gradient.flatten().float() for gradient in gradients]).cpu()


def gate(models: dict[str, nn.Module], ids: Tensor, case: Case) -> tuple[dict[str, float], float]:
    """(error of each contender's gradients, the most that is allowed), against stock PEFT in fp32."""
    wide = copy.deepcopy(models[STOCK]).float()
    truth = adapter_gradient(wide, ids, dataclasses.replace(case, autocast=False))
    del wide
    found = {name: adapter_gradient(model, ids, case) for name, model in models.items()}
    _, limit = error_limit(found[STOCK], truth)
    return {name: relative_error(gradient, truth) for name, gradient in found.items()}, limit


def measure(size: str, case: Case, device: torch.device, *, budget_s: float) -> list[LlamaRow]:
    """A row for each contender.

    Raises:
        ArithmeticError: the patched model's gradients are outside the budget.
    """
    sizes = SIZES[size]
    stock = stock_model(sizes, case, device)
    models: dict[str, nn.Module] = {STOCK: stock, PATCHED: patched_twin(stock)}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(sizes.vocabulary, (sizes.batch, sizes.length), generator=generator).to(device)
    errors, limit = gate(models, ids, case)
    if not errors[PATCHED] <= limit:
        raise ArithmeticError(f"gradients err by {errors[PATCHED]:.2e}, allowed are {limit:.2e}")
    trainable = [parameter for parameter in stock.parameters() if parameter.requires_grad]
    # A rate of 0 leaves every step the same work on the same numbers.
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0, fused=device.type == "cuda")

    def step_of(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad()
            loss_of(model, ids, case).backward()
            optimizer.step()

        return step

    steps = {name: step_of(model) for name, model in models.items()}
    samples = interleave(steps, device=device, budget_s=budget_s, warmup=2)
    alive = [*stock.parameters(), *stock.buffers(), ids]
    environment = Environment.current(device)
    rows = []
    for name, step in steps.items():
        optimizer.zero_grad()
        ms, ratio = samples.time(name), samples.ratio(STOCK, name)
        kept = None if case.checkpointing else saved_bytes(lambda m=models[name]: loss_of(m, ids, case), beyond=alive)
        rows.append(
            LlamaRow(
                size=size,
                layers=sizes.layers,
                tokens=ids.numel(),
                rank=sizes.rank,
                **dataclasses.asdict(case),
                contender=name,
                rounds=samples.rounds,
                ms=ms.median,
                ms_p10=ms.p10,
                ms_p90=ms.p90,
                ratio=ratio.median,
                ratio_p10=ratio.p10,
                ratio_p90=ratio.p90,
                peak_bytes=peak_bytes(step, device=device),
                saved_bytes=kept,
                error=errors[name],
                error_budget=limit,
                **{
                    field: getattr(environment, field)
                    for field in ("device", "driver", "torch", "triton", "peft", "commit", "date")
                },
            )
        )
    return rows


HEAD = (
    f"{'adapters, dropout, checkpointing':<42} {'PEFT ms':>9} {'patched':>9} {'PEFT / patched':>20} "
    f"{'peak, PEFT':>12} {'patched':>12} {'kept, PEFT':>12} {'patched':>12}"
)


def line(rows: Sequence[LlamaRow]) -> str:
    """The table's line of a case."""
    stock, patched = rows
    kept = ["" if row.saved_bytes is None else mebibytes(row.saved_bytes) for row in rows]
    ratio = f"{patched.ratio:.3f} ({patched.ratio_p10:.2f}-{patched.ratio_p90:.2f})"
    return (
        f"{stock.case.label:<42} {stock.ms:>9.2f} {patched.ms:>9.2f} {ratio:>20} {mebibytes(stock.peak_bytes):>12} "
        f"{mebibytes(patched.peak_bytes):>12} {kept[0]:>12} {kept[1]:>12}"
    ).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if a case is wrong or fails, 3 where PEFT or the device is not there."""
    parser = argparse.ArgumentParser(prog="python -m bench.llama_step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=tuple(SIZES), default="8b-layers")
    parser.add_argument("--only", default="", help="words a case must contain, such as 'fp32 p=0.05'")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of timing per case (at least 6 rounds)")
    parser.add_argument("--total", type=float, default=400.0, help="no case is begun after so many seconds")
    parser.add_argument("--out", type=Path, help="folder for llama_step.csv (default: bench/results/local/<device>)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.llama_step needs a GPU that torch can use; --device cpu --size tiny tries the script")
        return NOT_THERE
    if reason := why_not():
        print(f"bench.llama_step: {reason}")
        return NOT_THERE
    cases = [case for case in CASES if all(word in case.label.split() for word in arguments.only.split())]
    if not cases:
        parser.error(f"--only {arguments.only!r} matches no case")
    size = SIZES[arguments.size]
    print(Environment.current(device).line)
    print(
        f"Llama of {size.layers} layers, {size.hidden} wide, random weights in bf16; LoRA of rank {size.rank} on all "
        f"{len(TARGETS)} linears of a layer; {size.batch} x {size.length} tokens a step"
    )
    print(f"{HEAD}\n{'-' * len(HEAD)}", flush=True)
    out = arguments.out or Path(__file__).parent / "results" / "local" / device_slug(device)
    start = time.perf_counter()
    rows: list[LlamaRow] = []
    faults = 0
    for index, case in enumerate(cases):
        if rows and time.perf_counter() - start >= arguments.total:
            print(f"LEFT OUT: {len(cases) - index} of {len(cases)} cases, for want of time")
            break
        try:
            found = measure(arguments.size, case, device, budget_s=arguments.budget)
        except Exception as error:  # wrong, out of memory, or a kernel that does not compile: the others go on
            lines = str(error).strip().splitlines() or ["no message"]
            print(f"FAULT: {case.label}: {type(error).__name__}: {lines[0]}")
            faults += 1
            continue
        finally:
            gc.collect()  # the models of a case are in cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()
        rows += found
        write_csv(rows, out / "llama_step.csv")
        print(line(found), flush=True)
    if rows:
        print(f"written: {out / 'llama_step.csv'}")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
