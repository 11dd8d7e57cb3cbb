"""The gate: what speaks for and against a start, one line a fact, as a pure function of form and facts.

Only what cannot train blocks; everything else is said and left to the person. Called by `ui/routes_train.py`
for the page and by the start handler, which decides by the same lines that the page shows.
"""

from __future__ import annotations

from typing import Any

from trainer.config import Config
from trainer.fields import FieldProblem
from trainer.fields import field as setting
from trainer.values import as_text
from ui import numbers
from ui.form_state import changed_titles
from ui.gate_facts import Action, DataFact, Facts, GateLine, Offer, Status
from ui.judged_keys import DATA_KEYS, DISK_KEYS, EVERYTHING, FIT_KEYS

_ORDER: dict[Status, int] = {"problem": 0, "warning": 1, "not-run": 2, "pass": 3, "not-possible": 4}
_SIGNS = {"pass": "✓", "problem": "✕", "not-possible": "–"}
RATE_FACTOR = 5.0
"""A learning rate this many times that of the last good run, or less than one over it, is worth a warning."""


def gate_lines(config: Config | None, problems: list[FieldProblem], facts: Facts) -> list[GateLine]:
    """All lines, worst first; within a status in the order of thought."""
    lines = [_problem(p) for p in problems]
    if config is not None:
        known = {p.field for p in problems}
        # what was judged with a value that cannot be used says nothing of the form as it stands
        judged = _chosen(config, facts) + _memory(facts) + _disk(facts)
        lines += [line for line in judged if not known & set(line.fields)]
        lines += _device(config, facts) + _plan(config, facts)
        lines += _last_good(facts) + [_smoke(config, facts)]
    if facts.busy:
        lines.append(_busy(facts))
    return sorted(lines, key=lambda line: (_ORDER[line.status], not line.blocks))


def blocking(lines: list[GateLine]) -> list[GateLine]:
    """The lines for which a start is refused."""
    return [line for line in lines if line.blocks]


def headline(lines: list[GateLine]) -> tuple[Status, str]:
    """The gate in a few words, with the status of its worst line: "1 problem", "2 warnings", "Ready"."""
    problems = sum(line.status == "problem" for line in lines)
    warnings = sum(line.status == "warning" for line in lines)
    if problems:
        return "problem", f"{problems} problem{'s' if problems > 1 else ''}"
    if any(line.status == "not-run" and line.code in ("model", "data") for line in lines):
        return "not-run", "Checking"
    if warnings:
        return "warning", f"{warnings} warning{'s' if warnings > 1 else ''}"
    return "pass", "Ready"


def _go(key: str, text: str = "Go to the field") -> Action:
    return Action(text, "field", goto=key)


def _problem(problem: FieldProblem) -> GateLine:
    text = problem.message[:1].upper() + problem.message[1:]
    actions = (_go(problem.field),) if problem.field else ()
    return GateLine("settings", "problem", text, actions, (problem.field,) if problem.field else (), blocks=True)


def _chosen(config: Config, facts: Facts) -> list[GateLine]:
    return [*_model(config, facts), *_data(config, facts), *_profile(config, facts)]


def _model(config: Config, facts: Facts) -> list[GateLine]:
    key = ("model_path",)
    if not config.model_path:
        return [GateLine("model", "problem", "No model is chosen.", (_go("model_path", "Choose a model"),), key, True)]
    fact = facts.model
    if fact is None or fact.state == "checking":
        return [GateLine("model", "not-run", "Model: being checked.", (), key)]
    if fact.fault:
        return [GateLine("model", "warning", f"The model could not be checked. {fact.fault}", (), key)]
    if not fact.valid:
        first, fix = fact.problems[0] if fact.problems else ("It is not a model folder.", "")
        text = f"Cannot train this folder: {first[:1].lower() + first[1:]} {fix}".strip()
        more = tuple(f"{sentence} {cure}".strip() for sentence, cure in fact.problems[1:])
        link = Action("See the report", "link", href="models")
        return [GateLine("model", "problem", text, (link,), key, True, more)]
    lines = [GateLine("model", "pass", f"Model: {fact.summary}.", (), key)]
    lines += [GateLine("model-note", "warning", warning, (), key) for warning in fact.warnings]
    longest = facts.data.longest if facts.data is not None else None
    length = min(longest or config.hyperparams.max_length, config.hyperparams.max_length)
    if fact.max_positions and length > fact.max_positions:
        limit = str(fact.max_positions)
        use = Action(f"Maximum length {limit}", "set", values={"hyperparams.max_length": limit})
        text = f"Rows may have {length:,} tokens; the model was made for at most {fact.max_positions:,}."
        lines.append(GateLine("positions", "warning", text, (use,), (*key, "hyperparams.max_length")))
    if fact.is_adapter and config.hyperparams.method == "full":
        text = f"{fact.name} is a LoRA adapter: it is trained on with LoRA, not full."
        use = Action("LoRA", "set", values={"hyperparams.method": "lora"})
        lines.append(GateLine("adapter", "problem", text, (use,), ("model_path", "hyperparams.method"), True))
    return lines


