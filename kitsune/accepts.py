"""What an option takes: the check of a value, the words for an error, the reading of a text; and the nearest known name."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Accepts:
    """What a knob takes: the words for an error, the check of a Python value, the reading of an environment text."""

    words: str
    check: Callable[[object], Any]
    read: Callable[[str], object] = str


BOOL_WORDS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}
# Powers of two with either spelling, as the memory reports of torch count.
BYTE_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
BYTE_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE)


def _check_bool(value: object) -> bool:
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise ValueError


def _read_bool(text: str) -> bool:
    if text.lower() in BOOL_WORDS:
        return BOOL_WORDS[text.lower()]
    raise ValueError


def _check_int(low: int, high: int | None, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise ValueError
    return int(value)


def _check_bytes(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        found = BYTE_TEXT.fullmatch(value.strip())
        if found is None:
            raise ValueError
        value = int(float(found[1]) * BYTE_UNITS[(found[2] or "").lower()])
    return _check_int(1, None, value)


def _check_device(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | torch.device):
        raise ValueError
    try:
        return str(torch.device(value))  # parses the name; it does not ask whether the device is there
    except RuntimeError:
        raise ValueError from None


def _check_folder(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ValueError
    return os.path.abspath(os.path.expanduser(os.fspath(value)))


def _read_optional(text: str) -> str | None:
    return None if text.lower() == "none" else text


def whole(low: int, high: int | None = None) -> Accepts:
    words = f"of {low} or more" if high is None else f"from {low} to {high}"
    return Accepts(f"a whole number {words}", functools.partial(_check_int, low, high), int)


flag = Accepts("True or False (in the environment 0/1, true/false, on/off or yes/no)", _check_bool, _read_bool)
device_name = Accepts("the name of a torch device such as 'cpu' or 'cuda:0', or None", _check_device, _read_optional)
n_bytes = Accepts("a number of bytes, a text such as '512MB' or '2GB', or None", _check_bytes, _read_optional)
folder = Accepts("the path of a folder, or None", _check_folder, _read_optional)


def _check_number(above: float, below: float, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not above < value < below:
        raise ValueError
    return float(value)


def number(above: float, below: float = float("inf")) -> Accepts:
    """A finite number between two bounds, which are not accepted themselves."""
    words = f"above {above:g}" if below == float("inf") else f"above {above:g} and below {below:g}"
    return Accepts(f"a number {words}", functools.partial(_check_number, above, below), float)


def one_of(*words: str) -> Accepts:
    """One of a few words."""

    def check(value: object) -> str:
        if value not in words:
            raise ValueError
        return str(value)

    return Accepts(" or ".join(map(repr, words)), check, str.lower)


def optional(accepts: Accepts) -> Accepts:
    """The same, or None."""

    def read(text: str) -> object:
        return None if text.lower() == "none" else accepts.read(text)

    return Accepts(f"{accepts.words}, or None", lambda value: None if value is None else accepts.check(value), read)


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the known name nearest to this one, or an empty text."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def accepted(name: str, value: object, accepts: Accepts, known: Iterable[str] = ()) -> Any:
    """`value` as it is stored, or a ValueError that names it, what is accepted and the nearest of the `known` names."""
    try:
        return accepts.check(value)
    except ValueError:
        hint = nearest(value, known) if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r} is not possible: {name} accepts {accepts.words}.{hint}") from None
