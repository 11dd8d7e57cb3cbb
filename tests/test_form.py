"""The form: one component a setting, made from the schema; what it holds and what the draft keeps are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from trainer.config import Config, as_text, field, fields, get, resolve
from trainer.packages import NEEDS_BITSANDBYTES
from trainer.workspace import Workspace
from ui.drafts import Draft
from ui.form import build_form, elem_id, offered, picker_choices, to_component
from ui.form_state import changed_titles, form_state, judged_values, problem_list

RATE = "hyperparams.learning_rate"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "w").create()


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hyperparams": {"learning_rate": 1e-3}, "poll_interval": 30}))
    return path


def built() -> dict[str, gr.components.Component]:
    with gr.Blocks():
        return build_form().components


def test_every_setting_has_a_field_with_its_label_help_and_id() -> None:
    components = built()
    assert list(components) == [info.key for info in fields()]
    for info in fields():
        made: Any = components[info.key]
        assert made.label.startswith(info.title) and made.info == info.help
        assert made.elem_id == elem_id(info.key) and "." not in made.elem_id
        assert info.unit.lower() in made.label.lower()


def test_no_number_is_a_stepper() -> None:
    kinds = {info.key: type(built_one) for info, built_one in zip(fields(), built().values(), strict=True)}
    numbers = [info for info in fields() if info.kind in ("real", "whole")]
    assert numbers and {kinds[info.key] for info in numbers} == {gr.Textbox}


def test_choices_are_those_of_the_schema() -> None:
    components = built()
    for info in fields():
        if info.kind == "choice":
            made: Any = components[info.key]
            assert [value for _, value in made.choices] == offered(info)
            assert set(info.choices) - set(offered(info)) <= {NEEDS_BITSANDBYTES.get(info.key)}


def test_a_component_shows_what_the_draft_says() -> None:
    for info in fields():
        value = get(Config(), info.key)
        shown = to_component(info, as_text(info, value))
        assert shown == value if info.kind in ("switch", "choice") else shown == as_text(info, value)
    assert to_component(field("hyperparams.fp_precision"), "int3") is None


def test_pickers_offer_what_is_there_and_tell_equal_names_apart(tmp_path: Path) -> None:
    for root in ("one", "two"):
        folder = tmp_path / root / "same"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    roots = (tmp_path / "one", tmp_path / "two")
    workspace = Workspace(tmp_path / "w", model_roots=roots).create()
    choices = picker_choices(workspace, ["plain"])
    assert choices["model_path"] == [
        ("same (one)", str(roots[0] / "same")),
        ("same (two)", str(roots[1] / "same")),
    ]
    assert choices["profile.name"][1] == ("plain", "plain")


def test_the_form_starts_from_the_config_file(workspace: Workspace, config_path: Path) -> None:
    state = form_state(workspace, config_path, Draft())
    assert state.texts[RATE] == "1e-3" and state.base_name == "config.json"
    assert state.usable and state.changes == [] and state.retired == ["poll_interval"]


def test_typed_values_lie_over_the_config(workspace: Workspace, config_path: Path) -> None:
    state = form_state(workspace, config_path, Draft().with_value(RATE, " 2e-4"))
    assert state.config is not None and state.config.hyperparams.learning_rate == 2e-4
    assert [(c.field, c.before, c.after) for c in state.changes] == [(RATE, 1e-3, 2e-4)]
    assert resolve(state.sparse) == state.config


def test_a_value_that_cannot_be_used_is_named_and_kept_and_the_rest_still_counts(
    workspace: Workspace, config_path: Path
) -> None:
    draft = Draft().with_value(RATE, "5").with_value("lora.r", "8").with_value("data.seed", "many")
    state = form_state(workspace, config_path, draft)
    assert state.problems == {
        RATE: "learning rate is 5. Allowed: 0 to 1.",
        "data.seed": 'seed is "many". Allowed: whole numbers, 0 to 2,147,483,647.',
    }
    assert [p.field for p in problem_list(state)] == ["data.seed", RATE], "in the order of the form"
    assert state.texts[RATE] == "5" and not state.usable
    assert state.config is not None and state.config.lora.r == 8 and state.config.hyperparams.learning_rate == 1e-3
    assert {c.field for c in state.changes} == {RATE, "lora.r", "data.seed"}


def test_settings_that_cannot_go_together_are_named_at_one_of_them(workspace: Workspace, config_path: Path) -> None:
    draft = Draft().with_value("hyperparams.fp_precision", "fp16")
    state = form_state(workspace, config_path, draft.with_value("hyperparams.master_weights", "none"))
    assert list(state.problems) == ["hyperparams.master_weights"] and state.config is None


def test_a_broken_config_file_is_a_sentence_and_the_form_still_opens(workspace: Workspace, config_path: Path) -> None:
    config_path.write_text("{")
    state = form_state(workspace, config_path, Draft())
    assert "line 1 is not JSON" in state.problems[""] and state.texts[RATE] == "2e-4"


def test_names_of_models_and_ids_of_data_become_paths(workspace: Workspace, config_path: Path, tmp_path: Path) -> None:
    model = workspace.models_dir / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "up").write_text("{}")
    info = workspace.add_dataset(tmp_path / "up", "rows.jsonl")
    draft = Draft().with_value("model_path", "tiny").with_value("data.dataset_path", info.id)
    config = form_state(workspace, config_path, draft).config
    assert config is not None
    assert (config.model_path, config.data.dataset_path) == (str(model), str(info.path))


def test_a_check_knows_which_settings_have_changed_since() -> None:
    config = resolve({"hyperparams": {"max_length": 512}})
    judged = judged_values(config, ["hyperparams.max_length", "model_path"])
    assert changed_titles(judged, config) == []
    later = resolve({"hyperparams": {"max_length": 1024}})
    assert changed_titles(judged | {"gone.key": 1}, later) == ["maximum length"]
