"""The form's draft of each session, on the server: it survives page changes, reloads and restarts.

Owns `drafts/SESSION.json` of the workspace. Called by the Train page's handlers and routes. A draft keeps
the text a person typed, also where it cannot be used yet, so that nothing typed is ever lost.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.fields import fields
from trainer.files import make_private_dir, read_json, write_json
from trainer.refusal import Refusal

_SESSION = re.compile(r"[A-Za-z0-9_-]{8,64}")
_TEXT_CHARACTERS = 200_000


@dataclass(frozen=True)
class Draft:
    """What one session has changed in the form.

    `base` is the name of the saved config that the form started from, "" for the server's own config file.
    `values` holds the typed text of each dotted key that was touched. `automatic` gives the reason for each
    value that the page put in by itself. `undone` holds the values from before the last revert. `smoke_id`
    is the last smoke test started from this form, `batch_id` the job that looked for its first batch.
    """

    base: str = ""
    values: dict[str, str] = field(default_factory=dict)
    automatic: dict[str, str] = field(default_factory=dict)
    undone: dict[str, str] = field(default_factory=dict)
    name: str = ""
    why: str = ""
    smoke_id: str = ""
    batch_id: str = ""
    revision: int = 0

    def with_value(self, key: str, text: str, reason: str = "") -> Draft:
        """A draft with one more value; `reason` marks it as put in by the page."""
        automatic = {k: v for k, v in self.automatic.items() if k != key} | ({key: reason} if reason else {})
        return replace(self, values=self.values | {key: text}, automatic=automatic)

    def without(self, key: str) -> Draft:
        """A draft in which one value is again what the config says."""
        values = {k: v for k, v in self.values.items() if k != key}
        return replace(self, values=values, automatic={k: v for k, v in self.automatic.items() if k != key})

    def reverted(self) -> Draft:
        """A draft with no changes, from which `restored` brings the changes back."""
        return replace(self, values={}, automatic={}, undone=self.values)

    def restored(self) -> Draft:
        """A draft with the changes from before the last revert, below those made since."""
        return replace(self, values=self.undone | self.values, undone={})


class Drafts:
    """The drafts of one workspace. Any thread; two tabs of a session change one draft in turn, key by key."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._turn = threading.Lock()

    def read(self, session: str) -> Draft:
        """The session's draft; an empty one where there is none yet."""
        path = self._path(session)
        try:
            return _checked(read_json(path))
        except FileNotFoundError:
            return Draft()
        except ValueError:
            # never in the way of a start, and never thrown away: whoever misses it finds it beside the others
            path.replace(path.with_suffix(".unreadable"))
            return Draft()

    def change(self, session: str, step: Callable[[Draft], Draft]) -> Draft:
        """Apply `step` to the draft as it is now and write the result; returns it with a higher revision."""
        with self._turn:
            before = self.read(session)
            after = step(before)
            if after == before:
                return before
            if sum(map(len, (*after.values.values(), after.name, after.why))) > _TEXT_CHARACTERS:
                raise Refusal(f"The form's texts are longer than {_TEXT_CHARACTERS:,} characters together.")
            after = replace(after, revision=before.revision + 1)
            make_private_dir(self._root)
            write_json(self._path(session), asdict(after))
            return after

    def _path(self, session: str) -> Path:
        if not _SESSION.fullmatch(session):
            raise Refusal("That is not a session of this server.")
        return self._root / f"{session}.json"


def _checked(raw: Any) -> Draft:
    """A draft from a file of ours, without keys that settings no longer have; else ValueError."""
    if not isinstance(raw, dict):
        raise ValueError("a draft is an object")
    known = {info.key for info in fields()}
    texts = {name: str(raw.get(name, "")) for name in ("base", "name", "why", "smoke_id", "batch_id")}
    groups: dict[str, dict[str, str]] = {}
    for name in ("values", "automatic", "undone"):
        group = raw.get(name, {})
        if not isinstance(group, dict):
            raise ValueError(f"{name} is an object")
        groups[name] = {key: str(text) for key, text in group.items() if key in known}
    return Draft(**texts, **groups, revision=int(raw.get("revision", 0)))
