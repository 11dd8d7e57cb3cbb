"""The starter model and dataset: a first run within a minute, on a processor, without a download.

A small Qwen3 with random weights and a byte-level tokenizer learnt from the starter texts, both built on this
machine. The same Python, torch and tokenizers give the same bytes. Runs in the worker; called by `python -m trainer
starter`.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.files import fsync_dir, write_bytes
from trainer.models.inspect import inspect_model, sentence
from trainer.models.starter_data import as_jsonl, starter_rows
from trainer.refusal import Refusal

MODEL_NAME = "starter-qwen3"
DATASET_NAME = "starter-chat.jsonl"
SEED = 2024
VOCABULARY = 4096
MAX_POSITIONS = 2048
END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write_starter(models_root: Path, datasets_root: Path) -> tuple[Path, Path]:
    """Make `models_root/starter-qwen3` and `datasets_root/starter-chat.jsonl`; returns both paths.

    What is there and whole is kept. Raises Refusal when the model's folder is there but cannot be trained.
    """
    model, dataset = models_root / MODEL_NAME, datasets_root / DATASET_NAME
    datasets_root.mkdir(parents=True, exist_ok=True)
    models_root.mkdir(parents=True, exist_ok=True)
    if model.exists() and not (report := inspect_model(model))["valid"]:
        raise Refusal(
            f"{MODEL_NAME} is there but damaged. {sentence(report)} Rename or remove the folder, then try again."
        )
    if model.exists() and dataset.exists():
        return model, dataset
    rows = starter_rows()
    if not dataset.exists():
        write_bytes(dataset, as_jsonl(rows))
    if not model.exists():
        staging = models_root / f".{MODEL_NAME}.{secrets.token_hex(4)}.tmp"
        try:
            build_model(staging, texts_of(rows))
            staging.rename(model)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        fsync_dir(models_root)
    return model, dataset


def texts_of(rows: list[dict[str, Any]]) -> list[str]:
    """All contents of the rows, in order."""
    return [message["content"] for row in rows for message in row["messages"]]


def build_model(path: Path, texts: Iterable[str]) -> None:
    """Write a complete model folder: tokenizer, template, config, generation config, seeded random weights (fp32)."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer(texts)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen3ForCausalLM(config)
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)


def build_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer of VOCABULARY tokens with ChatML's three special ones; end of turn is the eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token=END_OF_TURN, pad_token=END_OF_TEXT, model_max_length=MAX_POSITIONS
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
