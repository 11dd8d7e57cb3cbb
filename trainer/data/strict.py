"""Strict JSON: what is refused is what two readers could read differently, or what no number or text can hold.

Keys that stand twice, NaN, infinities, endless numbers, deep nesting, NUL and bytes that are no UTF-8 are faults. A fast
parser reads what looks sound; whatever looks suspicious is read again by the strict one, which finds the words.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import orjson

from trainer.data.problems import Fault, printable, shown

MAX_NUMBER_DIGITS = 400
MAX_DEPTH = 64

_LONG_NUMBER = re.compile(rb"[0-9.eE+-]{%d}" % (MAX_NUMBER_DIGITS + 1))
_ESCAPED = re.compile(rb"\\.", re.DOTALL)


def parse(raw: bytes) -> Any:
    """The value of one JSON text; raises Fault. Called for every row of a file, so it is fast for sound ones."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return parse_strictly(raw)
    quotes = raw.count(b'"') - raw.count(b'\\"') if b"\\\\" not in raw else _ESCAPED.sub(b"", raw).count(b'"')
    texts = _texts(value, 0, raw)
    # a key that stands twice has left the value, but not the text: then there are more strings in the text
    if texts is None or 2 * texts != quotes:
        return parse_strictly(raw)
    return value


def _texts(value: Any, depth: int, raw: bytes) -> int | None:
    """How many strings a value holds, keys included; None where it needs the strict parser."""
    kind = type(value)
    if kind is str:
        return 1
    if kind is dict:
        if depth >= MAX_DEPTH:
            return None
        count = len(value)
        for inner in value.values():
            if type(inner) is str:
                count += 1
            elif (more := _texts(inner, depth + 1, raw)) is None:
                return None
            else:
                count += more
        return count
    if kind is list:
        if depth >= MAX_DEPTH:
            return None
        count = 0
        for inner in value:
            if (more := _texts(inner, depth + 1, raw)) is None:
                return None
            count += more
        return count
    if kind is float or kind is int:  # a number that is too long for one, or that became another one
        return None if abs(value) > 2**63 or _LONG_NUMBER.search(raw) else 0
    return 0


def parse_strictly(raw: bytes) -> Any:
    """The same by the slow parser alone, which knows where a fault is and what to call it. Raises Fault."""
    text = decoded(raw)
    if "\x00" in text:
        raise Fault("characters", "the line contains a NUL character", text.index("\x00"))
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        what = error.msg[:1].lower() + error.msg[1:]
        raise Fault("bad_json", f"bad JSON at character {error.pos + 1:,}: {what}", error.pos) from None
    except RecursionError:
        raise Fault("bad_json", "the JSON is nested too deeply") from None
    if _is_deep(value, 0):
        raise Fault("bad_json", f"the JSON is nested too deeply (more than {MAX_DEPTH} levels)")
    return value


def _is_deep(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (depth >= MAX_DEPTH or any(_is_deep(each, depth + 1) for each in inner))


def decoded(raw: bytes) -> str:
    """UTF-8 as text; raises Fault, which says how the line reads as Windows text where that is likely meant."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        around = raw[max(0, error.start - 12) : error.start + 12]
        try:
            seen = around.decode("cp1252")
        except UnicodeDecodeError:
            seen = ""
        meant = f"; as Windows or Latin-1 text it reads '{printable(seen, 40)}'" if seen.isprintable() and seen else ""
        at = len(raw[: error.start].decode("utf-8", "replace"))
        raise Fault("not_utf8", f"byte {error.start + 1:,} is not UTF-8 text{meant}", at) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Fault("bad_json", f"the key {shown(twice)} stands twice in one object")
    return found


def _no_constant(text: str) -> NoReturn:
    raise Fault("bad_json", f"{text} is not JSON")


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER_DIGITS:
        raise Fault("bad_json", f"a number has {len(text):,} digits")
    return int(text)


def _real(text: str) -> float:
    if len(text) > MAX_NUMBER_DIGITS or not math.isfinite(value := float(text)):
        raise Fault("bad_json", f"the number {shown(text)} is out of range")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer, parse_float=_real
)
