"""The moving parts of the Train page as markup: gate lines, memory bar, changes, suggestions, backups.

Every word that comes from a file, a person or a report is escaped here. Called by `ui/routes_train.py`; the page's
script puts the result in place.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from pathlib import Path

from trainer.config import Change, as_text
from trainer.config import field as setting
from ui import numbers
from ui.gate import headline
from ui.gate_facts import Action, GateLine, MemoryFact
from ui.glyphs import chip, glyph
from ui.suggest import Suggestion

_GLYPHS = {
    "problem": "problem",
    "warning": "warning",
    "pass": "pass",
    "not-possible": "not-possible",
    "not-run": "not-run",
}
_WORDS = {
    "problem": "Problem",
    "warning": "Warning",
    "pass": "Passed",
    "not-possible": "Not possible here",
    "not-run": "Open",
}


def head_html(lines: list[GateLine]) -> str:
    """The gate in a few words."""
    status, text = headline(lines)
    return chip(_GLYPHS[status], text)


def lines_html(lines: list[GateLine]) -> str:
    """All lines: those to look at first, the passed ones behind a fold. The smoke test's verdict is never folded away."""
    folded = [line.status in ("pass", "not-possible") and line.code != "smoke" for line in lines]
    open_lines = [line for line, hide in zip(lines, folded, strict=True) if not hide]
    passed = [line for line, hide in zip(lines, folded, strict=True) if hide]
    parts = [f'<ul class="sb-checks">{"".join(map(_line, open_lines))}</ul>'] if open_lines else []
    if passed:
        words = f"{len(passed)} check{'s' if len(passed) > 1 else ''} passed"
        parts.append(
            f'<details data-fold="passed"><summary>{glyph("pass")} {words}</summary>'
            f'<ul class="sb-checks">{"".join(map(_line, passed))}</ul></details>'
        )
    return "".join(parts)


def _line(line: GateLine) -> str:
    tone = {"problem": "bad", "warning": "warn", "pass": "run"}.get(line.status, "rest")
    stale = " sb-stale" if line.status == "not-run" else ""
    actions = "".join(_action(action) for action in line.actions)
    more = ""
    if line.more:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in line.more)
        card = f'<ul class="sb-report-card">{items}</ul>'
        more = f'<details data-fold="{html.escape(line.code)}"><summary>More</summary>{card}</details>'
    offers = f"<div class=sb-offers>{actions}</div>" if actions else ""
    return (
        f'<li class="sb-tone-{tone}{stale}" data-code="{html.escape(line.code)}" '
        f'data-fields="{html.escape(" ".join(line.fields))}">{glyph(_GLYPHS[line.status])}'
        f'<span class="sb-line-text"><span class="sb-hidden">{_WORDS[line.status]}: </span>'
        f"{html.escape(line.text)}</span>{offers}{more}</li>"
    )


def _action(action: Action) -> str:
    label = html.escape(action.text)
    if action.kind == "link":
        return f'<a class="sb-button sb-small" href="{html.escape(action.href)}">{label}</a>'
    if action.kind == "field":
        return (
            f'<button type="button" class="sb-button sb-small" data-goto="{html.escape(action.goto)}">{label}</button>'
        )
    if action.kind == "queue":
        return f'<button type="button" class="sb-button sb-small" data-queue>{label}</button>'
    values = html.escape(json.dumps({"act": "set", "values": action.values}))
    return f'<button type="button" class="sb-button sb-small" data-act="{values}">{label}</button>'


def fit_html(memory: MemoryFact | None) -> str:
    """The memory bar: parts of the estimate against what is free, with the parts in words behind a fold."""
    if memory is None or memory.free_gib <= 0:
        return ""
    scale = max(memory.needs_gib, memory.free_gib)
    segments = "".join(
        f'<i class="sb-part-{n % 7}" style="width:{gib / scale:.2%}"></i>' for n, (_, gib) in enumerate(memory.parts)
    )
    free_at = f"{memory.free_gib / scale:.2%}"
    over = " sb-over" if memory.needs_gib > memory.free_gib else ""
    rows = "".join(
        f'<tr><td><i class="sb-swatch sb-part-{n % 7}"></i>{html.escape(name)}</td>'
        f'<td class="sb-right">{numbers.memory(gib)}</td></tr>'
        for n, (name, gib) in enumerate(memory.parts)
        if gib * 1024 >= 0.5  # a part of less than a MiB would read as 0
    )
    words = f"about {numbers.memory(memory.needs_gib)} of {numbers.memory(memory.free_gib)} free"
    when = f'<p class="sb-help">{html.escape(_when(memory))}</p>'
    return (
        f'<div class="sb-fit{over}" role="img" aria-label="Memory: {words}">{segments}'
        f'<b style="left:calc({free_at} - 1px)"></b></div>'
        f'<details data-fold="memory-parts"><summary>Memory by part: {words}</summary>'
        f'<table class="sb-table sb-parts">{rows}</table>{when}</details>'
    )


