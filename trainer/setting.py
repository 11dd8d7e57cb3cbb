"""What a setting is made of: its default, title, help, bounds and place in the form. `trainer/schema.py` is written in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Group = Literal["What", "How", "Memory", "Saving", "Held-out", "Samples", "Alerts"]


def setting(
    default: Any, title: str, help: str, group: Group, *, basic: bool = False, unit: str = "", **bounds: Any
) -> Any:
    """One setting: its default, its label, one line of help (what it does, when to change it), its place in the form."""
    extra: dict[str, Any] = {"group": group, "basic": basic, "unit": unit}
    if isinstance(default, list):
        bounds["default_factory"] = lambda: list(default)
        return Field(title=title, description=help, json_schema_extra=extra, **bounds)
    return Field(default, title=title, description=help, json_schema_extra=extra, **bounds)


def _not_a_bool(value: Any) -> Any:
    # pydantic takes True for 1; a person who wrote `"batch_size": true` meant something else
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_not_a_bool)]
Real = Annotated[float, BeforeValidator(_not_a_bool), Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A group of settings; unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)
