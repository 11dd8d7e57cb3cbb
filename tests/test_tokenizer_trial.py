"""Tokenizer and template are tried once: every layout, special tokens without a row, templates that fail, reach out or
never end. The worker's limits hold them."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.both_verdicts import contents, judged
from tests.damage import change_json, codes, write_file
from tests.worker_kit import LOOP
from trainer.models import full_report as full_report_module
from trainer.models.full_report import full_report
from trainer.models.inspect import inspect_model
from trainer.worker import Worker

pytest_plugins = ("tests.model_fixtures",)


def only(path: Path, **files: str) -> Path:
    """The folder with these tokenizer files in place of its own; `__` in a name stands for a dot."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (path / name).unlink(missing_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content, "utf-8")
    return path


def warned(report: dict[str, Any]) -> list[str]:
    """The codes of the warnings."""
    return [item["code"] for item in report["warnings"]]


def test_the_halves_of_a_byte_level_tokenizer_are_a_whole_one(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    model = json.loads((path / "tokenizer.json").read_text("utf-8"))["model"]
    merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    only(
        path, vocab__json=json.dumps(model["vocab"]), merges__txt=f"#version: 0.2\n{merges}\n",
        tokenizer_config__json='{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}',
    )  # fmt: skip
    report = judged(path)
    assert codes(report) == [] and warned(report) == ["no_chat_template"] and report["facts"]["tokens"] == 384


def test_a_list_of_words_is_a_tokenizer(copy_of_model: Callable[[str], Path]) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "signal", "box", "."]
    path = only(
        copy_of_model("single"), vocab__txt="\n".join(words) + "\n",
        tokenizer_config__json='{"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"}',
    )  # fmt: skip
    report = judged(path)
    assert codes(report) == [] and report["facts"]["tokens"] == len(words)


def test_a_tokenizer_of_unreadable_bytes_is_named(copy_of_model: Callable[[str], Path]) -> None:
    path = only(copy_of_model("single"), tokenizer_config__json='{"tokenizer_class": "LlamaTokenizer"}')
    (path / "tokenizer.model").write_bytes(b"\x0a\x05abc" * 9)
    report = judged(path)
    assert codes(report) == ["tokenizer_does_not_load"] and report["problems"][0]["file"] == "tokenizer.model"
    assert "tokenizer.json" in report["problems"][0]["fix"] and "sentencepiece" in report["problems"][0]["fix"]


def test_a_tokenizer_that_transformers_makes_out_of_nothing_is_no_tokenizer(
    copy_of_model: Callable[[str], Path],
) -> None:
    path = only(copy_of_model("single"), tokenizer_config__json='{"tokenizer_class": "LlamaTokenizer"}')
    (path / "qwen.tiktoken").write_text("QQ== 0\nQg== 1\n")  # not read by this class, which then has three tokens
    report = judged(path)
    assert codes(report) == ["bad_tokenizer"] and report["problems"][0]["file"] == "qwen.tiktoken"


def test_a_class_of_its_own_is_not_run_and_does_not_load(copy_of_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = copy_of_model("single")
    (path / "tokenization_own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Own: pass\n")
    change_json(
        path / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["tokenization_own.Own", None]},
    )
    report = judged(path)
    assert "auto_map" in warned(report) and not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("name", "is_problem"), [("eos_token", True), ("bos_token", True), ("pad_token", False), ("unk_token", False)]
)
def test_a_special_token_without_a_row_is_named(
    name: str, is_problem: bool, copy_of_model: Callable[[str], Path]
) -> None:
    path = copy_of_model("single")
    change_json(path / "tokenizer_config.json", **{name: "<|never seen|>"})
    report = judged(path)
    assert codes(report) == (["special_token_without_row"] if is_problem else [])
    found = (report["problems"] + report["warnings"])[0]
    assert found["code"] == "special_token_without_row" and found["message"].startswith(f"{name} ('<|never seen|>')")
    assert "384" in found["message"]


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{% if %}", "cannot"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot"),
        ("{{ cycler.__init__.__globals__.os.system('touch canary') }}", "cannot"),
        ("{{ 'no content at all' }}", ""),
    ],
)
def test_a_template_that_fails_is_a_warning_since_chatml_is_left(
    template: str, word: str, copy_of_model: Callable[[str], Path]
) -> None:
    path = copy_of_model("single")
    write_file("chat_template.jinja", template)(path)
    before = contents(path)
    report = judged(path)
    assert codes(report) == [] and warned(report) == ["template_fails"] and contents(path) == before
    found = report["warnings"][0]
    assert word in found["message"] and "plain ChatML" in found["fix"] and found["file"] == "chat_template.jinja"