def _when(memory: MemoryFact) -> str:
    """When the peak is reached, how far off the figure may be, and what it was calibrated by."""
    at = f"The peak is in the {memory.moment}" if memory.moment else "The peak"
    by = f", {memory.words}" if memory.words else ""
    return f"{at}; the figure may be off by {memory.spread * 100:.0f} %{by}."


def plan_html(line: str) -> str:
    """What will happen, in one line."""
    return f'<p class="sb-derived">{html.escape(line)}</p>' if line else ""


def changes_html(changes: list[Change], automatic: dict[str, str], retired: list[str], undone: int) -> str:
    """What differs from the config, each with an undo; the way back after a revert; keys without effect."""
    rows = "".join(_change(change, automatic.get(change.field, "")) for change in changes)
    table = f'<table class="sb-table"><tr><th>Setting</th><th>Config</th><th>Now</th><th></th></tr>{rows}</table>'
    text = table if changes else "<p>Nothing differs from the config.</p>"
    if undone:
        act = html.escape(json.dumps({"act": "restore"}))
        word = f"{undone} change{'s were' if undone > 1 else ' was'} dropped."
        text += f'<p>{word} <button type="button" class="sb-link" data-act="{act}">Bring back</button></p>'
    if retired:
        text += (
            f'<p class="sb-help">In the config, but without effect (retired): {html.escape(", ".join(retired))}.</p>'
        )
    return text


def _change(change: Change, reason: str) -> str:
    act = html.escape(json.dumps({"act": "undo", "key": change.field}))
    note = f'<div class="sb-help">{html.escape(reason)}</div>' if reason else ""
    return (
        f"<tr><td>{html.escape(change.title)}{note}</td><td>{_value(change.field, change.before)}</td>"
        f"<td>{_value(change.field, change.after)}</td>"
        f'<td class="sb-right"><button type="button" class="sb-link" data-act="{act}" '
        f'aria-label="Undo {html.escape(change.title)}">Undo</button></td></tr>'
    )


def _value(key: str, value: object) -> str:
    info = setting(key)
    try:
        text = as_text(info, value)
    except (TypeError, ValueError, AttributeError):  # typed text that is no value of this setting
        text = str(value)
    return html.escape(text) if text else '<span class="sb-help">empty</span>'


def suggestions_html(suggestions: list[Suggestion]) -> str:
    """Suggested values, each with its reason, and one button to take them all."""
    if not suggestions:
        return "<p>Nothing to suggest: what can be judged from model, data and device is set well.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(setting(s.key).title)}</td><td>{_value(s.key, s.before)}</td>"
        f"<td>{html.escape(s.text)}</td><td>{html.escape(s.reason)}</td></tr>"
        for s in suggestions
    )
    act = html.escape(json.dumps({"act": "set", "values": {s.key: s.text for s in suggestions}}))
    head = "<tr><th>Setting</th><th>Now</th><th>Suggested</th><th>Because</th></tr>"
    word = "this value" if len(suggestions) == 1 else f"these {len(suggestions)} values"
    return (
        f'<table class="sb-table">{head}{rows}</table><p class="sb-row"><button type="button" '
        f'class="sb-button sb-primary" data-act="{act}">Use {word}</button>'
        '<button type="button" class="sb-button" data-closes="train-suggestions">Close</button></p>'
    )


def backups_html(name: str, backups: Iterable[tuple[Path, float]], now_s: float) -> str:
    """Earlier versions of a saved config, each with a button that puts it back."""
    rows = "".join(
        f'<li>{html.escape(numbers.when(at, now_s))} <button type="button" class="sb-link" '
        f'data-backup="{html.escape(path.name)}" data-name="{html.escape(name)}">Put back</button></li>'
        for path, at in backups
    )
    return (
        f'<p class="sb-help">Earlier versions of {html.escape(name)}</p><ul class="sb-plain">{rows}</ul>'
        if rows
        else ""
    )
