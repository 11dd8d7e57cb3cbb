"""Tiny complete model directories for tests: config, safetensors, byte-level BPE tokenizer, ChatML template.
Any test module may import it; torch and transformers are imported when a function is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ARCHITECTURES = (
    "qwen3",
    "llama",
    "mistral",
    "gemma",
    "phi3",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "gemma2",
    "granite",
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)
_CORPUS = (
    "system user assistant",
    "The quick brown fox jumps over the lazy dog while seven wizards watch the running train.",
    "A signal box is the building from which the points and signals of a railway are worked.",
    "What is the capital of France? The capital of France is Paris. What is two plus two? It is four.",
    "Question: how do I open a file in Python? Answer: call open with the name of the file and a mode.",
    "Training a small model takes a few steps, and the loss falls when one batch is repeated.",
)


def tiny_tokenizer(path: Path, vocab: int = 384) -> Path:
    """Write a byte-level BPE tokenizer with ChatML's three special tokens and a chat template into `path`.

    At most `vocab` tokens (at least 259: 256 bytes and 3 special ones). eos is <|im_end|>, pad is
    <|endoftext|>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    fast.chat_template = CHATML
    path.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(path)
    return path


def tiny_config(architecture: str, vocab: int, *, hidden: int, layers: int, tied: bool) -> Any:
    """The transformers config of a tiny causal model; raises KeyError for an architecture not in
    ARCHITECTURES."""
    import transformers

    assert architecture in ARCHITECTURES, f"unknown architecture {architecture}"
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": tied}
    sizes = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": hidden * 2,
        "num_hidden_layers": layers, "num_attention_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    groups = {"num_key_value_heads": 2}
    heads = {"head_dim": hidden // 4}
    if architecture == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab, n_embd=hidden, n_layer=layers, n_head=4, n_positions=512, **ids
        )
    if architecture == "gpt_neox":
        return transformers.GPTNeoXConfig(**sizes, **ids)
    classes = {
        "qwen3": transformers.Qwen3Config,
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "gemma": transformers.GemmaConfig,
        "gemma2": transformers.Gemma2Config,
        "phi3": transformers.Phi3Config,
        "mixtral": transformers.MixtralConfig,
        "granite": transformers.GraniteConfig,
    }
    extra: dict[str, Any] = {}
    if architecture in ("qwen3", "gemma", "gemma2"):
        extra |= heads
    if architecture == "gemma2":
        extra |= {"query_pre_attn_scalar": hidden // 4, "sliding_window": 64}
    if architecture == "mistral":
        extra |= {"sliding_window": None}
    if architecture == "mixtral":
        extra |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if architecture == "granite":
        extra |= {"logits_scaling": 2.0, "embedding_multiplier": 3.0}
    return classes[architecture](**sizes, **groups, **ids, **extra)


def tiny_model_dir(
    path: Path,
    architecture: str = "qwen3",
    *,
    hidden: int = 64,
    layers: int = 2,
    vocab: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    tied: bool = True,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a complete model directory of a few hundred thousand random weights and return `path`.

    `vocab` is the number of embedding rows (None: as many as the tokenizer has tokens); `dtype` a torch
    dtype's name; `max_shard_size` such as "100KB" makes several shards and an index. Torch's global RNG is
    left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tiny_tokenizer(path)
    rows = len(AutoTokenizer.from_pretrained(path)) if vocab is None else vocab
    config = tiny_config(architecture, rows, hidden=hidden, layers=layers, tied=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def tiny_adapter_dir(path: Path, base: Path, *, base_name: str | None = None, seed: int = 0) -> Path:
    """Write a LoRA adapter of `base` as peft saves it; `base_name` replaces the base's path in
    adapter_config.json."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        )
    model.peft_config["default"].base_model_name_or_path = base_name or str(base)
    model.save_pretrained(path)
    return path
