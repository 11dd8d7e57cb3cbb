"""The starter model and data: complete, the same bytes each time, no machine path, and a loss that falls at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.models.inspect import inspect_model
from trainer.models.starter import DATASET_NAME, MODEL_NAME, texts_of, write_starter
from trainer.refusal import Refusal

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The starter model's folder and the starter dataset, made here."""
    root = tmp_path_factory.mktemp("starter")
    return write_starter(root / "models", root / "datasets")


@pytest.fixture(scope="module")
def rows(starter: tuple[Path, Path]) -> list[dict[str, Any]]:
    """The dataset's rows."""
    return [json.loads(line) for line in starter[1].read_text("utf-8").splitlines()]


def bytes_of(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_starter_model_is_a_small_valid_qwen3(starter: tuple[Path, Path]) -> None:
    model, dataset = starter
    assert (model.name, dataset.name) == (MODEL_NAME, DATASET_NAME) == ("starter-qwen3", "starter-chat.jsonl")
    report = inspect_model(model, deep=True)
    assert report["valid"] and report["warnings"] == []
    facts = report["facts"]
    assert facts["model_type"] == "qwen3" and facts["tied"] is True and facts["has_chat_template"]
    assert 1_000_000 < facts["parameters"] < 5_000_000 and facts["tokens"] == facts["embedding_rows"] == 4096
    assert [path.name for path in model.parent.iterdir()] == [MODEL_NAME]


def test_a_second_build_in_another_process_gives_the_same_bytes(starter: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.models.starter import write_starter;"
        "write_starter(Path(sys.argv[1]) / 'models', Path(sys.argv[1]) / 'datasets')"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "2", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, check=True)
    assert bytes_of(tmp_path) == bytes_of(starter[0].parent.parent)


def test_a_second_call_keeps_what_is_whole_and_refuses_what_is_damaged(starter: tuple[Path, Path]) -> None:
    model, dataset = starter
    before = {path: path.stat().st_mtime_ns for path in [dataset, *model.iterdir()]}
    assert write_starter(model.parent, dataset.parent) == starter
    assert {path: path.stat().st_mtime_ns for path in [dataset, *model.iterdir()]} == before
    weights = (model / "model.safetensors").read_bytes()
    try:
        (model / "model.safetensors").write_bytes(weights[:-8])
        with pytest.raises(Refusal, match="damaged.*cut off"):
            write_starter(model.parent, dataset.parent)
    finally:
        (model / "model.safetensors").write_bytes(weights)


def test_the_rows_are_valid_chats_of_many_shapes(rows: list[dict[str, Any]]) -> None:
    assert 3000 < len(rows) <= 6000
    shapes: Counter[str] = Counter()
    for row in rows:
        assert list(row) == ["messages"]
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])
        shapes["system"] += roles[0] == "system"
        shapes["several turns"] += len(turns) > 2
    assert shapes["system"] > 200 and shapes["several turns"] > 200
    lengths = sorted(sum(len(message["content"]) for message in row["messages"]) for row in rows)
    assert lengths[-1] > 8 * lengths[len(lengths) // 2], "a few long rows among many short ones"
    assert len({json.dumps(row) for row in rows}) > 0.97 * len(rows)


def test_no_path_of_this_machine_is_in_the_texts(rows: list[dict[str, Any]], starter: tuple[Path, Path]) -> None:
    text = "\n".join(texts_of(rows))
    for place in (sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"], str(Path.home()), str(ROOT)):
        assert len(place) < 6 or place not in text
    assert not re.search(r"site-packages/|/tmp/|\.pyenv", text)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert str(starter[0].parent) not in (starter[0] / name).read_text()


def test_the_tokenizer_round_trips_and_its_template_is_chatml(
    starter: tuple[Path, Path], rows: list[dict[str, Any]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(starter[0])
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for text in [*texts_of(rows)[:200], "héllo  wörld 🤔\t\n", "\x00", "日本語"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True) == expected
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected + "A<|im_end|>\n"
    assert all(len(tokenizer.encode(token)) == 1 for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))


def test_the_loss_falls_within_a_few_steps(starter: tuple[Path, Path], rows: list[dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(starter[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(starter[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for step in range(16):
            chats = [row["messages"] for row in rows[step * 8 : step * 8 + 8]]
            batch = tokenizer.apply_chat_template(
                chats, return_tensors="pt", return_dict=True, padding=True, truncation=True, max_length=96
            )
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert 8 < losses[0] < 8.7, "a fresh model guesses among 4096 tokens: ln 4096 is 8.3"
    assert sum(losses[-4:]) / 4 < losses[0] - 2.5
