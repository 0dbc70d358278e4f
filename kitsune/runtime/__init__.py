"""Run: executors of closed regions."""

from kitsune.runtime.replay import Schedule, prepare, replay

__all__ = ["Schedule", "prepare", "replay"]
