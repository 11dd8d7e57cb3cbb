"""Every setting has an effect that can be seen, by a table written by hand; a setting without a line fails here."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel

from tests import observed as o
from tests import runs
from tests.lives import curve, one_life
from tests.observed import Observe, Seen, watch
from tests.tiny import tiny_model_dir
from trainer.schema import Config
from trainer.worker import Worker
from trainer.workspace import Workspace

Given = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One setting: the value it is changed to, where that is seen, and what must not change with it.

    `right(before, after)` says that the observation is what it should be, where "another" is not enough. `given` is set
    in both runs. {model}, {data}, {second}, {mapped}, {other}, {untaught}, {spoilt} in values are the place's own paths.
    """

    key: str
    value: Any
    seen_in: Observe
    right: Callable[[Any, Any], bool] = lambda before, after: True
    same: tuple[Observe, ...] = ()
    given: Given = field(default_factory=dict)


TRAINING = (o.losses, o.rates, o.order, o.token_key)  # the training itself: what only watches it must leave these alone
LORA = {"hyperparams.method": "lora", "lora.r": 4}
CHECKED = {"eval.eval_strategy": "steps", "eval.eval_steps": 2}
SAMPLED = CHECKED | {"eval.sample_steps": 4, "eval.sample_max_tokens": 6}
STEEP = {"hyperparams.learning_rate": 0.5, "hyperparams.warmup_steps": 0, "hyperparams.lr_schedule": "constant"}
# after steps of this size the activations no longer fit into fp16
EXPLODING = STEEP | {"hyperparams.learning_rate": 1.0, "hyperparams.fp_precision": "fp16"}
EXPLODING |= {"output.save_steps": 1, "hyperparams.max_steps": 30}
SPIKY = {
    "hyperparams.max_steps": 24,
    "hyperparams.warmup_steps": 21,
    "hyperparams.learning_rate": 1.0,
    "alerts.loss_spike": 1.2,
}
FULL_CHECKPOINTING = {"hyperparams.use_gradient_checkpointing": True}
BF16 = {"hyperparams.fp_precision": "bf16"}
SHORT = {"hyperparams.max_length": 96}


