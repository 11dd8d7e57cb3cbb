"""A chat template as pieces: which parts of the rendered text are the template's, and which are a content.

The template is rendered once with a mark in place of each content. A row's own rendering must equal those
marks filled in; where the template strips or moves a content, each message is aligned on its own, or the row
is refused. Owns the sandboxed rendering (transformers' own sandbox, the run's date, a time limit) and plain
ChatML. Called by trainer.data.render.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2

from trainer.data.conversation import printable, shown
from trainer.refusal import Refusal

Messages = Sequence[Mapping[str, str]]

RENDER_LIMIT_S = 2.0
MAX_LAYOUTS = 4096
PLAIN_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' ~ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_MARK = "ZqSlot"
_OPTIONAL_TAGS = re.compile(r"(\s*<[^<>]*>)*\s*")
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rendered text; `message` is the index of the message whose content it is, None: the template's."""

    text: str
    message: int | None


@dataclass(frozen=True, slots=True)
class Pieces:
    """A rendered conversation, cut: template's piece, content, template's piece, ..., template's piece.

    `notes` says what the template did to the contents: system_dropped, thinking_dropped, whitespace_changed.
    """

    pieces: tuple[Piece, ...]
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The rendered text."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where contents go: the message indices in `order`, and the len(order) + 1 `scaffolds` around them."""

    order: tuple[int, ...]
    scaffolds: tuple[str, ...]


