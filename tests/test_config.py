"""Config files: what is read, what is refused and in which words, layers, comparing, saving and backups."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer import config as c
from trainer.config import Config, ConfigError, ConfigLoader, fields
from trainer.refusal import Refusal
from trainer.settings_doc import settings_markdown
from trainer.values import figure_text, nested

REPOSITORY = Path(__file__).parent.parent
KEYS = [info.key for info in fields()]


def written(folder: Path, content: Any) -> Path:
    path = folder / "my.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refusal(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        ConfigLoader.load(path)
    return caught.value


def test_the_shipped_config_loads_and_says_only_sparse_things() -> None:
    sparse = c.load_sparse(REPOSITORY / "config.json")
    assert ConfigLoader.load(REPOSITORY / "config.json").hyperparams.use_gradient_checkpointing is True
    assert sparse["model_path"] == "" and sparse["data"]["dataset_path"] == ""
    assert c.retired(REPOSITORY / "config.json") == []


def test_paths_in_a_config_are_relative_to_the_config_file(tmp_path: Path) -> None:
    content = {
        "model_path": "models/a",
        "data": {
            "dataset_path": "rows.jsonl",
            "validation_dataset_path": "/data/v.jsonl",
            "dataset_paths": [{"path": "more.jsonl", "weight": 0.5}],
        },
    }
    loaded = ConfigLoader.load(written(tmp_path, content))
    assert loaded.model_path == str(tmp_path / "models/a")
    assert [f.path for f in loaded.data.files] == [str(tmp_path / "rows.jsonl"), str(tmp_path / "more.jsonl")]
    assert loaded.data.validation_dataset_path == "/data/v.jsonl"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"hyperparams": {"learning_rate": 5}},
            "hyperparams.learning_rate: learning rate is 5. Allowed: 0 to 1.",
        ),
        ({"hyperparams": {"learning_rate": "fast"}}, 'learning rate is "fast". Allowed: 0 to 1.'),
        ({"hyperparams": {"batch_size": True}}, "micro-batch is true. Allowed: whole numbers, 1 to 1,024."),
        ({"hyperparams": {"batch_size": 2.5}}, "micro-batch is 2.5. Allowed: whole numbers, 1 to 1,024."),
        (
            {"hyperparams": {"fp_precision": "int3"}},
            'precision is "int3". Allowed: auto, bf16, fp16 or fp32.',
        ),
        ({"hyperparams": {"packing": "maybe"}}, 'packing is "maybe". Allowed: true or false.'),
        ({"hyperparams": {"num_epochs": 0}}, "epochs is 0. Allowed: more than 0, up to 1,000."),
        ({"lora": {"dropout": 1}}, "LoRA dropout is 1. Allowed: 0 to less than 1."),
        ({"model_path": 5}, "model is 5. Allowed: text."),
        ({"eval": {"sample_prompts": [1]}}, "sample prompts, entry 1 is 1. Allowed: a list of texts."),
        (
            {"data": {"dataset_paths": [{"path": "x", "weight": 0}]}},
            "entry 1: weight is 0. Allowed: more than 0",
        ),
        ({"data": {"dataset_paths": [{"weight": 1}]}}, "entry 1 has no path."),
        ({"data": {"dataset_paths": [{"path": "x", "wieght": 1}]}}, 'has the unknown key "wieght"'),
        ({"hyperparams": {"learning_rat": 1}}, "Closest: hyperparams.learning_rate."),
        ({"warmup": 1, "notfy": {}}, 'there is no setting "notfy"'),
        ({"hyperparams": []}, "hyperparams is []. Allowed: a group of settings in { }."),
        (
            {"hyperparams": {"fp_precision": "fp16", "master_weights": "none"}},
            "fp16 needs fp32 master weights",
        ),
        ('{"hyperparams": {"learning_rate": NaN}}', "learning rate is NaN. Allowed: 0 to 1."),
        ('{"hyperparams": {"learning_rate": 1e999}}', "learning rate is infinity."),
        ('{"model_name": "\\ud800"}', "model name is"),
        ('{"model_path": "a\\u0000b"}', "Allowed: text without zero bytes"),
    ],
)
def test_a_refusal_names_key_value_and_what_is_allowed(tmp_path: Path, content: Any, says: str) -> None:
    error = refusal(written(tmp_path, content))
    assert says in error.message
    assert error.message.startswith("my.json: ")
    for foreign in ("pydantic", "Input should", "type=", "loc"):
        assert foreign not in error.message


def test_every_wrong_value_is_named_not_only_the_first(tmp_path: Path) -> None:
    error = refusal(written(tmp_path, {"hyperparams": {"learning_rate": 5, "batch_size": 0}, "lora": {"r": 0}}))
    assert [p.field for p in error.problems] == [
        "hyperparams.batch_size",
        "hyperparams.learning_rate",
        "lora.r",
    ]
    assert isinstance(error, Refusal) and error.field == "hyperparams.batch_size"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1,\n\n "b": }', "line 3 is not JSON"),
        ("", "line 1 is not JSON"),
        ("[1]", "a config is a group of settings in { }"),
        ("[" * 100_000, "nested too deeply"),
        ('{"max_length": ' + "9" * 5000 + "}", "thousands of digits"),
        ('{"a": 1, "a": 2}', "a: this key stands twice"),
        ('{"hyperparams": {"learning_rate": 1, "learning_rate": 1}}', "learning_rate: this key stands twice"),
        ('{"hyperparams.learning_rate": 1}', 'write {"hyperparams": {…}}'),
    ],
)
def test_a_file_that_is_not_a_config_is_one_clear_sentence(tmp_path: Path, content: str, says: str) -> None:
    assert says in refusal(written(tmp_path, content)).message


def test_a_missing_file_a_folder_and_a_foreign_encoding_are_refused_by_name(tmp_path: Path) -> None:
    assert str(tmp_path / "none.json") in refusal(tmp_path / "none.json").message
    assert "is a directory" in refusal(tmp_path).message
    (tmp_path / "latin.json").write_bytes('{"model_name": "Müller"}'.encode("latin-1"))
    assert "it is not UTF-8 text" in refusal(tmp_path / "latin.json").message
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + b'{"model_name": "x"}')
    assert ConfigLoader.load(tmp_path / "bom.json").model_name == "x"


def test_later_layers_win_and_unnamed_settings_keep_what_was_there() -> None:
    from_file = {
        "hyperparams": {"learning_rate": 1e-3, "batch_size": 8},
        "lora": {"target_modules": ["q", "k"]},
    }
    from_form = {"hyperparams": {"learning_rate": 2e-3}, "lora": {"target_modules": ["v"]}}
    from_set = c.parse_set("hyperparams.learning_rate=3e-3")
    assert c.resolve(from_file).hyperparams.learning_rate == 1e-3
    assert c.resolve(from_file, from_form).hyperparams.learning_rate == 2e-3
    together = c.resolve(from_file, from_form, from_set)
    assert together.hyperparams.learning_rate == 3e-3
    assert together.hyperparams.batch_size == 8 and together.lora.target_modules == ["v"]
    assert together.hyperparams.warmup_steps == Config().hyperparams.warmup_steps
    assert from_file["hyperparams"]["learning_rate"] == 1e-3, "a layer was changed"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("hyperparams.learning_rate", "2e-4", 2e-4),
        ("hyperparams.learning_rate", " 0.0002 ", 2e-4),
        ("hyperparams.max_steps", "", None),
        ("hyperparams.max_steps", "none", None),
        ("hyperparams.max_steps", "2e3", 2000),
        ("hyperparams.packing", "on", True),
        ("hyperparams.packing", "false", False),
        ("profile.name", "", None),
        (
            "eval.sample_prompts",
            "What is 2 + 2?\n\nName a colour, any.",
            ["What is 2 + 2?", "Name a colour, any."],
        ),
        ("lora.target_modules", '["q_proj"]', ["q_proj"]),
        (
            "data.dataset_paths",
            "a.jsonl\nb.jsonl * 0.5",
            [{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 0.5}],
        ),
    ],
)
def test_text_from_a_person_becomes_a_value(key: str, text: str, value: Any) -> None:
    assert c.parse_value(key, text) == value
    assert c.parse_set(f"{key}={text}") == nested(key, value)


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("hyperparams.learning_rate", "5", "learning rate is 5. Allowed: 0 to 1."),
        ("hyperparams.learning_rate", "", 'learning rate is "". Allowed: 0 to 1.'),
        ("hyperparams.learning_rate", "nan", 'learning rate is "nan". Allowed: 0 to 1.'),
        ("hyperparams.batch_size", "1e99", "Allowed: whole numbers, 1 to 1,024."),
        ("hyperparams.batch_size", "9" * 9999, "Allowed: whole numbers, 1 to 1,024."),
        ("hyperparams.packing", "perhaps", "Allowed: true or false."),
        ("data.dataset_paths", "[1", "Allowed: a list of files"),
        ("hyperparams.learning_rat", "1", "Closest: hyperparams.learning_rate."),
    ],
)
def test_text_that_a_setting_does_not_allow_is_refused(key: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        c.parse_value(key, text)
    assert says in caught.value.message and caught.value.field == key


def test_set_without_an_equals_sign_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no '='"):
        c.parse_set("hyperparams.packing")


def test_the_differences_of_two_configs_are_listed_with_their_titles() -> None:
    before, after = c.resolve({}), c.resolve({"hyperparams": {"learning_rate": 1e-5}, "model_name": "x"})
    changes = [(d.field, d.title, d.before, d.after) for d in c.diff(before, after)]
    assert changes == [
        ("model_name", "Model name", "", "x"),
        ("hyperparams.learning_rate", "Learning rate", 2e-4, 1e-5),
    ]
    assert c.diff(after, after) == []


def test_each_overwrite_leaves_a_backup_and_a_backup_can_be_put_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for rate in (1e-3, 2e-3, 3e-3):
        c.save(path, {"hyperparams": {"learning_rate": rate}})
    (tmp_path / "backups" / "mine.old.json").write_text("{}")  # not one of ours: its name has no time
    found = c.backups(path)
    assert [c.load_sparse(p)["hyperparams"]["learning_rate"] for p in found] == [2e-3, 1e-3]
    c.restore(found[1], path)
    assert ConfigLoader.load(path).hyperparams.learning_rate == 1e-3
    assert ConfigLoader.load(c.backups(path)[0]).hyperparams.learning_rate == 3e-3, "what was replaced is lost"


def test_a_refused_save_leaves_the_file_and_makes_no_backup(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    c.save(path, {"model_name": "kept"})
    with pytest.raises(ConfigError):
        c.save(path, {"hyperparams": {"learning_rate": 5}})
    assert ConfigLoader.load(path).model_name == "kept" and c.backups(path) == []


def test_only_a_backup_of_the_same_config_can_be_put_back(tmp_path: Path) -> None:
    other = tmp_path / "secret.json"
    other.write_text("{}")
    path = tmp_path / "mine.json"
    c.save(path, {})
    with pytest.raises(ConfigError, match="not a backup of mine.json"):
        c.restore(other, path)


def test_the_settings_document_is_what_the_schema_says() -> None:
    text = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert text == settings_markdown(), "run: python -m trainer.settings_doc > docs/settings.md"
    assert all(f"`{key}`" in text for key in KEYS)


def test_every_help_text_fits_its_line() -> None:
    assert [info.key for info in fields() if len(info.help) > 110] == []


def test_reading_configs_does_not_import_torch() -> None:
    code = "import sys, trainer.config, trainer.workspace; print(sorted({'torch', 'gradio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=2),
    st.integers(0, 4),
    st.floats(0, 2),
    st.sampled_from(["1e-3", "lora", "full", "bf16", "no", 10**400]),
)


def within_bounds(config: Config) -> None:
    for info in fields():
        value = c.get(config, info.key)
        if info.kind in ("whole", "real") and value is not None:
            assert math.isfinite(value)
            assert info.low is None or (value > info.low if info.low_open else value >= info.low)
            assert info.high is None or (value < info.high if info.high_open else value <= info.high)
        if info.kind == "choice":
            assert value in info.choices


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), numbers, max_size=6))
def test_whatever_is_accepted_lies_within_its_bounds(flat: dict[str, Any]) -> None:
    try:
        config = c.resolve(c.unflatten(flat))
    except ConfigError as error:
        assert error.problems and all(p.message for p in error.problems)
        return
    within_bounds(config)


json_values = st.recursive(
    numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
names = st.one_of(
    st.sampled_from([*KEYS, *(k.rsplit(".", 1)[-1] for k in KEYS), "hyperparams", "data", "lora", "model", "profile"]),
    st.sampled_from(["lora_r", "lora_alpha", "use_qlora", "load_in_4bit", "epochs", "training_mode", "optimizer"]),
    st.text(max_size=6),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, json_values | st.dictionaries(names, json_values, max_size=4), max_size=5))
def test_no_file_content_ends_in_anything_but_settings_or_a_refusal(tmp_path: Path, content: dict[str, Any]) -> None:
    try:
        text = json.dumps(content)
    except ValueError:
        text = '{"max_length": ' + "1" * 5000 + "}"
    try:
        within_bounds(ConfigLoader.load(written(tmp_path, text)))
    except ConfigError as error:
        error.message.encode("utf-8")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KEYS), st.text(max_size=12))
def test_any_typed_text_is_a_value_or_a_refusal_at_its_field(key: str, text: str) -> None:
    try:
        value = c.parse_value(key, text)
    except ConfigError as error:
        assert error.field == key
    else:
        c.resolve(nested(key, value))


@settings(max_examples=200, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_shown_in_the_form_is_read_back_exactly(value: float) -> None:
    assert float(figure_text(value)) == value


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6), max_size=3)


@settings(max_examples=200, deadline=None)
@given(texts, st.floats(1e-9, 100))
def test_lists_shown_in_the_form_are_read_back_exactly(lines: list[str], weight: float) -> None:
    info = c.field("eval.sample_prompts")
    assert c.parse_value(info.key, c.as_text(info, lines)) == lines
    entries = [{"path": line, "weight": weight} for line in lines]
    info = c.field("data.dataset_paths")
    assert c.parse_value(info.key, c.as_text(info, entries)) == entries


def test_short_numbers_are_shown_short() -> None:
    shown = [figure_text(v) for v in (2e-4, 1e-5, 0.05, 1, 0.5, 1000000.0, 1e22, 3.25e-4, 0.0, -2e-7)]
    assert shown == ["2e-4", "1e-5", "0.05", "1", "0.5", "1000000", "1e22", "3.25e-4", "0", "-2e-7"]
