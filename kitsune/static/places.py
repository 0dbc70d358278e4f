"""Where a function finds what it works on: paths from the function through its variables to modules, optimizers and tensors.

A path is followed again before each call that is skipped, so that `model = other_model` is noticed.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

# Objects that a search looks at: the one that is wanted is near as a rule, and a program has millions.
MOST = 20_000
# So many are looked at in any case, for the variables of the function and of those that it calls.
LEAST = 200
LONGEST = 2_000
# Steps from a root within which a simple value is one of the function's variables, and what a list has at most if its items are:
# to look at one takes 0.3 us of each call.
NEAR, FEW = 6, 8
_SIMPLE = (bool, int, float, str, type(None))
_MISSING = object()
# What following a path raises where there is nothing any more.
_ASTRAY = (AttributeError, KeyError, IndexError, TypeError, ValueError)

# A step is what it does with the object before it, and what it needs for that.
Step = tuple[Callable[[Any, Any], Any], Any]
Path = tuple[Step, ...]


def _cell(function: Any, index: int) -> Any:
    return function.__closure__[index].cell_contents


def _global(function: Any, name: str) -> Any:
    return function.__globals__[name]


def _attribute(thing: Any, name: str) -> Any:
    return getattr(thing, name)


def _entry(thing: Any, name: str) -> Any:
    return vars(thing)[name]


def _item(thing: Any, key: Any) -> Any:
    return thing[key]


def follow(path: Path, root: Any) -> Any:
    """What is at the end of a path now."""
    try:
        for step, key in path:
            root = step(root, key)
    except _ASTRAY:
        return _MISSING
    return root


# How each step is written in Python.
_WRITTEN: dict[Any, str] = {
    _cell: "{0}.__closure__[{1!r}].cell_contents",
    _global: "{0}.__globals__[{1!r}]",
    _attribute: "{0}.{1}",
    _entry: "{0}.__dict__[{1!r}]",
    _item: "{0}[{1!r}]",
}


def all_there(
    places: Sequence[tuple[int, Path, Callable[[], Any]]], tensors: Sequence[tuple[int, Path, Any]], real_of: Callable[[Any], Any]
) -> Callable[[Sequence[Any]], bool]:
    """Tells, of the roots, whether each path leads to what it led to: to what a reference names, or to a tensor's memory.

    It is one expression, compiled once: to follow a path step by step takes three times as long.
    """
    checks = [f"{_written(root, path)} is references[{k}]() is not None" for k, (root, path, _) in enumerate(places)]
    checks += [f"real_of({_written(root, path)}) is tensors[{k}]" for k, (root, path, _) in enumerate(tensors)]
    known = {"references": [to for *_, to in places], "tensors": [tensor for *_, tensor in tensors], "real_of": real_of}
    check: Callable[[Sequence[Any]], bool] = eval(f"lambda roots: {' and '.join(checks) or True}", known)

    def are_there(roots: Sequence[Any]) -> bool:
        try:
            return check(roots)
        except _ASTRAY:
            return False

    return are_there


def _written(root: int, path: Path) -> str:
    found = f"roots[{root}]"
    for step, key in path:
        found = _WRITTEN[step].format(found, key)
    return found


def _name_of(path: Path) -> Any:
    """The last name on a path; of what is in a list, that of the list. A variable of a function around has a number."""
    return next((key for step, key in reversed(path) if step is not _item or type(key) is str), None)


class Search:
    """Looks for things from a few roots on, nearest first."""

    def __init__(self, roots: list[Any], wanted: Callable[[Any], bool]) -> None:
        # (number of the root, path, thing)
        self.found: list[tuple[int, Path, Any]] = []
        # Simple values in the variables of functions near the roots; and in objects, dictionaries and short lists there, if a
        # function has the name in its text.
        self.variables: list[tuple[int, Path, Any]] = []
        self._names: set[str] = set()
        self._parts: list[tuple[int, Path, Any]] = []
        self._waiting: deque[tuple[int, Path, Any]] = deque((k, (), root) for k, root in enumerate(roots))
        self._seen = set(map(id, roots))
        self._wanted = wanted

    def run(self, enough: int) -> "Search":
        """Search until so many were found, or all that is near has been looked at."""
        n_looked = 0
        while self._waiting and n_looked < MOST and (n_looked < LEAST or len(self.found) < enough):
            n_looked += 1
            k, path, thing = self._waiting.popleft()
            if self._wanted(thing):
                self.found.append((k, path, thing))
            if not isinstance(thing, (torch.Tensor, type)) and not _is_ours(thing):
                self._look_into(k, path, thing)
        # Last of all: a function may be found behind what it reads.
        self.variables += [part for part in self._parts if type(name := _name_of(part[1])) is int or name in self._names]
        return self

    def _look_into(self, k: int, path: Path, thing: Any) -> None:
        for step, child in self._children(thing):
            if type(child) in _SIMPLE:
                if len(path) < NEAR and not (isinstance(thing, (list, tuple)) and len(thing) > FEW):
                    (self.variables if step[0] in (_cell, _global) else self._parts).append((k, (*path, step), child))
            elif id(child) not in self._seen:
                self._seen.add(id(child))
                self._waiting.append((k, (*path, step), child))

    def _children(self, thing: Any) -> Iterator[tuple[Step, Any]]:
        if isinstance(thing, FunctionType):
            yield from self._of_function(thing)
        elif isinstance(thing, MethodType):
            yield (_attribute, "__self__"), thing.__self__
            yield (_attribute, "__func__"), thing.__func__
        elif isinstance(thing, partial):
            yield from (((_attribute, name), getattr(thing, name)) for name in ("func", "args", "keywords"))
        elif isinstance(thing, ModuleType):
            if not thing.__name__.startswith(("torch", "kitsune.")):
                yield from (((_entry, name), child) for name, child in vars(thing).items() if name in self._names)
        elif isinstance(thing, dict):
            if len(thing) <= LONGEST:
                yield from (((_item, key), child) for key, child in list(thing.items()) if type(key) in (str, int))
        elif isinstance(thing, (list, tuple)):
            if len(thing) <= LONGEST:
                yield from (((_item, i), child) for i, child in enumerate(thing))
        else:
            yield from _of_object(thing)

    def _of_function(self, function: FunctionType) -> Iterator[tuple[Step, Any]]:
        if function.__module__ is not None and function.__module__.startswith(("torch.", "kitsune.")):
            return
        for i, cell in enumerate(function.__closure__ or ()):
            try:
                yield (_cell, i), cell.cell_contents
            except ValueError:
                continue  # a variable that has no value yet
        names = set(_names_in(function.__code__))
        self._names |= names
        for name in names:
            if name in function.__globals__:
                yield (_global, name), function.__globals__[name]
        yield (_attribute, "__defaults__"), function.__defaults__
        yield (_attribute, "__kwdefaults__"), function.__kwdefaults__
        if hasattr(function, "__wrapped__"):
            yield (_attribute, "__wrapped__"), function.__wrapped__


def _is_ours(thing: Any) -> bool:
    """What Kitsune knows of a program is no place where the program finds anything; only its optimizer wraps another one."""
    module: Any = type(thing).__module__
    return isinstance(module, str) and module.startswith("kitsune.") and module != "kitsune.optimizer"


def _of_object(thing: Any) -> Iterator[tuple[Step, Any]]:
    for name, child in list(getattr(thing, "__dict__", {}).items()):
        yield (_entry, name), child
    for cls in type(thing).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(thing, name):
                yield (_attribute, name), getattr(thing, name)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
        elif isinstance(constant, str):  # a key of a dictionary
            yield constant
