"""Profiles: how a row becomes training text and how generation is constrained. One file is one profile.

Owns the list of built-in profiles and the loading of users' own (`profiles/NAME.json` of the workspace).
Called by the data pipeline, the samples and the form. Imports nothing of ours from outside this package, and
torch only inside functions.
"""

from __future__ import annotations

from pathlib import Path

from profiles import declared, emoji_think, plain, regime3
from profiles.contract import Profile, fill_date, with_system

__all__ = ["Profile", "fill_date", "load", "names", "with_system"]

_BUILT_IN: tuple[Profile, ...] = (plain.PROFILE, emoji_think.PROFILE, regime3.PROFILE)


def names(user_root: Path | None = None) -> list[str]:
    """The names that `load` knows: built-in ones first, then the files `NAME.json` in the folder `user_root`.

    A file that `load` would refuse is listed too, so that a person sees it and is told its fault when
    choosing it.
    """
    built_in = [profile.name for profile in _BUILT_IN]
    own = declared.names(user_root) if user_root is not None else []
    return built_in + [name for name in own if name not in built_in]


def load(name: str, user_root: Path | None = None) -> Profile:
    """The profile called `name`, a built-in one or `user_root/name.json`.

    Raises ValueError that lists the available names, or names the fault of the user's file.
    """
    for profile in _BUILT_IN:
        if profile.name == name:
            return profile
    if user_root is not None and name in declared.names(user_root):
        return declared.read(user_root / f"{name}.json")
    raise ValueError(f"There is no profile '{name[:80]}'. Available: {', '.join(names(user_root))}.")