def _data(config: Config, facts: Facts) -> list[GateLine]:
    key = ("data.dataset_path", "data.dataset_paths")
    if not config.data.files:
        return [
            GateLine("data", "problem", "No data is chosen.", (_go("data.dataset_path", "Choose data"),), key, True)
        ]
    fact = facts.data
    if fact is None:
        return [GateLine("data", "not-run", "Data: being checked.", (), key)]
    if fact.fault:
        return [GateLine("data", "warning", f"The data could not be checked. {fact.fault}", (), key)]
    if fact.refusal:
        cure = _go(key[0])
        if fact.refusal_field == "profile.name":
            cure, key = Action("No profile", "set", values={"profile.name": ""}), (*key, "profile.name")
        elif fact.refusal_field == "data.chat_template":
            cure, key = Action("Plain ChatML", "set", values={fact.refusal_field: "chatml"}), (*key, fact.refusal_field)
        return [GateLine("data", "problem", fact.refusal, (cure,), key, True)]
    stale = changed_titles(fact.judged, config)
    if fact.state == "checking":
        part = f", {numbers.percent(fact.done)} done" if fact.done else ""
        text = f"Data: being checked{part}."
        if stale:
            text = f"Data: {fact.usable:,} rows usable. Out of date, {_and(stale)} changed; being checked again{part}."
        return [GateLine("data", "not-run", text, (), tuple(DATA_KEYS))]
    judged = tuple(DATA_KEYS)
    notes = [GateLine("data-note", "warning", note, (), judged) for note in fact.notes]
    return _usable_rows(config, fact, judged) + _long_rows(config, fact) + notes


def _usable_rows(config: Config, fact: DataFact, key: tuple[str, ...]) -> list[GateLine]:
    kinds = " · ".join(f"{numbers.count(n)} {kind}" for kind, n in fact.kinds)
    look = Action("Show them", "link", href="data")
    if not fact.usable:
        text = f"None of {numbers.count(fact.rows)} rows can be used: {kinds or 'the file is empty'}."
        more = (fact.first_problem,) if fact.first_problem else ()
        return [GateLine("data", "problem", text, (look,), key, True, more)]
    if fact.labels == 0:
        text = "There are no labels: the model would learn nothing from these rows."
        return [GateLine("data", "problem", text, (look,), key, True)]
    share = f", {numbers.percent(fact.label_share)} of the tokens are labels" if fact.label_share is not None else ""
    if fact.usable < fact.rows:
        bad = fact.rows - fact.usable
        verb = "have problems" if bad > 1 else "has a problem"
        text = f"{fact.usable:,} of {fact.rows:,} rows are usable{share}. {bad:,} {verb}: {kinds}."
        more = (fact.first_problem,) if fact.first_problem else ()
        return [GateLine("data", "warning", text, (look,), key, more=more)]
    return [
        GateLine(
            "data", "pass", f"Data: {fact.usable:,} {'row' if fact.usable == 1 else 'rows'} usable{share}.", (), key
        )
    ]


def _long_rows(config: Config, fact: DataFact) -> list[GateLine]:
    if not fact.too_long:
        return []
    keys = ("hyperparams.max_length", "data.too_long", *DATA_KEYS)
    about = "about " if fact.sampled else ""
    rows = f"{about}1 row is" if fact.too_long == 1 else f"{about}{fact.too_long:,} rows are"
    rows = rows[:1].upper() + rows[1:]
    head = f"{rows} longer than {config.hyperparams.max_length:,} tokens"
    if config.data.too_long == "refuse":
        cut = Action("Cut them", "set", values={"data.too_long": "cut"})
        return [GateLine("too-long", "problem", f"{head}, and 'Rows too long' says refuse.", (cut,), keys, True)]
    done = "cut" if config.data.too_long == "cut" else "left out"
    return [GateLine("too-long", "warning", f"{head}: they are {done}.", (_go(keys[0], "Change the length"),), keys)]


def _profile(config: Config, facts: Facts) -> list[GateLine]:
    name, key = config.profile.name, ("profile.name",)
    if name is None:
        return []
    if name not in facts.profiles:
        text = f"There is no profile '{name}'. There are: {', '.join(facts.profiles)}."
        return [GateLine("profile", "problem", text, (_go(key[0]),), key, True)]
    if config.profile.system_prompt:
        text = f"The system prompt of the config is not used: the profile {name} brings its own."
        return [GateLine("profile", "warning", text, (_go("profile.system_prompt"),), (*key, "profile.system_prompt"))]
    return []


