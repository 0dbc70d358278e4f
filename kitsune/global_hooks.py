"""Process-wide hooks of torch's that come and go with every step."""

from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle


class GlobalHook:
    """A hook that `register` puts on. It has one handle for life: a backward looks for hooks again whenever there are new ones
    in the process (`lazy/node_hooks.py`), which takes 100 us for 6 leaves."""

    def __init__(self, register: Callable[[Any], RemovableHandle], hook: Callable[..., None]) -> None:
        self._register, self._hook = register, hook
        self._handle: RemovableHandle | None = None
        self.is_on = False

    def put_on(self) -> None:
        """As the last of those that are there."""
        if self._handle is None:
            self._handle = self._register(self._hook)
        else:
            hooks: Any = self._handle.hooks_dict_ref()
            hooks[self._handle.id] = self._hook
        self.is_on = True

    def take_off(self) -> None:
        """Until it is put on again."""
        assert self._handle is not None
        self._handle.remove()
        self.is_on = False