TABLE = (
    Line("model_name", "short", o.names, lambda a, b: b == ("short", "short"), TRAINING),
    Line("model_display_name", "Shown", o.names, lambda a, b: b == ("Shown", "Shown"), TRAINING, {"model_name": "x"}),
    Line("model_path", "{other}", o.fingerprint, same=(o.order, o.token_key)),
    Line("profile.name", "emoji_think", o.log, lambda a, b: "Using profile system prompt: Current date" in b, (o.order,)),
    Line("profile.system_prompt", "Count well.", o.tokens, lambda a, b: sum(map(len, b)) > sum(map(len, a)), (o.order,)),
    Line("data.dataset_path", "{second}", o.tokens, same=(o.rates,)),
    Line("data.dataset_paths", [{"path": "{second}", "weight": 1}], o.plan, lambda a, b: b["rows"] == a["rows"] + 8),
    Line(
        "data.dataset_paths.path", [{"path": "{second}", "weight": 1}], o.tokens, same=(o.rates,),
        given={"data.dataset_paths": [{"path": "{data}", "weight": 1}]},
    ),
    Line(
        "data.dataset_paths.weight", [{"path": "{second}", "weight": 3}], o.order, same=(o.token_key,),
        given={"data.dataset_paths": [{"path": "{second}", "weight": 1}]},
    ),
    Line("data.validation_dataset_path", "{second}", o.checks, lambda a, b: len(a) == len(b), (o.rates,), CHECKED),
    Line(
        "data.validation_split", 0.25, o.plan, lambda a, b: (b["held_out_rows"], b["rows"]) == (4, 12), (o.token_key,),
        CHECKED,
    ),
    Line(
        "data.validation_max_rows", 2, o.plan, lambda a, b: (a["held_out_rows"], b["held_out_rows"]) == (8, 2),
        (o.token_key,), CHECKED | {"data.validation_split": 0.5},
    ),
    Line("data.too_long", "drop", o.plan, lambda a, b: a["rows"] == 16 > b["rows"] > 0, (o.rates,), SHORT),
    # what "skip" does to step, resume and team is shown by tests/test_bad_row.py
    Line(
        "data.bad_row", "skip", o.end, lambda a, b: "stopped step" in a[1] and b == ("finished", None), (o.token_key,),
        {"data.dataset_path": "{spoilt}"},
    ),
    Line(
        "data.chat_template", "chatml", o.end, lambda a, b: a[0] != "finished" == b[0] and "template" in a[1],
        given={"model_path": "{untaught}"},
    ),
    Line(
        "data.columns", ["user=question", "assistant=answer"], o.end,
        lambda a, b: a[0] != "finished" == b[0] and "keys found: 'question', 'answer'" in a[1],
        given={"data.dataset_path": "{mapped}"},
    ),
    Line("data.seed", 7, o.order, same=(o.rates, o.token_key)),
    Line("hyperparams.method", "lora", o.saved_tensors, lambda a, b: all("lora_" in name for name in b), (o.order,)),
    Line("hyperparams.batch_size", 1, o.order, lambda a, b: [len(a[0]), len(b[0])] == [4, 2], (o.token_key, o.rates)),
    Line("hyperparams.gradient_accumulation", 1, o.order, lambda a, b: [len(a[0]), len(b[0])] == [4, 2], (o.rates,)),
    Line(
        "hyperparams.auto_micro_batch", True, o.micro_batch, lambda a, b: (a, b) == (None, 4),
        (o.order, o.rates, o.token_key),
    ),
    Line("hyperparams.learning_rate", 6e-3, o.rates, lambda a, b: b == [2 * rate for rate in a], (o.order, o.token_key)),
    Line(
        "hyperparams.num_epochs", 2, o.total_steps, lambda a, b: (a, b) == (4, 8), given={"hyperparams.max_steps": None}
    ),
    Line("hyperparams.max_steps", 6, o.total_steps, lambda a, b: (a, b) == (4, 6), (o.token_key,)),
    Line("hyperparams.warmup_steps", 3, o.rates, lambda a, b: b[3] == max(b) and a[1] == max(a), (o.order,)),
    Line("hyperparams.lr_schedule", "constant", o.rates, lambda a, b: b[2] == b[3] > a[3], (o.order,)),
    Line("hyperparams.max_grad_norm", 1e-9, o.losses, lambda a, b: a[1] == b[1] and b[3][0] > a[3][0], (o.rates,)),
    Line("hyperparams.weight_decay", 1.0, o.losses, lambda a, b: a[:2] == b[:2], (o.rates, o.order)),
    Line("hyperparams.optimizer", "adamw_8bit", o.end, lambda a, b: "bitsandbytes" in b[1]),
    Line("hyperparams.fp_precision", "bf16", o.losses, lambda a, b: a != b and abs(a[0][0] / b[0][0] - 1) < 0.02, (o.rates,)),
    Line(
        "hyperparams.master_weights", "none", o.saved_tensors,
        lambda a, b: {kind for _, kind in a.values()} == {"torch.float32"} and {k for _, k in b.values()} == {"torch.bfloat16"},
        (o.order, o.rates), BF16,
    ),
    Line("hyperparams.max_length", 96, o.tokens, lambda a, b: max(map(len, a)) > 96 == max(map(len, b)), (o.order,)),
    Line("hyperparams.packing", True, o.order, lambda a, b: len(b[0]) > len(a[0]), (o.token_key,)),
    Line("hyperparams.use_gradient_checkpointing", True, o.flops, lambda a, b: b > 1.1 * a, TRAINING),
    Line(
        "hyperparams.gradient_checkpointing_policy", "selective", o.flops, lambda a, b: b < a, TRAINING, FULL_CHECKPOINTING
    ),
    Line("hyperparams.compile", True, o.compiled, lambda a, b: (a, b) == (0, 1), TRAINING),
    # what "rewind" does is shown by tests/test_rewind.py: a run has to diverge after its first checkpoint for it
    Line(
        "hyperparams.on_divergence", "rewind", o.rewinds, lambda a, b: (a, b) == (0, 3),
        given=EXPLODING,
    ),
    Line(
        "hyperparams.early_stopping_patience", 1, o.end, lambda a, b: "no better held-out loss in 1 checks" in b[1],
        given=CHECKED | STEEP | {"hyperparams.max_steps": 12},
    ),
    Line("lora.r", 8, o.adapter, lambda a, b: (a["r"], b["r"]) == (4, 8), (o.order,), LORA),
    Line("lora.alpha", 64, o.losses, lambda a, b: a[:1] != b[:1] and a[0][0] == b[0][0], (o.order, o.rates), LORA),
    Line("lora.dropout", 0.5, o.losses, same=(o.order, o.rates), given=LORA),
    Line(
        "lora.target_modules", ["q_proj"], o.saved_tensors, lambda a, b: len(a) > len(b) and all("q_proj" in n for n in b),
        (o.order,), LORA,
    ),
    Line("output.save_steps", 2, o.saved, lambda a, b: (a, b) == ([4], [2, 4]), TRAINING),
    Line(
        "output.save_total_limit", 2, o.kept, lambda a, b: (a, b) == ([2, 3, 4], [3, 4]), (*TRAINING, o.saved),
        {"output.save_steps": 1},
    ),
    Line("output.resume_interrupted", 1, o.goes_on_by_itself, lambda a, b: (a, b) == (False, True), TRAINING),
    Line(
        "eval.eval_strategy", "epoch", o.checks, lambda a, b: [s for s, _ in a] == [0, 2, 4] and [s for s, _ in b] == [0, 4],
        TRAINING, CHECKED,
    ),
    Line("eval.eval_steps", 1, o.checks, lambda a, b: [s for s, _ in b] == [0, 1, 2, 3, 4], TRAINING, CHECKED),
    Line(
        "eval.sample_steps", 2, o.samples, lambda a, b: {s for s, *_ in a} == {4} and {s for s, *_ in b} == {2, 4},
        TRAINING, SAMPLED,
    ),
    Line("eval.sample_prompts", ["How much?"], o.samples, lambda a, b: [p for _, p, _ in b] == ["How much?"], TRAINING, SAMPLED),
    Line("eval.sample_max_tokens", 2, o.samples, lambda a, b: len(b[0][2]) < len(a[0][2]), TRAINING, SAMPLED),
    Line("eval.sample_max_s", 1e-6, o.samples, lambda a, b: len(b[0][2]) < len(a[0][2]), TRAINING, SAMPLED),
    Line("alerts.loss_spike", 0, o.alerts, lambda a, b: "spike" in a and "spike" not in b, TRAINING, SPIKY),
    Line("notify.webhook_url", "http://127.0.0.1:9/hook", o.webhook, lambda a, b: a == "" and b.endswith("/hook"), TRAINING),
    Line("alerts.disk_free_gb", 100_000, o.alerts, lambda a, b: a == [] and b == ["disk"], TRAINING),
)  # fmt: skip
"""All settings; the walker below makes both runs of each line."""

