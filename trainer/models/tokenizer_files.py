"""The tokenizer files of a model folder, in any layout: complete, readable, and not larger than the model's
embedding.

Called by `trainer.models.inspect`; the tokenizer itself is built by `trainer.models.tokenizer_trial`.
"""

from __future__ import annotations

import re
from typing import Any

from trainer.models.findings import Findings
from trainer.models.folder import ModelFolder

MAX_TOKENIZER_BYTES = 256_000_000
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
LAYOUTS = (
    ("tokenizer.json",),
    *((name,) for name in SENTENCEPIECE),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tekken.json",),
)
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# placeholders of a multimodal sister model that a text-only one keeps in its tokenizer; they never occur in text
_OTHER_SENSES = re.compile(r"image|img|audio|video|vision|patch", re.IGNORECASE)


def check_tokenizer(folder: ModelFolder, findings: Findings, rows: int | None) -> None:
    """Judge the tokenizer files against `rows`, the rows of the embedding (None: not known), and note the facts."""
    layouts = (*LAYOUTS, *((name,) for name in folder.matching(lambda name: name.endswith(".tiktoken"))))
    layout = next((layout for layout in layouts if all(folder.has(name) for name in layout)), None)
    known = [name for names in layouts for name in names if folder.has(name)]
    findings.facts["tokenizer_files"] = known + [name for name in SIDE_FILES if folder.has(name)]
    if layout is None:
        _explain_absence(folder, findings)
        return
    settings = folder.json("tokenizer_config.json") if folder.has("tokenizer_config.json") else {}
    special = folder.json("special_tokens_map.json") if folder.has("special_tokens_map.json") else {}
    settings = {**(special or {}), **(settings or {})}
    findings.facts["has_chat_template"] = _has_template(folder, settings)
    if not findings.facts["has_chat_template"]:
        message = "the folder has no chat template, so the form of a conversation is not known"
        findings.warn(
            "no_chat_template", "tokenizer_config.json", message, "Add the instruct version's chat_template.jinja."
        )
    if settings.get("auto_map"):
        message = "tokenizer_config.json names code of its own (auto_map)"
        findings.warn("auto_map", "tokenizer_config.json", message, "That code is never run.")
    ids = _token_ids(folder, layout, settings)
    findings.facts["tokens"] = len(ids) or None
    _check_special(findings, settings)
    if ids and rows:
        _check_rows(findings, layout[0], ids, rows, settings)


def _explain_absence(folder: ModelFolder, findings: Findings) -> None:
    fix = "Download the tokenizer files of the same model too."
    if folder.has("vocab.json"):
        message = "merges.txt is missing; vocab.json alone is only half a tokenizer"
        findings.problem("no_tokenizer", "merges.txt", message, fix)
        return
    message = "the tokenizer is missing (no tokenizer.json, tokenizer.model or vocab.json with merges.txt)"
    findings.problem("no_tokenizer", "tokenizer.json", message, fix)


def _has_template(folder: ModelFolder, settings: dict[str, Any]) -> bool:
    files = ("chat_template.jinja", "chat_template.json")
    return bool(settings.get("chat_template")) or any(folder.has(name) for name in files)


def _token_ids(folder: ModelFolder, layout: tuple[str, ...], settings: dict[str, Any]) -> dict[str, int]:
    """Token -> id, as far as the layout tells without the tokenizer's own code; empty for SentencePiece files."""
    ids: dict[str, int] = {}
    if layout == ("tokenizer.json",):
        content = folder.json("tokenizer.json", MAX_TOKENIZER_BYTES) or {}
        ids = _from_tokenizer_json(content)
        if content and not ids:
            message = "tokenizer.json holds no vocabulary"
            folder.findings.problem("bad_tokenizer", "tokenizer.json", message, "Download tokenizer.json again.")
    elif layout == ("vocab.json", "merges.txt"):
        folder.file("merges.txt")
        ids = _whole_numbers(folder.json("vocab.json", MAX_TOKENIZER_BYTES) or {})
    else:
        folder.file(layout[0])
    if layout[0] != "tokenizer.json" and ids:
        if folder.has("added_tokens.json"):
            ids |= _whole_numbers(folder.json("added_tokens.json") or {})
        ids |= _from_added(settings.get("added_tokens_decoder"))
    return ids


def _from_tokenizer_json(content: dict[str, Any]) -> dict[str, int]:
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        ids = _whole_numbers(vocabulary)
    elif isinstance(vocabulary, list):  # Unigram: [[token, score], ...], the id is the place
        ids = {str(entry[0]): place for place, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and type(token.get("id")) is int:
            ids[str(token.get("content"))] = token["id"]
    return ids


def _whole_numbers(table: dict[str, Any]) -> dict[str, int]:
    return {token: number for token, number in table.items() if type(number) is int}


def _from_added(decoder: Any) -> dict[str, int]:
    table = decoder if isinstance(decoder, dict) else {}
    return {
        str(entry.get("content")): int(key)
        for key, entry in table.items()
        if isinstance(entry, dict) and key.isdecimal()
    }


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) and value else None


def _check_special(findings: Findings, settings: dict[str, Any]) -> None:
    end, pad = _content(settings.get("eos_token")), _content(settings.get("pad_token"))
    findings.facts["eos_token"], findings.facts["pad_token"] = end, pad
    if end is None:
        message = "the tokenizer names no end-of-turn token (eos_token), so an answer may never end"
        findings.warn("no_eos_token", "tokenizer_config.json", message, "Set eos_token in tokenizer_config.json.")
    elif end == pad:
        message = f"padding and end of turn are the same token ({end[:60]})"
        fix = "Nothing to do here: rows are trained without padding, so the end of a turn is still learnt."
        findings.warn("pad_is_eos", "tokenizer_config.json", message, fix)


def _check_rows(findings: Findings, file: str, ids: dict[str, int], rows: int, settings: dict[str, Any]) -> None:
    beyond = {token: number for token, number in ids.items() if number >= rows}
    if not beyond:
        return
    token, number = max(beyond.items(), key=lambda item: item[1])
    message = f"the tokenizer goes up to token {number:,} ('{token[:60]}'), the model has rows for {rows:,} tokens only"
    named = {_content(settings.get("eos_token")), _content(settings.get("pad_token"))}
    if all(_OTHER_SENSES.search(token) and token not in named for token in beyond):
        findings.warn("unused_tokens", file, message, "Those stand for images or sound and never occur in text.")
        return
    fix = "Download model and tokenizer from the same place."
    findings.problem("tokenizer_larger_than_model", file, message, fix)
