"""Static functions: after a few calls that did the same, their Python is skipped, checked by guards and by audits."""

from kitsune.static.function import StaticFunction

__all__ = ["StaticFunction"]