NEEDS_GPU = {
    "hyperparams.method = qlora": "bitsandbytes",
    "hyperparams.optimizer = adamw_8bit": "bitsandbytes",
}
"""Values that this machine refuses in words instead; what they do is shown where there is a GPU."""


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, those of a list's items too, from the schema alone."""
    for name, info in section.model_fields.items():
        annotation = info.annotation
        inner = get_args(annotation) if not isinstance(annotation, UnionType) else ()
        models = [each for each in (annotation, *inner) if isinstance(each, type) and issubclass(each, BaseModel)]
        if annotation not in models:
            yield f"{prefix}{name}"
        for model in models:
            yield from leaves(model, f"{prefix}{name}.")


BASE: Given = {
    "hyperparams.max_steps": 4, "hyperparams.warmup_steps": 1, "hyperparams.max_length": 256,
    "eval.eval_strategy": "no", "output.save_steps": 0,
}  # fmt: skip


class Runs:
    """Makes runs by their settings, each once."""

    def __init__(self, root: Path) -> None:
        self.workspace, self.worker = Workspace(root / "ws").create(), Worker()
        self.paths = {
            "model": tiny_model_dir(root / "model", hidden=32, layers=1),
            "data": runs.write_rows(root / "rows.jsonl", 16),
        }
        shutil.copytree(self.paths["model"], root / "other")
        weights = tiny_model_dir(root / "seed", hidden=32, layers=1, seed=5) / "model.safetensors"
        self.paths["other"] = Path(shutil.copy(weights, root / "other" / "model.safetensors")).parent
        self.paths["untaught"] = Path(shutil.copytree(self.paths["model"], root / "untaught"))
        (self.paths["untaught"] / "chat_template.jinja").unlink()
        lines = runs.write_rows(root / "all.jsonl", 30).read_text().splitlines(keepends=True)
        self.paths["second"] = root / "second.jsonl"
        self.paths["second"].write_text("".join(lines[20:28]))
        self.paths["spoilt"] = root / "spoilt.jsonl"
        self.paths["spoilt"].write_text("".join(lines[8:24]))
        self.paths["mapped"] = root / "mapped.jsonl"
        turns = [[message["content"] for message in json.loads(line)["messages"]][-2:] for line in lines[:16]]
        self.paths["mapped"].write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in turns))
        self._made: dict[str, Seen] = {}
        self._spoil()

    def _spoil(self) -> None:
        """Damage a row in the token cache of the spoilt file, as a disk might: an id that no model knows."""
        made = self.of({"data.dataset_path": "{spoilt}"})
        folder, row = made.workspace.tokens / o.token_key(made), o.order(made)[2][0]
        ids = np.load(folder / "ids.npy", mmap_mode="r+")
        ids[int(np.load(folder / "offsets.npy")[row]) + 3] = 70_000
        ids.flush()
        self._made.clear()

    def of(self, given: Given) -> Seen:
        """The run of these settings on top of BASE."""
        text = json.dumps(BASE | given, sort_keys=True)
        for name, path in self.paths.items():
            text = text.replace(f"{{{name}}}", str(path))
        if text not in self._made:
            nested: Given = {"model_path": str(self.paths["model"]), "data": {"dataset_path": str(self.paths["data"])}}
            for key, value in json.loads(text).items():
                section, _, name = key.rpartition(".")
                (nested.setdefault(section, {}) if section else nested)[name] = value
            self._made[text] = watch(nested, self.workspace, self.worker)
        return self._made[text]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    every = Runs(tmp_path_factory.mktemp("effects"))
    every.of({})
    gc.collect()
    gc.freeze()  # each run collects garbage: what the imports left behind need not be looked through every time
    yield every
    gc.unfreeze()
    every.worker.close()


