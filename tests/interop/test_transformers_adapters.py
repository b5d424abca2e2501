"""add_lora on models of transformers': training, generation, checkpointing, Trainer, what is saved."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from lora_kernels import (
    LoRALinear,
    add_lora,
    load_lora,
    merge_lora,
    save_lora,
    set_adapter,
    unload_lora,
    unmerge_lora,
)
from tests.equality import assert_same_numbers

# The names that every version of transformers 5 has; the newest has given them another one.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")

VOCABULARY = 61


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
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
            pad_token_id=2,
            **options,
        )
    )


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
        )
    )


IDS = torch.arange(3, 17).reshape(2, 7)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_all_linear_leaves_the_output_layer_out():
    model = llama()
    report = add_lora(model, r=2, target_modules="all-linear")
    assert len(report.modules) == 2 * 7
    assert not isinstance(model.lm_head, LoRALinear)
    assert report.base == sum(p.numel() for p in llama().parameters())


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["default", "plain", "reentrant"])
def test_gradient_checkpointing(reentrant):
    model = llama().train()
    add_lora(model, r=2, target_modules=ATTENTION, init_lora_weights=False)
    expected = gradients(model)
    assert all("lora_" in name for name in expected)
    if reentrant is None:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # Of a block whose inputs require no gradient this kind computes none, and all that is before it is frozen.
        model.enable_input_require_grads()
    found = gradients(model)
    assert_same_numbers(found, expected)


def test_checkpointing_draws_the_dropout_mask_again():
    model = llama().train()
    add_lora(model, r=2, target_modules=ATTENTION, lora_dropout=0.5, init_lora_weights=False)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(gradients(model))
        model.gradient_checkpointing_enable()
    assert_same_numbers(*runs)


@pytest.mark.parametrize("merged", [False, True])
def test_generate(merged):
    model = llama().eval()
    plain = model.generate(IDS, max_new_tokens=5, do_sample=False)
    add_lora(model, r=4, lora_alpha=64, target_modules=ATTENTION, init_lora_weights=False)
    if merged:
        merge_lora(model)
    found = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert not torch.equal(found, plain)
    # Token by token, without the cache: what the model's logits say.
    expected = IDS
    for _ in range(5):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)
    unmerge_lora(model)
    set_adapter(model, None)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), plain)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(6) * 7 + index) % VOCABULARY
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(index % 2)}


def trainer_of(model, path, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path, checkpointing):
    model = bert()
    base = copy.deepcopy(model).eval()
    add_lora(model, r=2, target_modules=["query", "value"], lora_dropout=0.1)
    model.classifier.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = trainer_of(model, tmp_path, gradient_checkpointing=checkpointing).train()
    assert result.global_step == 2
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # In two steps lora_A moves, too: after the first, lora_B is no longer zero.
    assert moved == {name for name in before if "lora_" in name or name.startswith("classifier")}
    # The adapter by itself, and the head that was trained beside it, as a state_dict.
    save_lora(model, tmp_path / "adapter", task_type="SEQ_CLS")
    base.classifier.load_state_dict(model.classifier.state_dict())
    load_lora(base, tmp_path / "adapter")
    model.eval()
    assert_same_numbers(base(IDS).logits, model(IDS).logits)


def test_a_merged_model_is_saved_as_transformers_saves_it(tmp_path):
    model = llama().eval()
    add_lora(model, r=2, target_modules="all-linear", init_lora_weights=False)
    merge_lora(model)
    expected = model(IDS).logits
    unload_lora(model)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_numbers(loaded(IDS).logits, expected)


def test_a_tied_output_layer_stays_tied(tmp_path):
    model = llama(tie_word_embeddings=True).eval()
    embedding = model.get_input_embeddings().weight
    add_lora(model, r=2, target_modules=["lm_head"], init_lora_weights=False)
    assert model.lm_head.weight is embedding
    with torch.no_grad():
        y = model(IDS).logits
        merge_lora(model)
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-5)
    assert model.get_input_embeddings().weight is embedding
    unmerge_lora(model)
    assert model.lm_head.weight is embedding
    # Merged for good, it is no longer tied, and the config has to say so.
    merge_lora(model)
    unload_lora(model)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_numbers(loaded(IDS).logits, model(IDS).logits)


def test_a_vision_model():
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    report = add_lora(model, r=2, target_modules="all-linear", exclude_modules=["classifier"])
    assert [module.name for module in report.modules] == [name for name in linears if name != "classifier"]
    model(torch.randn(3, 1, 8, 8)).logits.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_the_adapter_of_a_peft_model_of_transformers_is_refused():
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        NotImplementedError, match=r"^model must not hold PEFT's layers; got 'model.layers.0.self_attn.q"
    ):
        add_lora(model, target_modules=["v_proj"])
