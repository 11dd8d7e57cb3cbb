"""The profile `regime3`: symbolic reasoning, with the answer between <<ANS_START>> and <<ANS_END>>.

Answers are only wrapped; they are not rewritten into the canonical form. A row that was transformed before
stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from profiles.contract import copy_row, fill_date, text_of

START = "<<ANS_START>>"
END = "<<ANS_END>>"
SYSTEM_PROMPT = f"""Current date: {{date}}.

You are a symbolic reasoning assistant. Follow these rules:
1. Write every expression in canonical form: (op arg1 arg2).
2. Put the final answer between {START} and {END}.
3. Reason step by step before you answer.
4. Be precise and concise.

Example: for 2 + 3 the answer is {START} (add 2 3) = 5 {END}"""


def wrap(answer: str) -> str:
    """`answer` with both markers; a marker that is there already is not added again."""
    has_start, has_end = START in answer, END in answer
    if has_start and has_end:
        return answer
    if has_start:
        return f"{answer} {END}"
    if has_end:
        return f"{START} {answer}"
    return f"{START} {answer.strip()} {END}"


@dataclass(frozen=True)
class Regime3:
    """Symbolic answers between two markers."""

    name: str = "regime3"
    description: str = "Symbolic reasoning: answers stand between <<ANS_START>> and <<ANS_END>>."
    overwrites_system: bool = True
    plain_template: bool = True

    def system_prompt(self, date: str) -> str:
        """The four rules and one worked example, dated."""
        return fill_date(SYSTEM_PROMPT, date)

    def transform(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """A copy of `row` with each assistant turn wrapped; raises ValueError when one is not text."""
        result = copy_row(row)
        for place, message in enumerate(result["messages"]):
            if message.get("role") == "assistant":
                message["content"] = wrap(text_of(message, place))
        return result

    def logits_processors(self, tokenizer: Any) -> list[Any]:
        """None: the markers are learnt, not forced."""
        return []


PROFILE = Regime3()
