"""The old system's config: it loads unchanged, twins agree or are refused, dead keys are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config import ConfigError, ConfigLoader, load_sparse, retired
from trainer.legacy import modern

# keys and values as that system's file had them when its plan was written
SEED_FILE: dict[str, Any] = {
    "model_name": "qwen3_0.6b",
    "model_display_name": "Qwen3-0.6B base",
    "model_path": "/models/Qwen3-0.6B",
    "current_model_dir": "/old/current_model",
    "batch_size": 1,
    "gradient_accumulation": 1,
    "learning_rate": 0.0004,
    "warmup_steps": 100,
    "epochs": 1,
    "lora_r": 0,
    "lora_alpha": 0,
    "load_in_4bit": False,
    "log_steps": 200,
    "eval_steps": 500,
    "num_eval_samples": 2,
    "save_steps": 1000,
    "poll_interval": 30,
    "snapshot_time": "03:00",
    "max_length": 2048,
    "base_model": "/models/Qwen3-0.6B",
    "eval_max_tokens": 4096,
    "eval_timeout_seconds": 120,
    "self_correction": {"enabled": True, "max_examples": 200, "generation_interval": None},
    "auto_generate": {"enabled": True, "port": 8765, "payload": {}},
    "remote_eval": {"enabled": True, "metrics": ["accuracy", "loss"]},
    "curriculum": {"enabled": True, "target_accuracy": 0.75},
    "_comment_refactor": "new fields",
    "profile": {"name": "emoji_think", "options": {}},
    "hyperparams": {
        "fp_precision": "bf16",
        "max_length": 2048,
        "batch_size": 1,
        "gradient_accumulation": 1,
        "learning_rate": 0.0004,
        "use_gradient_checkpointing": True,
    },
    "locked": {"base_model": "Qwen/Qwen3-0.6B", "max_context_length": 4096, "vocab_size": 151936},
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_the_old_systems_file_loads_unchanged(tmp_path: Path) -> None:
    path = written(tmp_path, SEED_FILE)
    config = ConfigLoader.load(path)
    h = config.hyperparams
    assert (h.method, h.batch_size, h.gradient_accumulation, h.learning_rate) == ("full", 1, 1, 4e-4)
    assert (h.num_epochs, h.warmup_steps, h.max_length, h.fp_precision) == (1, 100, 2048, "bf16")
    assert h.use_gradient_checkpointing is True
    assert (config.output.save_steps, config.eval.eval_steps) == (1000, 500)
    assert (config.profile.name, config.model_display_name) == ("emoji_think", "Qwen3-0.6B base")
    assert set(retired(path)) == {
        "current_model_dir",
        "log_steps",
        "num_eval_samples",
        "poll_interval",
        "snapshot_time",
        "base_model",
        "eval_max_tokens",
        "eval_timeout_seconds",
        "self_correction",
        "auto_generate",
        "remote_eval",
        "curriculum",
        "_comment_refactor",
        "profile.options",
        "locked",
    }


def test_what_the_old_file_says_is_all_that_is_kept(tmp_path: Path) -> None:
    sparse = load_sparse(written(tmp_path, SEED_FILE))
    assert set(sparse) == {
        "model_name",
        "model_display_name",
        "model_path",
        "profile",
        "hyperparams",
        "output",
        "eval",
    }
    assert sparse["output"] == {"save_steps": 1000} and sparse["eval"] == {"eval_steps": 500}


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (
            {"learning_rate": 1e-3, "hyperparams": {"learning_rate": 2e-3}},
            ("learning_rate is 0.001", "hyperparams.learning_rate is 0.002"),
        ),
        (
            {"gradient_accumulation": 1, "hyperparams": {"gradient_accumulation": 16}},
            ("gradient_accumulation is 1", "hyperparams.gradient_accumulation is 16"),
        ),
        ({"epochs": 2, "hyperparams": {"num_epochs": 3}}, ("epochs is 2", "hyperparams.num_epochs is 3")),
        ({"save_steps": 5, "output": {"save_steps": 6}}, ("save_steps is 5", "output.save_steps is 6")),
        (
            {"hyperparams": {"eval_steps": 5}, "eval": {"eval_steps": 6}},
            ("hyperparams.eval_steps is 5", "eval.eval_steps is 6"),
        ),
        ({"lora_r": 8, "lora": {"r": 16}}, ("lora_r is 8", "lora.r is 16")),
        ({"lora_r": 0, "hyperparams": {"method": "lora"}}, ("lora_r is 0", 'hyperparams.method is "lora"')),
        ({"lora_r": 8, "hyperparams": {"method": "full"}}, ("lora_r is 8", 'hyperparams.method is "full"')),
        (
            {"use_qlora": True, "hyperparams": {"method": "lora"}},
            ("use_qlora is true", 'hyperparams.method is "lora"'),
        ),
        (
            {"load_in_4bit": False, "hyperparams": {"method": "qlora"}},
            ("load_in_4bit is false", 'hyperparams.method is "qlora"'),
        ),
        (
            {"load_in_4bit": False, "lora_r": 8, "hyperparams": {"method": "qlora"}},
            ("load_in_4bit is false", 'hyperparams.method is "qlora"'),
        ),
        ({"use_qlora": True, "lora_r": 0}, ("use_qlora is true", "lora_r is 0")),
        (
            {"model_path": "/a", "model": {"model_path": "/b"}},
            ('model.model_path is "/b"', 'model_path is "/a"'),
        ),
    ],
)
def test_a_twin_that_differs_is_refused_and_both_are_named(
    tmp_path: Path, content: Any, names: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ConfigLoader.load(written(tmp_path, content))
    for name in names:
        assert name in caught.value.message.replace("but use_qlora", "use_qlora")


@pytest.mark.parametrize(
    ("content", "method", "rank"),
    [
        ({"lora_r": 0, "lora_alpha": 0}, "full", 16),
        ({"lora_r": 8, "lora_alpha": 16}, "lora", 8),
        ({"lora_r": 8, "use_qlora": True}, "qlora", 8),
        ({"load_in_4bit": True}, "qlora", 16),
        ({"load_in_4bit": False}, "full", 16),
        ({"load_in_4bit": False, "lora": {"r": 4}}, "lora", 4),
        ({"load_in_4bit": False, "lora_r": 4}, "lora", 4),
        ({"load_in_4bit": False, "hyperparams": {"method": "lora"}}, "lora", 16),
        ({"lora_r": 8, "hyperparams": {"method": "qlora"}}, "qlora", 8),
        ({"training_mode": "full"}, "full", 16),
        ({}, "lora", 16),
    ],
)
def test_rank_and_bits_mean_a_method(tmp_path: Path, content: Any, method: str, rank: int) -> None:
    config = ConfigLoader.load(written(tmp_path, content))
    assert (config.hyperparams.method, config.lora.r) == (method, rank)


def test_saving_and_held_out_keys_may_stand_among_the_hyperparameters(tmp_path: Path) -> None:
    content = {"hyperparams": {"save_steps": 7, "save_total_limit": 2, "eval_steps": 9, "eval_strategy": "no"}}
    config = ConfigLoader.load(written(tmp_path, content))
    assert (config.output.save_steps, config.output.save_total_limit) == (7, 2)
    assert (config.eval.eval_steps, config.eval.eval_strategy) == (9, "no")


def test_sections_that_are_gone_are_passed_over_whatever_they_hold(tmp_path: Path) -> None:
    content = {
        "monitoring": {"inference_interval": 50, "validation_split": 0.05},
        "environment": {"report_to": ["none"], "max_grad_norm": 1.0},
        "model": {"torch_dtype": "bf16", "something": 1},
        "output": {"output_dir": "x", "logging_dir": None, "save_steps": 5},
        "data": {"shuffle": True, "seed": 3, "max_length_override": None, "_note": 1},
        "optimizer": {"type": "adamw"},
        "retention": {"enabled": True},
    }
    path = written(tmp_path, content)
    assert load_sparse(path) == {"output": {"save_steps": 5}, "data": {"seed": 3}}
    assert set(retired(path)) == {
        "monitoring",
        "environment",
        "model.torch_dtype",
        "model.something",
        "output.output_dir",
        "output.logging_dir",
        "data.shuffle",
        "data.max_length_override",
        "data._note",
        "optimizer",
        "retention",
    }


def test_a_key_that_neither_system_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Closest: hyperparams.batch_size"):
        ConfigLoader.load(written(tmp_path, SEED_FILE | {"batchsize": 4}))


def test_modern_settings_pass_through_unchanged() -> None:
    sparse = {
        "model_path": "x",
        "hyperparams": {"learning_rate": 1},
        "lora": {"r": 2},
        "eval": {"eval_steps": 3},
    }
    assert modern(sparse) == (sparse, [])