def _device(config: Config, facts: Facts) -> list[GateLine]:
    lines = []
    if facts.advice:
        lines.append(GateLine("device", "warning", facts.advice))
    if facts.gpus > 1:
        command = f"torchrun --nproc-per-node {facts.gpus} -m trainer train --config FILE"
        text = f"{facts.gpus} GPUs are here; a run of this page takes the first. All of them, with a saved config: {command}"
        lines.append(GateLine("gpus", "pass", text))
    h = config.hyperparams
    if h.method == "qlora":
        use = Action("LoRA", "set", values={"hyperparams.method": "lora"})
        if not facts.bitsandbytes:
            text = "QLoRA needs the package bitsandbytes: pip install 'signalbox[qlora]'."
            lines.append(GateLine("qlora", "problem", text, (use,), ("hyperparams.method",), True))
        elif not facts.on_gpu:
            text = "QLoRA on a processor saves memory and is slow; LoRA is faster where it fits."
            lines.append(GateLine("qlora", "warning", text, (use,), ("hyperparams.method",)))
    if h.optimizer == "adamw_8bit" and not facts.bitsandbytes:
        use = Action("AdamW", "set", values={"hyperparams.optimizer": "adamw"})
        text = "The 8-bit optimizer needs the package bitsandbytes: pip install 'signalbox[qlora]'."
        lines.append(GateLine("optimizer", "problem", text, (use,), ("hyperparams.optimizer",), True))
    return lines


def _memory(facts: Facts) -> list[GateLine]:
    fact = facts.memory
    if fact is None:
        return []
    need, free = numbers.memory(fact.needs_gib), numbers.memory(fact.free_gib)
    about = f"±{fact.spread * 100:.0f} %{f', {fact.words}' if fact.words else ''}"
    if fact.fits:
        chosen = f" Micro-batch {fact.micro_batch:,}, chosen by itself." if fact.micro_batch else ""
        return [GateLine("memory", "pass", f"Fits: about {need} ({about}) of {free} free.{chosen}", (), FIT_KEYS)]
    actions = tuple(Action(_saving(offer), "set", values=offer.values) for offer in fact.offers)
    if fact.weights_gib > fact.total_gib:
        whole = numbers.memory(fact.total_gib)
        text = f"Does not fit: the weights alone are {numbers.memory(fact.weights_gib)}, the device has {whole}."
        return [GateLine("memory", "problem", text, actions, FIT_KEYS, True)]
    cures = " Any one of these makes it fit:" if len(actions) > 1 else " This makes it fit:" if actions else ""
    if fact.needs_gib <= fact.free_gib:
        text = f"Tight: about {need} ({about}) of {free} free; the smoke test measures it.{cures}"
        return [GateLine("memory", "warning", text, actions, FIT_KEYS)]
    text = (
        f"Needs about {need} ({about}); {free} is free.{cures or ' No change here makes it fit: take a smaller model.'}"
    )
    return [GateLine("memory", "problem", text, actions, FIT_KEYS)]


def _saving(offer: Offer) -> str:
    cost = f", {offer.cost}" if offer.cost else ""
    return f"{offer.text} −{numbers.memory(offer.saves_gib)}{cost}"


def _disk(facts: Facts) -> list[GateLine]:
    fact, keys = facts.disk, DISK_KEYS
    if fact is None:
        return []
    if not fact.writable:
        return [GateLine("disk", "problem", "The workspace cannot be written, so nothing could be saved.", blocks=True)]
    needed, free = numbers.disk(fact.needed_bytes), numbers.disk(fact.free_bytes)
    keep = _go("output.save_total_limit", "Keep fewer checkpoints")
    if fact.one_bytes > fact.free_bytes:
        text = f"The disk has {free} free; one checkpoint needs {numbers.disk(fact.one_bytes)}."
        return [GateLine("disk", "problem", text, (), keys, True)]
    if fact.refused:
        return [GateLine("disk", "problem", fact.refused, (keep,), keys, True)]
    if fact.needed_bytes > fact.free_bytes:
        text = f"The disk may fill up: {needed} needed, {free} free."
        return [GateLine("disk", "warning", text, (keep,), keys)]
    return [GateLine("disk", "pass", f"Disk: {needed} needed, {free} free.", (), keys)]


