"""What a setting is made of: its default, title, help, bounds and place in the form. `trainer/schema.py` is written in it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Group = Literal["What", "How", "Memory", "Saving", "Held-out", "Samples", "Alerts", "Notify"]


def setting(
    default: Any,
    title: str,
    help: str,
    group: Group,
    *,
    basic: bool = False,
    unit: str = "",
    secret: bool = False,
    **bounds: Any,
) -> Any:
    """One setting: its default, its label, one line of help (what it does, when to change it), its place in the form.

    The value of a `secret` one is shown to nobody: forms, refusals and comparisons show its host alone.
    """
    extra: dict[str, Any] = {"group": group, "basic": basic, "unit": unit, "secret": secret}
    if isinstance(default, list):
        bounds["default_factory"] = lambda: list(default)
        return Field(title=title, description=help, json_schema_extra=extra, **bounds)
    return Field(default, title=title, description=help, json_schema_extra=extra, **bounds)


def _not_a_bool(value: Any) -> Any:
    # pydantic takes True for 1; a person who wrote `"batch_size": true` meant something else
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _web_address(value: str) -> str:
    """An http or https address with a host, or nothing; ValueError without the value, which may be a secret."""
    if value and (not re.fullmatch(r"https?://[!-~]{1,2000}", value) or not host_of(value)):
        raise ValueError("a web address is needed")
    return value


def host_of(address: str) -> str:
    """ "hooks.slack.com": what of a secret address may be shown; "" for what is no address."""
    try:
        parts = urlsplit(address)
        return (parts.hostname or "") if parts.port != 0 else ""
    except ValueError:  # a port or an IPv6 address that is none
        return ""


WebAddress = Annotated[str, AfterValidator(_web_address)]
Count = Annotated[int, BeforeValidator(_not_a_bool)]
Real = Annotated[float, BeforeValidator(_not_a_bool), Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A group of settings; unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)
