"""Doors that are put on and taken off together, whole again after an interrupt at any line of either."""

import ctypes
import gc
from collections.abc import Callable, Iterable
from typing import Any

# (owner, name, what makes the door from the original)
Door = tuple[Any, str, Callable[[Any], Any]]
# A program that opens contexts this often, such as one around each step, keeps the doors: to patch all of them takes 2 ms. With
# no context open they pass everything on.
OPENINGS = 4


class DoorSet:
    """The doors that `doors()` tells of."""

    def __init__(self, doors: Callable[[], Iterable[Door]]) -> None:
        self._doors = doors
        # (owner, name, was it the owner's own, the original): noted before the door is there, and until it is not.
        self._originals: list[tuple[Any, str, bool, Any]] = []
        self._are_on = False
        self._n_openings = 0

    def put_on(self) -> None:
        """Nothing, if they are."""
        if self._are_on:
            return
        self._take_off()
        self._n_openings += 1
        for owner, name, make in self._doors():
            own = name in vars(owner)
            original = vars(owner)[name] if own else getattr(owner, name)
            door = make(original)
            self._originals.append((owner, name, own, original))
            _set(owner, name, door)
        self._are_on = True

    def may_go(self, for_good: bool = False) -> None:
        """Nobody needs them now; `for_good` where the program goes on as plain PyTorch."""
        if for_good or self._n_openings < OPENINGS or not self._are_on:
            self._take_off()

    def _take_off(self) -> None:
        self._are_on = False
        while self._originals:
            owner, name, own, original = self._originals[-1]
            if own:
                _set(owner, name, original)
            elif name in vars(owner):
                delattr(owner, name)
            self._originals.pop()


def _set(owner: Any, name: str, value: Any) -> None:
    try:
        setattr(owner, name, value)
    except TypeError:
        # torch.Generator is a static type: Python does not assign to it, but finds methods in this dictionary.
        gc.get_referents(vars(owner))[0][name] = value
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(owner))
