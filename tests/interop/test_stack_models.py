"""torch.compile of a whole transformers model, by add_lora and by patch_peft, with checkpointing and dropout."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import add_lora, patch_peft
from lora_kernels.testing import budget_rows
from tests.equality import assert_same_numbers
from tests.interop.peft_cases import stock_twin
from tests.stack_cases import compiled_checkpoints_replay, compiler_warnings, counted_forwards

pytestmark = [
    compiler_warnings,
    # The names that every version of transformers 5 has; the newest has given them another one.
    pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning"),
]

VOCABULARY, LINEARS = 61, 7
SIZES = ((4, 11), (4, 13), (4, 9), (4, 30))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def replays():
    return compiled_checkpoints_replay()


def llama():
    """One layer, since all layers are compiled alike. A cache would be switched off with a warning, which breaks the
    graph, whatever the linears are."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, initializer_range=0.1, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
            use_cache=False,
        )
    )  # fmt: skip


def adapted(way):
    model = llama()
    options = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, "init_lora_weights": False}
    if way == "add_lora":
        add_lora(model, **options)
        return model.train()
    return get_peft_model(model, LoraConfig(**options)).train()


def step(model, size):
    """Loss, logits and gradients."""
    ids = torch.randint(3, VOCABULARY, size, generator=torch.Generator().manual_seed(size[1]))
    model.zero_grad()
    torch.manual_seed(7)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == 2 * LINEARS
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **found}


@pytest.mark.parametrize("way", ["add_lora", "patch_peft"])
def test_a_model_that_checkpoints_is_one_graph_for_all_lengths(monkeypatch, replays, way):
    model = adapted(way)
    if way == "patch_peft":
        patch_peft(model)
    expected = [step(model, size) for size in SIZES]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # It is the reentrant kind that wants a gradient for its inputs; asking for one in the graph would break it.
    model.disable_input_require_grads()
    model.compile(backend="aot_eager", fullgraph=True)
    found = [step(model, size) for size in SIZES[:2]]
    assert counters["stats"]["unique_graphs"] == 2  # the second, for any length
    with torch._dynamo.config.patch(error_on_recompile=True), counted_forwards(monkeypatch) as count:
        found += [step(model, size) for size in SIZES[2:]]
    assert count == [2 * LINEARS * (2 if replays else 1)]  # each forward and its replay, in each of two steps
    assert_same_numbers(found, expected)


def test_a_patched_layer_of_a_model_under_inductor():
    model = adapted("patch_peft")
    eager, truth = step(stock_twin(model), SIZES[0]), step(stock_twin(model).double(), SIZES[0])
    patch_peft(model)
    # A layer at a time, as is done to compile once for many; inductor has its own generator unless told otherwise.
    with inductor_config.patch(fallback_random=True):
        for layer in model.get_base_model().model.layers:
            layer.compile(fullgraph=True)
        actual = step(model, SIZES[0])
    assert counters["stats"]["unique_graphs"] == 1
    parts = ("logits", "lora_A", "lora_B")
    results = [
        {part: torch.cat([t.flatten() for name, t in run.items() if part in name]) for part in parts}
        for run in (actual, eager, truth)
    ]
    failed = [row for row in budget_rows(*results) if not row.ok]
    assert not failed, failed
