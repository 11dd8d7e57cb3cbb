"""The small signs of states and checks: one SVG sprite, used by Python and JavaScript alike.

The header of each page holds `SPRITE` once; `glyph("running")` and, in scripts, `<use href="#g-running">`
refer to it. A sign always has its word beside it and is hidden from screen readers.
"""

from __future__ import annotations

import html
from typing import Literal

Tone = Literal["run", "warn", "bad", "rest"]

_RING = '<circle cx="6" cy="6" r="4.5" fill="none" stroke="currentColor" stroke-width="1.5"/>'
_LINE = 'fill="none" stroke="currentColor" stroke-width="1.5"'
_BOLD = 'fill="none" stroke="currentColor" stroke-width="2"'
# drawn on 12 x 12; currentColor, so that the tone colours it
_SHAPES: dict[str, str] = {
    "running": '<circle cx="6" cy="6" r="4.5" fill="currentColor"/>',
    "preparing": f'{_RING}<path d="M6 6V1.5A4.5 4.5 0 0 1 10.5 6z" fill="currentColor"/>',
    "stopping": f'{_RING}<path d="M6 1.5a4.5 4.5 0 0 1 0 9z" fill="currentColor"/>',
    "interrupted": f'{_RING}<path d="M2.8 9.2l6.4-6.4" {_LINE}/>',
    "paused": '<path d="M3 1.5h2v9H3zM7 1.5h2v9H7z" fill="currentColor"/>',
    "failed": f'<path d="M2.5 2.5l7 7m0-7l-7 7" {_BOLD}/>',
    "diverged": f'<path d="M2 10L9 3M4.5 2.5h5v5" {_BOLD}/>',
    "queued": f"{_RING}",
    "stopped": '<path d="M2 2h8v8H2z" fill="currentColor"/>',
    "finished": f'<path d="M1.5 6.5l3 3 6-7" {_BOLD}/>',
    "warning": f'<path d="M6 1.2v6" {_BOLD}/><circle cx="6" cy="10" r="1.2" fill="currentColor"/>',
    "not-possible": f'<path d="M2.5 6h7" {_BOLD}/>',
}
_SAME = {
    "pausing": "stopping",
    "pass": "finished",
    "problem": "failed",
    "not-run": "queued",
    "idle": "queued",
}
_TONES: dict[Tone, tuple[str, ...]] = {
    "run": ("running", "preparing", "stopping", "pausing", "pass"),
    "warn": ("interrupted", "paused", "warning"),
    "bad": ("failed", "diverged", "problem"),
    "rest": ("queued", "stopped", "finished", "not-possible", "not-run", "idle"),
}
NAMES = tuple(_SHAPES) + tuple(_SAME)

SPRITE = (
    '<svg width="0" height="0" class="sb-sprite" aria-hidden="true" focusable="false"><defs>'
    + "".join(f'<symbol id="g-{name}" viewBox="0 0 12 12">{_SHAPES[_SAME.get(name, name)]}</symbol>' for name in NAMES)
    + "</defs></svg>"
)


def tone(name: str) -> Tone:
    """The tone of a state or check; KeyError when there is no such one."""
    for key, names in _TONES.items():
        if name in names:
            return key
    raise KeyError(name)


def glyph(name: str) -> str:
    """The sign of a state or check as 12 px SVG; `name` is one of NAMES."""
    if name not in NAMES:
        raise KeyError(name)
    return f'<svg class="sb-glyph" width="12" height="12" aria-hidden="true"><use href="#g-{name}"></use></svg>'


def chip(name: str, word: str | None = None) -> str:
    """Sign and word in the tone of the state; `word` (escaped here) stands for the state's own name."""
    label = html.escape(word if word is not None else name.replace("-", " "))
    return f'<span class="sb-state sb-tone-{tone(name)} sb-is-{name}">{glyph(name)}<span>{label}</span></span>'
