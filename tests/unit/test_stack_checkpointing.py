"""Activation checkpointing, compiled or not, with dropout: the replay drops what the forward dropped."""

from functools import partial
from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lora_kernels import LoRALinear
from lora_kernels.ops import BRANCH, LINEAR
from tests.stack_cases import (
    BranchLayer,
    assert_one_mask,
    chain,
    compiled_checkpoints_replay,
    compiler_warnings,
    counted_forwards,
)

pytestmark = compiler_warnings

LAYERS = 2


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def checkpointed(function, reentrant):
    return lambda x: checkpoint(function, x, use_reentrant=reentrant)


@pytest.fixture(scope="module")
def replays():
    return compiled_checkpoints_replay()


# inductor takes its time: one of each place.
CASES = [
    *product([LoRALinear, BranchLayer], ["aot_eager"], ["inside", "outside"], [True, False]),
    (LoRALinear, "inductor", "inside", False),
    (LoRALinear, "inductor", "outside", False),
]


@pytest.mark.parametrize(("layer", "compiler", "place", "reentrant"), CASES)
def test_compiled_with_dropout(monkeypatch, replays, layer, compiler, place, reentrant):
    forwards = 2 * LAYERS if place == "outside" or replays else LAYERS
    model, x = chain(layer)
    compiled = partial(torch.compile, backend=compiler, fullgraph=True)
    inner, outer = (model, compiled) if place == "inside" else (compiled(model), lambda call: call)
    call = outer(checkpointed(inner, reentrant))
    masks = set()
    for _ in range(2):
        with counted_forwards(monkeypatch) as count:
            y = assert_one_mask(model, x, call)
        assert count == [forwards]
        masks.add(y.sum().item())
    assert len(masks) == 2


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("layer", "op"), [(LoRALinear, LINEAR.forward), (BranchLayer, BRANCH.forward)])
def test_selective_checkpointing_keeps_the_operation_that_is_named(monkeypatch, layer, op, compiled, p):
    model, x = chain(layer, p=p)
    for kept, forwards in (([op], LAYERS), ([], 2 * LAYERS)):
        torch.compiler.reset()
        contexts = partial(create_selective_checkpoint_contexts, kept)
        call = partial(checkpoint, model, use_reentrant=False, context_fn=contexts)
        if compiled:
            call = torch.compile(call, backend="aot_eager", fullgraph=True)
        with counted_forwards(monkeypatch) as count:
            assert_one_mask(model, x, call)
        assert count == [forwards]


def test_a_replay_with_another_mask_is_seen():
    model, x = chain()
    # What PyTorch's own dropout gives, too, under this option.
    with pytest.raises(AssertionError):
        assert_one_mask(model, x, partial(checkpoint, model, use_reentrant=False, preserve_rng_state=False))