def test_every_setting_of_the_schema_has_a_line_and_every_line_is_one_of_the_schema() -> None:
    keys = [line.key for line in TABLE]
    assert sorted(keys) == sorted(leaves(Config)), set(keys) ^ set(leaves(Config))


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.key)
def test_a_changed_setting_is_seen_where_the_table_says_and_nowhere_it_must_not(made: Runs, line: Line) -> None:
    key = line.key.removesuffix(".path").removesuffix(".weight") if "dataset_paths." in line.key else line.key
    assert line.given.get(key, made) != line.value and BASE.get(key, made) != line.value
    before, after = made.of(line.given), made.of(line.given | {key: line.value})
    seen = line.seen_in(before), line.seen_in(after)
    name = line.seen_in.__name__
    assert seen[0] != seen[1], f"{line.key}: {name} stayed {seen[0]}"
    assert line.right(*seen), f"{line.key}: {name} was {seen[0]} and became {seen[1]}"
    assert [each.__name__ for each in line.same if each(before) != each(after)] == [], line.key


def test_rows_too_long_are_refused_where_the_setting_says_so(made: Runs) -> None:
    kind, cause = o.end(made.of(SHORT | {"data.too_long": "refuse"}))
    assert kind == "failed" and "Rows longer than 96 tokens" in (cause or "")


@pytest.mark.parametrize("setting", NEEDS_GPU)
def test_what_needs_a_gpu_or_a_package_is_refused_by_its_name(made: Runs, setting: str) -> None:
    key, _, value = setting.partition(" = ")
    kind, cause = o.end(made.of({key: value}))
    assert kind in ("failed", "refused") and NEEDS_GPU[setting] in (cause or ""), cause


def test_every_choice_of_a_setting_that_has_choices_is_seen(made: Runs) -> None:
    """Each schedule, precision, method and strategy gives a run of its own."""
    for key, values, seen_in, given in (
        ("hyperparams.lr_schedule", ("linear", "cosine", "constant"), o.rates, {"hyperparams.max_steps": 6}),
        ("hyperparams.fp_precision", ("fp32", "bf16", "fp16"), o.losses, {"hyperparams.max_steps": 2}),
        ("eval.eval_strategy", ("no", "steps", "epoch"), o.checks, {"eval.eval_steps": 2}),
        ("data.too_long", ("cut", "drop"), o.plan, SHORT),
    ):  # fmt: skip
        found = [json.dumps(seen_in(made.of(given | {key: value}))) for value in values]
        assert len(set(found)) == len(values), key


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(made: Runs) -> None:
    model, data = made.paths["model"], made.paths["data"]
    settings = {"max_steps": 4, "eval": {"eval_strategy": "no"}}
    found = []
    for compile in (False, True):
        run = runs.new(made.workspace, runs.settings(model, data, compile=compile, **settings))
        assert one_life(run, made.workspace, made.worker) == "finished"
        found.append(curve(run)[:, 1])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
