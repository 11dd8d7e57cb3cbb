"""One error for the person: what happened, where, what to do. Edges turn it into a line, a field message or exit 2."""

from __future__ import annotations


class Refusal(ValueError):
    """Something the user can mend. `field` is the dotted config key it belongs to, when there is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
