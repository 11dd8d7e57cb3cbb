"""A row on its way to the renderer: the system message that it gets, then what the profile makes of it.

Owns the rule whose system prompt counts, and the filled-in date. Called by trainer.data.tokens, the doctor
and the worker's previews.
"""

from __future__ import annotations

from pathlib import Path

import profiles
from trainer.refusal import Refusal

Conversation = list[dict[str, str]]


class Shaper:
    """Turns the messages of a row into those that are rendered. `date` is YYYY-MM-DD.

    The profile's system prompt counts; `system_prompt` is used where there is no profile, or it has none.
    Raises Refusal for an unknown profile or a placeholder that nothing fills.
    """

    def __init__(self, profile: str | None, profiles_root: str | None, system_prompt: str, date: str) -> None:
        try:
            root = Path(profiles_root) if profiles_root else None
            self.profile = profiles.load(profile, root) if profile else None
        except ValueError as error:
            raise Refusal(str(error), "profile.name") from None
        try:
            own = self.profile.system_prompt(date) if self.profile else ""
            self.system_prompt = own or profiles.fill_date(system_prompt, date)
        except ValueError as error:
            raise Refusal(str(error), "profile.system_prompt") from None
        self.date = date
        self._overwrite = bool(own) and self.profile is not None and self.profile.overwrites_system

    def shape(self, messages: Conversation, index: int) -> Conversation:
        """The messages to render; `index` is the row's 0-based place in its file. Raises Refusal."""
        whole = profiles.with_system(messages, self.system_prompt, self._overwrite)
        if self.profile is None:
            return whole
        try:
            return self.profile.transform({"messages": whole}, index)["messages"]
        except ValueError as error:
            raise Refusal(str(error)) from None
