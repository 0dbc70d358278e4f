"""Mutants that no test can find, each with the reason: what they compute is the same, or only another way to the same end."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {}
