"""Tries the tokenizer and the chat template of a model folder once, as training will use them. No torch.

Runs in the worker child under a short time-out, since a template is a program: it renders in transformers' sandbox,
and one that never ends is ended. Called by the worker; `trainer.models.full_report` asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from trainer.data.render import Renderer, own_template
from trainer.data.tokens import load_tokenizer
from trainer.models.findings import Findings
from trainer.refusal import Refusal

DATE = "2024-01-01"
TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "Rome."},
]
AGAIN = "Download the tokenizer files of the same model again."
LIBRARY = (
    "Download tokenizer.json of the same model too, or install sentencepiece (or tiktoken, for files of that kind)."
)


def try_tokenizer(path: Path, rows: int | None, file: str) -> dict[str, Any]:
    """Load the tokenizer in `path`, hold it against the embedding's `rows` (None: not known), render a conversation.

    `file` is the one to name. Returns {"problems", "warnings", "facts": {"tokens"}}.
    """
    findings = Findings()
    try:
        tokenizer = load_tokenizer(path)
    except Refusal as refusal:
        if isinstance(refusal.__cause__, StrictDataclassError):  # transformers reads config.json for it too
            reason = " ".join(str(refusal.__cause__).split())[:200].rstrip(".")
            message = f"transformers does not take config.json ({reason})"
            findings.problem("cannot_build", "config.json", message, "Download config.json again.")
        else:
            message = refusal.message[:1].lower() + refusal.message[1:].rstrip(".")
            fix = LIBRARY if file.endswith((".model", ".tiktoken")) else AGAIN
            findings.problem("tokenizer_does_not_load", file, message, fix)
    else:
        vocabulary = tokenizer.get_vocab()
        findings.facts["tokens"] = len(vocabulary)
        if rows:
            _check_special(tokenizer, rows, file, findings)
        if not vocabulary or not _makes_tokens(tokenizer):
            findings.problem("bad_tokenizer", file, "the tokenizer makes no token of a plain sentence", AGAIN)
        elif own_template(tokenizer) is not None:
            _check_template(tokenizer, findings)
    return {"problems": findings.problems, "warnings": findings.warnings, "facts": findings.facts}


def _makes_tokens(tokenizer: Any) -> bool:
    try:
        return bool(tokenizer.encode("A signal box.", add_special_tokens=False))
    except (TypeError, ValueError, OverflowError):  # settings of the wrong type are looked at only here
        return False


def _check_special(tokenizer: Any, rows: int, file: str, findings: Findings) -> None:
    for name in ("eos_token", "bos_token", "pad_token", "unk_token"):
        token, number = getattr(tokenizer, name, None), getattr(tokenizer, f"{name}_id", None)
        if token is None or number is None or number < rows:
            continue
        message = f"{name} ('{str(token)[:60]}') is token {number:,}, the model has rows for {rows:,} tokens only"
        if name in ("eos_token", "bos_token"):
            findings.problem("special_token_without_row", file, message, AGAIN)
        else:
            fix = "Nothing to do here: rows are trained without padding and nothing becomes that token."
            findings.warn("special_token_without_row", file, message, fix)


def _check_template(tokenizer: Any, findings: Findings) -> None:
    """Whether a plain conversation can be rendered; where not, plain ChatML still can."""
    try:
        rendered = Renderer(tokenizer, None, DATE).render(TALK)
    except Refusal as refusal:
        message = f"the chat template cannot render a plain conversation: {refusal.message[:200].rstrip('.')}"
        fix = "Choose plain ChatML, or take the template of the original model."
        findings.warn("template_fails", "chat_template.jinja", message, fix)
        return
    if not any(rendered.labels):
        message = "the chat template leaves nothing of the answers to learn"
        fix = "Choose plain ChatML, or take the template of the original model."
        findings.warn("template_fails", "chat_template.jinja", message, fix)
