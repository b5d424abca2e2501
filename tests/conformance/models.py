"""Small random models in a local hub cache, under the ids that PEFT's tests ask for: nothing is downloaded.

Architectures and module names are the real ones; sizes and weights are not. `write` is run once for each content of
this file.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

REVISION = "0" * 40

# pad: not a token of the test inputs, because its embedding is zero.
TEXT = {
    "vocab_size": 1024,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
LLAMA = TEXT | {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
OPT = TEXT | {
    "init_std": 0.1,  # enough for an adapter to change which token is next
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
GPT2 = {"vocab_size": 1024, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4} | {
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
BERT = {
    "vocab_size": 1124,
    "max_position_embeddings": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 3,
}
T5 = {
    "vocab_size": 1103,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = TEXT | {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "decoder_start_token_id": 2,
}

# id: (model class, configuration class, its arguments).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base-uncased": ("BertForSequenceClassification", "BertConfig", BERT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        LLAMA | {"head_dim": 8, "sliding_window": 32},
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", LLAMA),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        "OPTConfig",
        OPT | {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 12},
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 1024, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", BERT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", GPT2 | {"rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        BERT | {"vocab_size": 1024},
    ),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", BERT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", "T5Config", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
    ),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        LLAMA,
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 8}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
}


def tokenizer() -> Any:
    """Words to the numbers from 4 on, most of them unknown: enough for tests that want tokens, whichever they are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<unk>", "</s>", "<pad>", *["the", "a", "model", "in", "is", "of", "and", "to", "Python"]]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


def write(hub: Path) -> None:
    """Every model of MODELS in `hub`, laid out as huggingface_hub's cache is; nothing where they are there already."""
    stamp = hub / ".written-by"
    content = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == content:
        return
    shutil.rmtree(hub, ignore_errors=True)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name, (model_class, config_class, arguments) in MODELS.items():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
        folder = hub / f"models--{name.replace('/', '--')}"
        model.save_pretrained(folder / "snapshots" / REVISION)
        tokenizer().save_pretrained(folder / "snapshots" / REVISION)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION, encoding="utf-8")
    stamp.write_text(content, encoding="utf-8")
