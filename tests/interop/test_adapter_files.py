"""Adapter files against PEFT itself: each side loads what the other has written, and both choose the same modules."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_kernels import AdapterFileError, LoRALinear, add_lora, load_lora, merge_lora, save_lora, set_adapter
from lora_kernels.adapters.targets import Targets, pattern_value
from lora_kernels.adapters.tree import places
from tests.equality import assert_same_numbers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VOCABULARY = 61


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    )


class Plain(nn.Module):
    """No model of transformers', with a linear of each name at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(VOCABULARY, 24), nn.Linear(24, 24)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24, bias=False)}) for _ in range(3)]
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.up(self.embed(ids))
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return x


MODELS = {"llama": llama, "bert": bert, "gpt2": gpt2, "plain": Plain}

# One set of options for LoraConfig and add_lora.
OPTIONS = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"layers.0.mlp.down_proj": 2}},
    "llama-rslora": {
        "target_modules": r".*layers\.1\.self_attn\.(q|k)_proj",
        "use_rslora": True,
        "alpha_pattern": {"k_proj": 3},
        "lora_dropout": 0.1,
    },
    "llama-all": {"target_modules": "all-linear", "exclude_modules": r".*\.o_proj"},
    "llama-head": {"target_modules": ["lm_head", "gate_proj"]},
    "bert": {"target_modules": ["query", "classifier"], "rank_pattern": {"^classifier": 1, "query": 3}},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "lora_alpha": 2.5},
    "gpt2-all": {"target_modules": "all-linear", "rank_pattern": {"c_fc": 2}},
    "plain": {"target_modules": "up", "use_rslora": True},
    "plain-some": {"target_modules": ["blocks.0.up", "down"], "exclude_modules": ["1.down"]},
    "plain-rank": {"target_modules": "all-linear", "rank_pattern": {"^up": 1, "2.up": 6}, "alpha_pattern": {"up": 9}},
}

# What PEFT says of settings that are right here, and transformers of PEFT.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # it mends it, layer by layer
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),  # where lm_head has an adapter
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]


@pytest.fixture(params=OPTIONS)
def case(request) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    base = MODELS[request.param.partition("-")[0]]().eval()
    return base, {"r": 4, "lora_alpha": 6, **OPTIONS[request.param]}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        y = model(torch.arange(14).reshape(2, 7))
    return y if isinstance(y, torch.Tensor) else y.logits


def assert_agree(found, expected, base) -> None:
    """As two orders of fp32 additions do, and the adapter is seen."""
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-5)
    assert (logits(expected) - logits(base)).abs().max() > 1e-2


def in_peft(base, options) -> PeftModel:
    config = LoraConfig(**{**options, "init_lora_weights": False})
    return get_peft_model(copy.deepcopy(base), config).eval()


def in_ours(base, options) -> nn.Module:
    model = copy.deepcopy(base)
    add_lora(model, **{**options, "init_lora_weights": False})
    return model


def settings_in_peft(model) -> dict[str, tuple]:
    modules = model.base_model.model.named_modules()
    return {n: (m.r["default"], m.scaling["default"]) for n, m in modules if hasattr(m, "lora_A") and n}