@pytest.mark.parametrize("template", [LOOP, pytest.param("{{ 'x' * 9999999999 }}", marks=pytest.mark.slow)])
def test_a_template_that_never_ends_or_takes_all_memory_is_ended(
    template: str, copy_of_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_report_module, "TRIAL_S", 12.0)
    path = copy_of_model("single")
    write_file("chat_template.jinja", template)(path)
    worker = Worker(memory_bytes=2 * 1024**3)
    start_s = time.monotonic()
    try:
        report = full_report(worker.call, path)
    finally:
        worker.close()
    assert time.monotonic() - start_s < 60
    assert report["valid"] and warned(report) in (["template_never_ends"], ["template_fails"])
    assert report["facts"]["shapes"] == "as expected", "the rest is judged all the same"


def test_padding_that_is_the_end_and_no_end_at_all_are_warnings(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    change_json(path / "tokenizer_config.json", pad_token="<|im_end|>")
    assert warned(judged(path)) == ["pad_is_eos"]
    change_json(path / "tokenizer_config.json", eos_token=None)
    assert "no_eos_token" in warned(judged(path))


def test_a_setting_of_the_wrong_type_is_said_and_not_a_crash(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    change_json(path / "tokenizer_config.json", model_max_length={"a": 1})
    assert codes(judged(path)) == ["bad_tokenizer"]
    path = copy_of_model("sharded")
    change_json(path / "config.json", eos_token_id="two")
    report = judged(path)
    assert codes(report) == ["cannot_build"] and report["problems"][0]["file"] == "config.json"
    assert "eos_token_id" in report["problems"][0]["message"] and report["facts"]["shapes"] == "unknown"


ODD = [
    None,
    True,
    -1,
    1.5,
    2**40,
    "",
    "x" * 300,
    "../..",
    "\x00",
    [],
    {},
    [None],
    {"a": None},
    {"a": {"b": [1]}},
    [1, "a"],
]


def changed(value: Any, draw: random.Random, depth: int = 0) -> Any:
    """JSON with one value, at any depth, replaced by an odd one."""
    if isinstance(value, dict) and value and (depth < 1 or draw.random() < 0.6):
        key = draw.choice(list(value))
        return value | {key: changed(value[key], draw, depth + 1) if draw.random() < 0.4 else draw.choice(ODD)}
    if isinstance(value, list) and value and draw.random() < 0.6:
        at = draw.randrange(len(value))
        return [*value[:at], changed(value[at], draw, depth + 1), *value[at + 1 :]]
    return draw.choice(ODD)


def test_no_content_of_the_json_files_makes_a_verdict_crash(good_models: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(good_models["single"].parent, tmp_path / "models"))
    draw = random.Random(5)
    files = [file for name in ("single", "sharded", "lora") for file in sorted((root / name).glob("*.json"))]
    for number in range(300):
        file = draw.choice(files)
        source = file.read_bytes()
        file.write_text(json.dumps(changed(json.loads(source), draw)), "utf-8")
        judge = judged if number % 3 == 0 else inspect_model
        report = judge(file.parent, model_roots=[root])
        assert report["valid"] == (not report["problems"])
        file.write_bytes(source)
