"""Every code of the model doctor stands in docs/doctors.md and has a fixture in a test; the page names none that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_RAISED = re.compile(r'(?:problem|warn|BadHeader)\(\s*"([a-z_0-9]+)"|"code": "([a-z_0-9]+)"')
_LISTED = re.compile(r"^\| `([a-z_0-9]+)` \|", re.MULTILINE)


def raised() -> set[str]:
    """The codes in the source."""
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "trainer" / "models").glob("*.py"))
    return {first or second for first, second in _RAISED.findall(sources)}


def test_every_code_is_explained_and_none_is_left_over() -> None:
    page = (ROOT / "docs" / "doctors.md").read_text("utf-8").split("### Its codes")[1].split("\n## ")[0]
    assert len(raised()) > 75
    assert raised() == set(_LISTED.findall(page))


def test_every_code_has_a_fixture() -> None:
    tests = "".join(
        path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py") if path.name != Path(__file__).name
    )
    assert {code for code in raised() if f'"{code}"' not in tests} == set()
