"""The table at the end of `make torture` is the one of docs/reliability.md."""

from __future__ import annotations

from tests.conftest import ROOT
from tests.figures import Line, table


def test_the_table_can_be_copied_into_the_documentation() -> None:
    lines = [Line("Kill, 500", "511 `kill -9`", count, 0, 1, None, 45.0) for count in (1500, 11)]
    printed = table(lines).splitlines()
    assert len(printed) == 3 and printed[2] == "| Kill, 500 | 511 `kill -9` | 1,511 | 0 | 2 |  | 1.5 |"
    assert printed[0] in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    assert len({line.count("|") for line in printed}) == 1
