"""The gate as a pure function: what blocks, what only warns, what is out of date, and in which words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainer.config import Change, Config, resolve
from trainer.fields import FieldProblem, fields
from ui.derived import derived_line, plan_of
from ui.form_state import judged_values
from ui.gate import blocking, gate_lines, headline
from ui.gate_facts import DataFact, DiskFact, Facts, GateLine, MemoryFact, ModelFact, Offer, SmokeFact
from ui.judged_keys import DATA_KEYS, DISK_KEYS, FIT_KEYS
from ui.suggest import suggest


def config(**hyperparams: Any) -> Config:
    base = {"model_path": "/m", "data": {"dataset_path": "/d.jsonl"}, "profile": {"name": "plain"}}
    return resolve(base, {"hyperparams": hyperparams})


GOOD = Facts(
    device_name="NVIDIA RTX 4090",
    on_gpu=True,
    model=ModelFact("ready", "tiny", True, "Qwen3, 0.6 B weights"),
    data=DataFact("ready", rows=12_408, usable=12_408, labels=1000, label_share=0.38, tokens=2_000_000),
    memory=MemoryFact(14.2, 23.1, 24.0, 1.2, parts=(("weights", 1.2),)),
    disk=DiskFact(1e9, 3e9, 212e9, True),
    profiles=("plain", "emoji_think"),
    steps=1240,
)


def lines_of(
    facts: Facts, settings: Config | None = None, problems: list[FieldProblem] | None = None
) -> list[GateLine]:
    return gate_lines(settings or config(), problems or [], facts)


def line(code: str, lines: list[GateLine]) -> GateLine:
    return next(entry for entry in lines if entry.code == code)


def test_with_good_facts_nothing_blocks_and_only_the_smoke_test_is_open() -> None:
    lines = lines_of(GOOD)
    assert [(entry.code, entry.status) for entry in lines if entry.status != "pass"] == [("smoke", "not-run")]
    assert blocking(lines) == [] and headline(lines) == ("pass", "Ready")


def test_a_setting_out_of_bounds_blocks_and_leads_to_its_field() -> None:
    problem = FieldProblem("hyperparams.learning_rate", "learning rate is 5. Allowed: 0 to 1.")
    lines = lines_of(GOOD, problems=[problem])
    first = lines[0]
    assert (first.text, first.blocks) == ("Learning rate is 5. Allowed: 0 to 1.", True)
    assert first.actions[0].goto == "hyperparams.learning_rate"
    assert headline(lines) == ("problem", "1 problem")


CANNOT_TRAIN = {
    "no model": (GOOD, resolve({"data": {"dataset_path": "/d"}}), "No model is chosen."),
    "no data": (GOOD, resolve({"model_path": "/m"}), "No data is chosen."),
    "broken model": (
        replace(
            GOOD, model=ModelFact("ready", "x", problems=(("Shard 3 of 3 is missing.", "Download that file again."),))
        ),
        config(),
        "Cannot train this folder: shard 3 of 3 is missing. Download that file again.",
    ),
    "no usable row": (
        replace(GOOD, data=DataFact("ready", rows=41, usable=0, kinds=(("no answer", 38), ("bad JSON", 3)))),
        config(),
        "None of 41 rows can be used: 38 no answer · 3 bad JSON.",
    ),
    "no labels": (replace(GOOD, data=DataFact("ready", rows=4, usable=4, labels=0)), config(), "There are no labels"),
    "no memory at all": (
        replace(GOOD, memory=MemoryFact(90, 23.1, 24.0, 60.0)),
        config(),
        "Does not fit: the weights alone are 60.0 GiB, the device has 24.0 GiB.",
    ),
    "disk too small": (
        replace(GOOD, disk=DiskFact(1e9, 14.4e9, 12e9, True, "The disk cannot hold this run's checkpoints: …")),
        config(),
        "cannot hold",
    ),
    "unwritable disk": (replace(GOOD, disk=DiskFact(1, 1, 1, False)), config(), "cannot be written"),
    "no room for one checkpoint": (
        replace(GOOD, disk=DiskFact(5e9, 9e9, 1e9, True)),
        config(),
        "one checkpoint needs 5.0 GB",
    ),
    "unknown profile": (replace(GOOD, profiles=("other",)), config(), "There is no profile 'plain'. There are: other."),
    "qlora without its package": (replace(GOOD, bitsandbytes=False), config(method="qlora"), "QLoRA needs the package"),
    "8 bits without their package": (
        replace(GOOD, bitsandbytes=False),
        config(optimizer="adamw_8bit"),
        "8-bit optimizer needs the package",
    ),
    "device taken": (replace(GOOD, busy="The run x (started by lab-2) has the device since 14:02."), config(), "lab-2"),
}


@pytest.mark.parametrize("case", CANNOT_TRAIN, ids=str)
def test_what_cannot_train_blocks_the_start(case: str) -> None:
    facts, settings, words = CANNOT_TRAIN[case]
    stops = blocking(gate_lines(settings, [], facts))
    assert len(stops) == 1 and words in stops[0].text


TO_LORA = Offer("LoRA", {"hyperparams.method": "lora"}, 9.4, "")
FASTER = Change("hyperparams.learning_rate", "Learning rate", 2e-4, 2e-3)
ONLY_WARNS = {
    "does not fit now": (
        replace(GOOD, memory=MemoryFact(26.1, 23.1, 24.0, 9.0, offers=(TO_LORA,))),
        config(),
        "Needs about 26.1 GiB (±10 %); 23.1 GiB is free. This makes it fit:",
    ),
    "some bad rows": (
        replace(GOOD, data=DataFact("ready", 12_408, 12_367, (("no answer", 38), ("bad JSON", 3)), "Line 1,873: …", 9)),
        config(),
        "12,367 of 12,408 rows are usable. 41 have problems: 38 no answer · 3 bad JSON.",
    ),
    "long rows": (
        replace(GOOD, data=DataFact("ready", 9, 9, labels=9, too_long=41)),
        config(max_length=2048),
        "41 rows are longer than 2,048 tokens: they are cut.",
    ),
    "disk may fill": (replace(GOOD, disk=DiskFact(1e9, 14.4e9, 12e9, True)), config(), "14.4 GB needed, 12.0 GB free"),
    "CPU build": (replace(GOOD, advice="This machine has an NVIDIA RTX 4090, but …"), config(), "RTX 4090"),
    "long warm-up": (replace(GOOD, steps=40), config(warmup_steps=100), "The warm-up (100 steps) is not over"),
    "smoke failed": (
        replace(GOOD, smoke=SmokeFact("done", (("problem", "The model does not see your prompt."),), 11, 1)),
        config(),
        "Smoke test: failed 1 of 12: the model does not see your prompt. Start is still possible.",
    ),
    "rate far from last": (
        replace(GOOD, last_good="run 7", last_changes=(FASTER,)),
        config(learning_rate=2e-3),
        "Learning rate is 2e-3, 10 times that of your last good run.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONLY_WARNS, ids=str)
def test_everything_else_is_said_and_does_not_block(case: str) -> None:
    facts, settings, words = ONLY_WARNS[case]
    lines = gate_lines(settings, [], facts)
    assert any(words in entry.text and entry.status in ("problem", "warning") for entry in lines), [
        e.text for e in lines
    ]
    assert blocking(lines) == []


def test_rows_that_are_too_long_block_only_where_the_config_says_refuse() -> None:
    facts = replace(GOOD, data=DataFact("ready", 9, 9, labels=9, too_long=1))
    refusing = resolve({"model_path": "/m", "data": {"dataset_path": "/d", "too_long": "refuse"}})
    (stop,) = blocking(gate_lines(refusing, [], facts))
    assert stop.text == "1 row is longer than 2,048 tokens, and 'Rows too long' says refuse."
    assert stop.actions[0].values == {"data.too_long": "cut"}


def test_a_check_of_other_settings_is_out_of_date_and_names_what_changed() -> None:
    before = config(max_length=512)
    keys = ["hyperparams.max_length", "hyperparams.batch_size"]
    judged = judged_values(before, keys)
    smoke = SmokeFact("done", (("pass", "fine"),), 12, 0, judged=judged)
    data = replace(GOOD.data, state="checking", judged=judged)  # type: ignore[type-var]
    facts = replace(GOOD, smoke=smoke, data=data)
    assert line("smoke", lines_of(facts, before)).status == "pass"
    lines = lines_of(facts, config(max_length=1024, batch_size=1))
    assert line("smoke", lines).text == "Smoke test: out of date, micro-batch and maximum length changed." or (
        line("smoke", lines).text == "Smoke test: out of date, maximum length and micro-batch changed."
    )
    assert line("smoke", lines).status == "not-run" and line("data", lines).status == "not-run"
    assert "12,408 rows usable. Out of date, " in line("data", lines).text
    assert set(line("smoke", lines).fields) == set(keys)


def test_a_passed_smoke_test_says_its_figures() -> None:
    smoke = SmokeFact("done", (), 12, 0, 0, seconds=41, peak_gib=13.8)
    assert (
        line("smoke", lines_of(replace(GOOD, smoke=smoke))).text
        == "Smoke test: passed 12 of 12 in 41 s. Peak 13.8 GiB."
    )
    smoke = SmokeFact("done", (), 10, 0, 2, seconds=41)
    assert line("smoke", lines_of(replace(GOOD, smoke=smoke))).text.endswith("2 not possible here.")


def test_checks_under_way_are_open_and_do_not_block() -> None:
    facts = replace(GOOD, model=ModelFact("checking"), data=DataFact("checking", done=0.4))
    lines = lines_of(facts)
    assert headline(lines) == ("not-run", "Checking") and blocking(lines) == []
    assert line("data", lines).text == "Data: being checked, 40 % done."


def test_a_problem_of_a_field_is_told_once() -> None:
    lines = gate_lines(config(), [FieldProblem("model_path", "model is bad")], replace(GOOD, model=None))
    assert [entry.code for entry in lines if "model_path" in entry.fields] == ["settings"]


def test_an_adapter_cannot_be_trained_in_full() -> None:
    facts = replace(GOOD, model=ModelFact("ready", "a", True, "LoRA adapter", is_adapter=True))
    (stop,) = blocking(lines_of(facts, config(method="full")))
    assert stop.actions[0].values == {"hyperparams.method": "lora"}


# (usable rows, settings) -> steps, worked out by hand
PLANS = [
    (100, {"batch_size": 4, "gradient_accumulation": 4, "num_epochs": 1}, 0.05, 6),  # 95 rows / 16
    (100, {"batch_size": 4, "gradient_accumulation": 4, "num_epochs": 2.5}, 0.05, 15),  # 6 + 6 + ceil(48 / 16)
    (100, {"batch_size": 1, "gradient_accumulation": 1, "num_epochs": 1}, 0.0, 100),
    (10_000, {"batch_size": 8, "gradient_accumulation": 8, "num_epochs": 1}, 0.5, 154),  # held out: 200 at most
    (10, {"max_steps": 77}, 0.05, 77),
    (1, {"batch_size": 1, "gradient_accumulation": 1}, 0.05, 1),
]


@pytest.mark.parametrize(("rows", "settings", "share", "steps"), PLANS)
def test_the_number_of_steps_is_known_before_the_start(
    rows: int, settings: dict[str, Any], share: float, steps: int
) -> None:
    made = resolve({"data": {"validation_split": share}, "hyperparams": settings})
    assert plan_of(made, rows, None, False).steps == steps


@pytest.mark.parametrize(("rows", "settings", "share", "steps"), PLANS[:4])
def test_it_is_the_number_that_the_plan_of_a_run_has(
    rows: int, settings: dict[str, Any], share: float, steps: int
) -> None:
    import numpy as np

    from trainer.data.packing import make_plan, split

    h = resolve({"hyperparams": settings}).hyperparams
    trained, held_out = split(rows, share, 200, 42)
    plan = make_plan(
        np.full(rows, 10), trained, held_out, np.ones(len(trained)), seed=42, epochs=h.num_epochs,
        max_steps=h.max_steps, packs_per_step=h.rows_per_step, capacity=None,
    )  # fmt: skip
    assert plan.total_steps == steps


def test_the_derived_line_says_what_will_happen() -> None:
    made = config(batch_size=8, gradient_accumulation=8, num_epochs=2)
    plan = plan_of(made, 40_000, None, False)
    assert derived_line(made, plan, None) == "64 rows a step · 1,244 steps · 2 epochs"
    assert derived_line(made, plan, 19.3, now_s=0).startswith(
        "64 rows a step · 1,244 steps · 2 epochs · about 6 h 40 min, done about "
    )


def test_suggestions_leave_alone_what_a_person_has_set_and_give_reasons() -> None:
    made = config(method="full", learning_rate=2e-4)
    facts = replace(GOOD, data=replace(GOOD.data, longest=500, usable=12_408))  # type: ignore[type-var]
    found = {s.key: s for s in suggest(made, set(), facts)}
    assert found["hyperparams.learning_rate"].text == "1e-5"
    assert found["hyperparams.max_length"].text == "512" and "500 tokens" in found["hyperparams.max_length"].reason
    assert all(s.reason.endswith(".") for s in found.values())
    left = suggest(made, {"hyperparams.learning_rate", "hyperparams.max_length"}, facts)
    assert not {"hyperparams.learning_rate", "hyperparams.max_length"} & {s.key for s in left}


def test_where_memory_is_short_the_first_way_out_is_suggested() -> None:
    offer = Offer("Checkpointing on", {"hyperparams.use_gradient_checkpointing": "true"}, 9.4, "about a quarter slower")
    facts = replace(GOOD, memory=MemoryFact(26.1, 23.1, 24.0, 1.0, offers=(offer,)))
    found = {s.key: s.text for s in suggest(config(), set(), facts)}
    assert found["hyperparams.use_gradient_checkpointing"] == "true"


def test_every_line_that_judges_settings_names_them_all_so_that_it_can_grey() -> None:
    known = {info.key for info in fields()}
    assert set(FIT_KEYS) | set(DATA_KEYS) | set(DISK_KEYS) <= known
    facts = replace(GOOD, last_good="run 7", smoke=SmokeFact("done", (), 12, 0, judged={"lora.r": 8}))
    judged = {entry.code: set(entry.fields) for entry in lines_of(facts)}
    assert {"hyperparams.batch_size", "lora.r", "hyperparams.max_length"} <= judged["memory"]
    assert {"output.save_total_limit", "hyperparams.method"} <= judged["disk"]
    assert {"hyperparams.max_length", "profile.name"} <= judged["data"]
    assert judged["smoke"] == {"lora.r"} and judged["last-good"] == {"*"}
    assert not [code for code, keys in judged.items() if not keys], "a line that never greys"


def test_memory_that_may_be_short_is_a_warning_and_what_it_was_calibrated_by_is_said() -> None:
    tight = MemoryFact(22.0, 23.1, 24.0, 1.2, spread=0.1, words="calibrated by the smoke test of 14:02")
    found = line("memory", lines_of(replace(GOOD, memory=tight)))
    assert (found.status, found.blocks) == ("warning", False)
    assert found.text.startswith(
        "Tight: about 22.0 GiB (±10 %, calibrated by the smoke test of 14:02) of 23.1 GiB free"
    )
    nothing = MemoryFact(90.0, 23.1, 24.0, 1.2)
    assert "No change here makes it fit" in line("memory", lines_of(replace(GOOD, memory=nothing))).text


def test_what_memory_allows_is_suggested_and_what_is_not_needed_is_dropped() -> None:
    roomy = replace(GOOD, memory=MemoryFact(3.0, 23.1, 24.0, 1.2))
    found = {s.key: s for s in suggest(config(), set(), roomy)}
    assert found["hyperparams.auto_micro_batch"].text == "true"
    assert "3.0 GiB of 23.1 GiB" in found["hyperparams.auto_micro_batch"].reason
    assert "hyperparams.auto_micro_batch" not in {s.key for s in suggest(config(), set(), GOOD)}
    off = Offer("Checkpointing off", {"hyperparams.use_gradient_checkpointing": "false"}, -4.0, "about a fifth faster")
    spare = replace(GOOD, memory=MemoryFact(9.0, 23.1, 24.0, 1.2, faster=(off,)))
    on = config(use_gradient_checkpointing=True)
    taken = {s.key: s for s in suggest(on, set(), spare)}["hyperparams.use_gradient_checkpointing"]
    assert taken.text == "false" and taken.reason == "It fits without: about 4.0 GiB more, about a fifth faster."
    assert not {s.key for s in suggest(on, {taken.key}, spare)} & {taken.key}
    precise = {s.key: s.text for s in suggest(config(fp_precision="fp32"), set(), GOOD)}
    assert precise["hyperparams.fp_precision"] == "auto"


def test_a_way_to_fit_that_touches_what_a_person_has_set_is_not_suggested_and_the_next_one_is() -> None:
    smaller = {"hyperparams.batch_size": "1", "hyperparams.gradient_accumulation": "16"}
    offers = (Offer("Micro-batch 4→1", smaller, 5.0, ""), TO_LORA)
    facts = replace(GOOD, memory=MemoryFact(26.1, 23.1, 24.0, 1.0, offers=offers))
    made = config(method="full", learning_rate=1e-5)
    assert smaller.items() <= {s.key: s.text for s in suggest(made, set(), facts)}.items()
    found = {s.key: s.text for s in suggest(made, {"hyperparams.batch_size"}, facts)}
    assert found["hyperparams.method"] == "lora" and not smaller.keys() & found.keys()


def test_several_gpus_are_named_with_the_command_that_uses_them() -> None:
    (line,) = [line for line in gate_lines(config(), [], replace(GOOD, gpus=2)) if line.code == "gpus"]
    assert line.status == "pass" and "torchrun --nproc-per-node 2 -m trainer train" in line.text
    assert not [line for line in gate_lines(config(), [], replace(GOOD, gpus=1)) if line.code == "gpus"]