def _plan(config: Config, facts: Facts) -> list[GateLine]:
    lines, steps, h = [], facts.steps, config.hyperparams
    if steps is not None and h.warmup_steps >= steps > 0 and h.learning_rate > 0:
        word = "step" if steps == 1 else "steps"
        text = f"The warm-up ({h.warmup_steps:,} steps) is not over when the run ends ({steps:,} {word})."
        shorter = str(max(steps // 10, 0))
        use = Action(f"Warm-up {shorter}", "set", values={"hyperparams.warmup_steps": shorter})
        lines.append(GateLine("warm-up", "warning", text, (use,), ("hyperparams.warmup_steps",)))
    if h.learning_rate == 0:
        text = "The learning rate is 0: the weights will not change."
        lines.append(
            GateLine("rate-0", "warning", text, (_go("hyperparams.learning_rate"),), ("hyperparams.learning_rate",))
        )
    if config.eval.eval_strategy != "no" and not (config.data.validation_split or config.data.validation_dataset_path):
        text = "No rows are held out, so there will be no held-out loss."
        lines.append(GateLine("held-out", "warning", text, (_go("data.validation_split"),), ("data.validation_split",)))
    return lines


def _last_good(facts: Facts) -> list[GateLine]:
    if not facts.last_good:
        return []
    changes = [change for change in facts.last_changes if change.field not in ("model_name", "model_display_name")]
    if not changes:
        return [
            GateLine("last-good", "pass", f"Same settings as your last good run ({facts.last_good}).", (), EVERYTHING)
        ]
    more = tuple(f"{c.title}: {_shown(c.field, c.before)} → {_shown(c.field, c.after)}" for c in changes)
    rate = next((c for c in changes if c.field == "hyperparams.learning_rate"), None)
    if rate is not None and rate.before and rate.after:
        factor = rate.after / rate.before
        if factor >= RATE_FACTOR or factor <= 1 / RATE_FACTOR:
            text = f"Learning rate is {numbers.rate(rate.after)}, {_times(factor)} that of your last good run."
            key = "hyperparams.learning_rate"
            back = Action(numbers.rate(rate.before), "set", values={key: as_text(setting(key), rate.before)})
            return [GateLine("last-good", "warning", text, (back,), EVERYTHING, more=more)]
    text = f"{len(changes)} setting{'s differ' if len(changes) > 1 else ' differs'} from your last good run."
    return [GateLine("last-good", "pass", text, (), EVERYTHING, more=more)]


def _times(factor: float) -> str:
    return f"{factor:.0f} times" if factor >= 1 else f"1/{1 / factor:.0f} of"


def _shown(key: str, value: Any) -> str:
    text = as_text(setting(key), value).replace("\n", ", ")
    return (text if len(text) <= 60 else "…" + text[-59:]) or "empty"


def _smoke(config: Config, facts: Facts) -> GateLine:
    fact = facts.smoke
    if fact is None:
        return GateLine("smoke", "not-run", "Smoke test: not run for these settings.")
    more = tuple(f"{_SIGNS[status]} {text}" for status, text in fact.lines)
    fields = tuple(fact.judged)
    if fact.state == "running":
        doing = f": {fact.doing}" if fact.doing else ""
        text = f"Smoke test: running{doing}. {len(fact.lines)} checks done."
        return GateLine("smoke", "not-run", text, (), fields, more=more)
    if fact.state != "done":
        text = f"Smoke test: {fact.state} after {len(fact.lines)} checks."
        return GateLine("smoke", "not-run", text, (), fields, more=more)
    stale = changed_titles(fact.judged, config)
    if stale:
        return GateLine("smoke", "not-run", f"Smoke test: out of date, {_and(stale)} changed.", (), fields, more=more)
    total, rest = fact.passed + fact.failed, ""
    if fact.not_possible:
        rest = f" {fact.not_possible} not possible here."
    if fact.failed:
        first = next((text for status, text in fact.lines if status == "problem"), "")
        head = f"Smoke test: failed {fact.failed} of {total}: {first[:1].lower() + first[1:]}"
        text = f"{head}{rest} Start is still possible."
        return GateLine("smoke", "problem", text, (), fields, more=more)
    took = f" in {numbers.duration(fact.seconds)}" if fact.seconds is not None else ""
    peak = f" Peak {numbers.memory(fact.peak_gib)}." if fact.peak_gib is not None else ""
    return GateLine(
        "smoke",
        "pass",
        f"Smoke test: passed {fact.passed} of {total}{took}.{peak}{rest}",
        (),
        fields,
        more=more,
    )


def _busy(facts: Facts) -> GateLine:
    look = Action("Look at it", "link", href=f"live?run={facts.busy_run}" if facts.busy_run else "live")
    return GateLine("busy", "problem", facts.busy, (Action("Add to queue", "queue"), look), blocks=True)


def _and(words: list[str]) -> str:
    shown = words[:3] + ([f"{len(words) - 3} more"] if len(words) > 3 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
