"""What the sweep expects to differ from eager, each row with its reason. A row that is equal fails the sweep."""

from __future__ import annotations

# (entry, part of the sweep): reason. "*" is every part.
EXPECTED: dict[tuple[str, str], str] = {}


def expected_reason(entry: str, part: str) -> str | None:
    return EXPECTED.get((entry, part)) or EXPECTED.get((entry, "*"))