class Template:
    """One chat template with everything it may see; `date` (YYYY-MM-DD) is what it gets for today.

    `constants` are the tokenizer's special tokens by name. The time limit is a signal: it holds on the main
    thread only. Raises Refusal for one that does not compile.
    """

    def __init__(self, source: str, date: str, constants: Mapping[str, Any]) -> None:
        # apply_chat_template lets nobody pin the clock, so the sandbox behind it is used as it is
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.source = source
        today = _day(date)
        self._constants = dict(constants) | {"strftime_now": lambda format: today.strftime(format)}
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._compiled = _guarded(lambda: _compile_jinja_template(source))

    def text(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The rendered text of a conversation; raises Refusal when the template fails or takes too long."""
        plain = [dict(message) for message in messages]
        return _guarded(
            lambda: self._compiled.render(
                **self._constants,
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        )

    def layout(self, roles: tuple[str, ...]) -> Layout:
        """Where contents of these roles go; raises Refusal when a turn is repeated, dropped or reordered."""
        if roles not in self._layouts:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            marked = [{"role": role, "content": _mark(_MARK, number)} for number, role in enumerate(roles)]
            layout = _split(self.text(marked), _MARK)
            _check_layout(layout, roles)
            self._layouts[roles] = layout
        return self._layouts[roles]

    def dropped(self, roles: tuple[str, ...]) -> tuple[int, ...]:
        """Indices of the messages that the template leaves out."""
        present = self.layout(roles).order
        return tuple(number for number in range(len(roles)) if number not in present)

    def pieces(self, messages: Messages) -> Pieces:
        """Cut the rendering of `messages`; raises Refusal for a row whose contents cannot be found in it."""
        roles = tuple(message["role"] for message in messages)
        layout = self.layout(roles)
        notes: tuple[str, ...] = ("system_dropped",) if len(layout.order) < len(roles) else ()
        contents = [messages[number]["content"] for number in layout.order]
        rendered = self.text(messages)
        if _fill(layout.scaffolds, contents) != rendered:
            scaffolds, contents, more = self._align(messages, layout)
            notes += more
            if _fill(scaffolds, contents) != rendered:
                raise Refusal("The chat template rewrites this row, so its answer cannot be told from the rest.")
            layout = Layout(layout.order, scaffolds)
        cut = [Piece(layout.scaffolds[0], None)]
        for number, content, after in zip(layout.order, contents, layout.scaffolds[1:], strict=True):
            cut += [Piece(content, number), Piece(after, None)]
        return Pieces(tuple(cut), notes)

    def _align(self, messages: Messages, layout: Layout) -> tuple[tuple[str, ...], list[str], tuple[str, ...]]:
        """Find each content by rendering it between the marks of all others: (scaffolds, contents, notes)."""
        mark = _MARK
        while any(mark in message["content"] for message in messages):
            mark += "z"
        marked = [{"role": message["role"], "content": _mark(mark, n)} for n, message in enumerate(messages)]
        scaffolds, contents, notes = list(layout.scaffolds), [], set()
        for place, number in enumerate(layout.order):
            content = messages[number]["content"]
            alone = _split(self.text([*marked[:number], messages[number], *marked[number + 1 :]]), mark)
            if alone.order != layout.order[:place] + layout.order[place + 1 :]:
                raise Refusal(f"The chat template moves other turns when it sees message {number + 1}.")
            found = _find(alone.scaffolds[place], content, layout.scaffolds[place], layout.scaffolds[place + 1])
            if found is None:
                raise Refusal(f"The chat template rewrites message {number + 1}; it is not in the rendered text.")
            scaffolds[place], kept = found
            contents.append(kept)
            if "".join(kept.split()) != "".join(content.split()):
                notes.add("thinking_dropped")
            elif kept != content:
                notes.add("whitespace_changed")
        return tuple(scaffolds), contents, tuple(sorted(notes))


def _find(region: str, content: str, before: str, after: str) -> tuple[str, str] | None:
    """What stands before the content and the content as rendered, in `region` = before + content + after.

    The content may differ in white space, may lack its thinking part, and the template's empty thinking block
    may be missing where the content brings its own.
    """
    if not region.endswith(after):
        return None
    inner = region[: len(region) - len(after)]
    candidates = [content]
    if "</think>" in content:
        candidates.append(content.rpartition("</think>")[2])
    for candidate in candidates:
        if inner.startswith(before) and "".join(inner[len(before) :].split()) == "".join(candidate.split()):
            return before, inner[len(before) :]
        start = _start_of(inner, candidate)
        if start is not None and before.startswith(inner[:start]) and _OPTIONAL_TAGS.fullmatch(before[start:]):
            return inner[:start], inner[start:]
    return None


def _start_of(text: str, ending: str) -> int | None:
    """Where `ending` starts at the end of `text`, white space aside; None when it is not there or blank."""
    if not ending.strip():
        return None
    if text.endswith(ending):
        return len(text) - len(ending)
    at = len(text)
    for character in reversed("".join(ending.split())):
        at -= 1
        while at >= 0 and text[at].isspace():
            at -= 1
        if at < 0 or text[at] != character:
            return None
    return at


def _mark(mark: str, number: int) -> str:
    return f"{mark}{number}Q"


def _fill(scaffolds: Sequence[str], contents: Sequence[str]) -> str:
    parts = [scaffolds[0]]
    for content, after in zip(contents, scaffolds[1:], strict=True):
        parts += [content, after]
    return "".join(parts)


def _split(rendered: str, mark: str) -> Layout:
    parts = re.split(f"{mark}([0-9]+)Q", rendered)
    return Layout(tuple(int(number) for number in parts[1::2]), tuple(parts[::2]))


def _check_layout(layout: Layout, roles: tuple[str, ...]) -> None:
    order = layout.order
    if len(set(order)) < len(order):
        twice = next(number for number in order if order.count(number) > 1)
        raise Refusal(f"The chat template repeats message {twice + 1} ({roles[twice]}).")
    for number, role in enumerate(roles):
        if number not in order and role != "system":
            raise Refusal(f"The chat template drops or rewrites message {number + 1} ({role}).")
    turns = [number for number in order if roles[number] != "system"]
    if turns != sorted(turns):
        raise Refusal("The chat template changes the order of the turns.")


def _day(date: str) -> datetime:
    try:
        return datetime.strptime(date, "%Y-%m-%d")
    except ValueError:
        raise Refusal(f"The date is {shown(date)}; a date such as 2025-11-22 is needed.") from None


def _guarded(work: Callable[[], Any]) -> Any:
    """Run a piece of the template's code; whatever it does wrong becomes a Refusal."""
    try:
        with _time_limit():
            return work()
    except TimeoutError:
        raise Refusal(f"The chat template is too slow: more than {RENDER_LIMIT_S:g} s for one row.") from None
    except jinja2.TemplateSyntaxError as error:
        what = printable(str(error), 120).rstrip(".")
        raise Refusal(f"The chat template has a mistake on line {error.lineno}: {what}.") from None
    except _TEMPLATE_FAULTS as error:
        what = printable(str(error), 120).rstrip(".")
        raise Refusal(f"The chat template refuses this row: {what}.") from None
    except MemoryError:
        raise Refusal("The chat template needs more memory than it may have.") from None


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError in the block after RENDER_LIMIT_S of processor time (POSIX, main thread)."""
    if not hasattr(signal, "SIGPROF") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, RENDER_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