def settings_in_ours(model) -> dict[str, tuple]:
    return {n: (m.r, m.scaling) for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def test_both_choose_the_same_layers_ranks_and_scalings(case):
    base, options = case
    assert settings_in_ours(in_ours(base, options)) == settings_in_peft(in_peft(base, options))


def test_ours_loads_in_peft(case, tmp_path):
    base, options = case
    model = in_ours(base, options)
    save_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert settings_in_peft(loaded) == settings_in_ours(model)
    assert loaded.peft_config["default"].lora_dropout == options.get("lora_dropout", 0.0)
    assert_agree(loaded, model, base)
    merge_lora(model)
    assert_agree(loaded.merge_and_unload(), model, base)


def test_peft_s_loads_here(case, tmp_path):
    base, options = case
    model = in_peft(base, options)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = copy.deepcopy(base)
    load_lora(loaded, tmp_path)
    assert settings_in_ours(loaded) == settings_in_peft(model)
    assert_agree(loaded, model, base)
    # And into layers that are there, under another name.
    other = in_ours(base, options)
    load_lora(other, tmp_path, adapter_name="second")
    assert_agree(other, model, base)
    load_lora(other, tmp_path)
    assert_agree(other, model, base)
    set_adapter(other, None)
    assert_same_numbers(logits(other), logits(base))


def test_the_weights_are_the_same_bytes(case, tmp_path):
    base, options = case
    theirs = in_peft(base, options)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = copy.deepcopy(base)
    load_lora(ours, tmp_path / "theirs", adapter_name="named")
    save_lora(ours, tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_adapters_of_a_16_bit_base(tmp_path, dtype):
    torch.manual_seed(0)
    base = llama().eval().to(dtype)
    theirs = in_peft(base, {"r": 4, "target_modules": ["q_proj", "up_proj"]})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    load_lora(ours, tmp_path / "theirs")
    assert {p.dtype for name, p in ours.named_parameters() if "lora_" in name} == {torch.float32}
    save_lora(ours, tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    # Each rounds y once to 16 bits, and the next layers see that.
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_what_transformers_itself_saves(tmp_path):
    torch.manual_seed(0)
    base = llama().eval()
    model = copy.deepcopy(base)
    model.add_adapter(LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False), adapter_name="x")
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(base)
    load_lora(loaded, tmp_path)
    assert_agree(loaded, model, base)
    save_lora(loaded, tmp_path / "again")
    again = copy.deepcopy(base)
    again.load_adapter(str(tmp_path / "again"))
    assert_agree(again, model, base)


def test_both_compute_the_same_gradients(tmp_path):
    torch.manual_seed(0)
    base = llama()
    theirs = in_peft(base, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]})
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_lora(ours, tmp_path)
    ids = torch.arange(14).reshape(2, 7)
    for model in (theirs, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = {n.replace(".weight", ""): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    expected = {
        n.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_embeddings_that_peft_saves_along_are_named(tmp_path):
    model = in_peft(llama(), {"target_modules": ["lm_head"]})
    model.save_pretrained(tmp_path)  # with lm_head and embed_tokens in whole
    assert any("base_layer" in key or "embed_tokens" in key for key in load_file(tmp_path / WEIGHTS))
    with pytest.raises(AdapterFileError, match=r"unknown key .* modules saved whole are not supported"):
        load_lora(llama(), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["classifier"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"target_modules": ["word_embeddings"]},
        {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [0]}},
    ],
    ids=str,
)
def test_what_peft_can_and_this_cannot_is_refused(tmp_path, options):
    torch.manual_seed(0)
    model = get_peft_model(bert(), LoraConfig(**{"r": 2, "target_modules": ["query"], **options}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about what it adds to the file
        model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"(must be|unknown key) "):
        load_lora(bert(), tmp_path)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_residual_initialisation_that_peft_has_converted_is_accepted(tmp_path):
    torch.manual_seed(0)
    base = bert().eval()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "init")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(torch.randn_like(p) * 0.3)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    config = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    load_lora(base, tmp_path / "plain")
    torch.testing.assert_close(logits(base), expected, rtol=1e-3, atol=1e-4)


# Names as models have them: components that repeat, share endings, and count.
COMPONENTS = st.sampled_from(["layers", "h", "attn", "q_proj", "proj", "up", "0", "1", "12", "a_b"])
NAMES = st.lists(COMPONENTS, min_size=1, max_size=6).map(".".join)
PATTERNS = st.one_of(
    NAMES,
    st.sampled_from([r".*proj", r"layers\.\d+\..*", r"(q_)?proj", r"^up", r".*\.(up|attn)", r"h.1", "layers|up"]),
)


@settings(max_examples=500, deadline=None)
@given(
    name=NAMES,
    targets=st.one_of(PATTERNS, st.lists(NAMES, min_size=1, max_size=4)),
    excluded=st.one_of(st.none(), PATTERNS, st.lists(NAMES, max_size=3)),
    indices=st.one_of(st.none(), st.lists(st.integers(0, 12), min_size=1, max_size=3)),
    after=st.one_of(st.none(), st.just([]), st.lists(st.sampled_from(["layers", "h", "attn"]), min_size=1, max_size=2)),
)
def test_names_are_matched_as_peft_matches_them(name, targets, excluded, indices, after):
    if isinstance(targets, str) or indices is None:
        indices = after = None  # PEFT refuses these together
    config = LoraConfig(
        target_modules=targets, exclude_modules=excluded, layers_to_transform=indices, layers_pattern=after
    )
    try:
        expected = check_target_module_exists(config, name)
    except UnboundLocalError:  # PEFT, where layers_pattern comes with an index and no pattern of it matches
        expected = False
    ours = Targets(targets, excluded, indices, after or ())
    ours.check()
    assert (ours.wants(name) and not ours.excludes(name)) == bool(expected)


@settings(max_examples=300, deadline=None)
@given(name=NAMES, patterns=st.dictionaries(PATTERNS, st.integers(1, 99), max_size=4))
def test_patterns_are_matched_as_peft_matches_them(name, patterns):
    assert pattern_value(patterns, name, 0) == patterns.get(get_pattern_key(patterns.keys(), name), 0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_chosen_is_chosen_again_by_the_config_that_is_saved(data, tmp_path_factory):
    """Any subset of a model's linears, with any ranks: PEFT and this package find it in the file."""
    base = Plain()
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    chosen = data.draw(st.sets(st.sampled_from(names), min_size=1))
    ranks = {f"^{re.escape(name)}": data.draw(st.integers(1, 3)) for name in sorted(chosen)}
    alphas = {f"^{re.escape(name)}": data.draw(st.sampled_from([1, 8, 2.5])) for name in sorted(chosen)}
    model = copy.deepcopy(base)
    add_lora(model, target_modules="|".join(map(re.escape, sorted(chosen))), rank_pattern=ranks, alpha_pattern=alphas)
    path = Path(tmp_path_factory.mktemp("adapter"))
    save_lora(model, path)
    loaded = copy.deepcopy(base)
    load_lora(loaded, path)
    assert settings_in_ours(loaded) == settings_in_ours(model)
    assert settings_in_peft(PeftModel.from_pretrained(copy.deepcopy(base), path)) == settings_in_ours(model)
    assert {place.name for place in places(loaded) if isinstance(place.module, LoRALinear)} == chosen
