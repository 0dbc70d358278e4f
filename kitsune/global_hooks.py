"""Process-wide hooks of torch's that come and go with every step."""

from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle


class GlobalHook:
    """A hook among torch's `hooks`. It has one handle for life: a backward looks for hooks again whenever there are new ones in
    the process (`lazy/node_hooks.py`), which takes 100 us for 6 leaves."""

    def __init__(self, hooks: dict[int, Any], hook: Callable[..., None]) -> None:
        # Not by torch's function: an interrupt in that leaves a hook whose handle nobody has.
        self._hooks, self._hook, self._handle = hooks, hook, RemovableHandle(hooks)

    @property
    def is_on(self) -> bool:
        """Is it there?"""
        return self._handle.id in self._hooks

    def put_on(self) -> None:
        """As the last of those that are there."""
        self._hooks[self._handle.id] = self._hook

    def take_off(self) -> None:
        """Until it is put on again."""
        self._handle.remove()
