"""A small transformer, one way of training it everywhere, and what it is held against.

Whatever the number of processes, the batch is the same, and so is the mean over its tokens: losses and gradients are
those of one process that computes the whole batch. The budget is the package's: at most twice the error against fp64
that plain PyTorch makes in the same dtypes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, add_lora
from lora_kernels.testing import budget_rows

WIDTH, HEAD, VOCABULARY = 32, 16, 40
SEQUENCES, LENGTH = 8, 6
# A rate so small that a rounding in one step does not grow in the next: errors are many and independent.
STEPS, LEARNING_RATE = 3, 0.1
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up", "down"]

Results = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=i > 0) for i in range(4))
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        # Of a size, not a number: under tensor parallel a rank has some of the heads.
        heads = (p(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = heads
        weights = torch.softmax(q @ k.transpose(-1, -2) * HEAD**-0.5, -1)
        x = x + self.o_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks; `checkpoints` says whether their activations are recomputed, and by which implementation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.checkpoints: str | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.checkpoints == "reentrant":
            x.requires_grad_()  # which it needs to see; everything before the first block is frozen
        for block in self.blocks:
            if self.checkpoints is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpoints == "reentrant")
        return self.head(self.norm(x))


def adapt(model: nn.Module, **options: Any) -> None:
    add_lora(model, **{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **options})


def new_model(
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    backend: str = "auto",
    dropout: float = 0.0,
    adapter_names: Sequence[str] = ("default",),
    seed: int = 0,
) -> Transformer:
    """The same numbers for a seed, whatever the dtype: they are rounded to bfloat16 when they are made."""
    torch.manual_seed(seed)
    model = Transformer()
    for name in adapter_names:
        adapt(model, lora_dropout=dropout, adapter_name=name, backend=backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to((adapter_dtype or dtype) if "lora_" in name else dtype)
    return model


def batch(rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's rows of the tokens and of what follows them."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    mine = tokens.chunk(world_size)[rank]
    return mine[:, :-1], mine[:, 1:]


def losses(model: Callable[..., Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
    """Of each token [rows, LENGTH], in fp32 or better, as training loops compute them."""
    logits = model(tokens)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(
    model: nn.Module,
    rank: int = 0,
    world_size: int = 1,
    *,
    steps: int = STEPS,
    run: Callable[..., Tensor] | None = None,
    autocast: bool = False,
    pieces: int = 1,
    synchronise: Callable[[bool], Any] | None = None,
    whole: Callable[[Tensor], Tensor] = torch.Tensor.clone,
    max_norm: float | None = None,
    seed: int | None = None,
) -> Results:
    """SGD on this rank's share: losses [steps, rows, LENGTH], and the gradients of lora_A and lora_B, step after step.

    Args:
        model: the trained parameters are its own.
        rank, world_size: of this process.
        steps: how many.
        run: what is called, if it is not the model.
        autocast: bfloat16.
        pieces: micro-batches in a step, their gradients accumulated.
        synchronise: told before each piece whether gradients are to be reduced; may return a context.
        whole: makes a gradient whole.
        max_norm: to clip gradients at.
        seed: of torch's generator, which dropout draws from; None leaves it as it is.
    """
    if seed is not None:
        torch.manual_seed(seed)
    parameters = trainable(model)
    optimiser = torch.optim.SGD(parameters.values(), lr=LEARNING_RATE)
    seen: list[Tensor] = []
    gradients: dict[str, list[Tensor]] = {"lora_A": [], "lora_B": []}
    for _ in range(steps):
        parts = []
        for piece, (tokens, targets) in enumerate(
            zip(*(t.chunk(pieces) for t in batch(rank, world_size)), strict=True)
        ):
            context = None if synchronise is None else synchronise(piece == pieces - 1)
            with context or nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = losses(run or model, tokens, targets)
                (found.mean() / pieces).backward()
            parts.append(found.detach())
        seen.append(torch.cat(parts))
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters.values(), max_norm)
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            gradients["lora_A" if "lora_A" in name else "lora_B"].append(whole(parameter.grad).flatten())
        optimiser.step()
        optimiser.zero_grad()
    return {"losses": torch.stack(seen), **{f"d_{part}": torch.cat(found) for part, found in gradients.items()}}


def together(results: Sequence[Results]) -> Results:
    """The ranks' losses as those of one batch; gradients, which all ranks have, are the same bits on all of them."""
    for result in results:
        for name in ("d_lora_A", "d_lora_B"):
            assert torch.equal(result[name], results[0][name]), name
    return {**results[0], "losses": torch.cat([result["losses"] for result in results], 1)}


def assert_within_budget(actual: Results, model: nn.Module, **options: Any) -> None:
    """Losses and gradients have at most twice the error of one process with plain PyTorch.

    Args:
        actual: of the whole batch.
        model: as it was before training, on whatever backend; its dtypes are those of plain PyTorch's run.
        options: of `train`, for that run.
    """
    eager_model, exact_model = (with_backend(copy.deepcopy(model), "reference") for _ in range(2))
    eager = train(eager_model, **options)
    exact = train(exact_model.double(), **{name: v for name, v in options.items() if name in ("max_norm", "seed")})
    failed = [row for row in budget_rows(actual, eager, exact) if not row.ok]
    assert not failed, "\n".join(f"{r.name}: {r.error:.2e} > {r.limit:.2e} (eager {r.eager_error:.2e})" for r in failed)


def with_backend(model: nn.Module, backend: str) -> nn.Module:
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.backend = backend
    return model
