"""Hears of the functions that one thread begins in Python, while others go on as fast as before."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any

# Making plans, reading them and writing the texts of kernels: what a program's own threads hardly ever run.
HEARD = (
    "kitsune.codegen",
    "kitsune.dataflow",
    "kitsune.fusion",
    "kitsune.ir.edges",
    "kitsune.ir.graph",
    "kitsune.ir.plan",
    "kitsune.ir.serial",
    "kitsune.memory",
    "kitsune.plan_files",
    "kitsune.planning",
    "kitsune.scheduler",
)
# The others are for debuggers, coverage, profilers and Python's own optimizer.
FREE_IDS = (3, 4)

# Who hears, by thread; and the modules that have been looked at, to have the functions of those in HEARD told of.
_hearing: dict[int, Callable[..., None]] = {}
_looked_at: set[str] = set()


def hearing(hear: Callable[..., None]) -> AbstractContextManager[None]:
    """Inside of `with`, `hear` is called whenever this thread begins a function, and may raise.

    From Python 3.12 on that is only said of the functions of the modules HEARD. A profiler's hook hears of all calls, but there
    it makes Python slower in all threads: to half its speed and less where it calls much (3.12 and 3.13; nothing of it in 3.11).
    """
    tool = _tool()
    return _profiled(hear) if tool is None else _monitored(hear, tool)


@contextmanager
def _profiled(hear: Callable[..., None]) -> Iterator[None]:
    sys.setprofile(hear)
    try:
        yield
    finally:
        sys.setprofile(None)


@contextmanager
def _monitored(hear: Callable[..., None], tool: int) -> Iterator[None]:
    _tell_of_new(tool, hear)
    _hearing[threading.get_ident()] = hear
    try:
        yield
    finally:
        del _hearing[threading.get_ident()]


def _tell_of_new(tool: int, hear: Callable[..., None]) -> None:
    """Have the functions told of that were imported since the last time. It is heard of each that is found: to find the 1,546 of
    the first time takes 4 ms (CPU host), in which a program's step would wait for Python's lock."""
    for name in sys.modules.keys() - _looked_at:
        module = sys.modules.get(name)
        if name.startswith(HEARD) and module is not None:
            for code in codes_of(module):
                hear()
                tell_of((code,), tool)
        _looked_at.add(name)


def _called(_code: CodeType, _offset: int) -> None:
    hear = _hearing.get(threading.get_ident())
    if hear is not None:
        hear()


_tools: list[int] = []


def _tool() -> int | None:
    """Kitsune's number as a tool that monitors; None where there is no such thing, or no number left."""
    if sys.version_info < (3, 12):
        return None
    if not _tools:
        free = [number for number in FREE_IDS if sys.monitoring.get_tool(number) is None]
        if not free:
            return None
        sys.monitoring.use_tool_id(free[0], "kitsune")
        # Where functions begin. Told of each call that they make, too, of len() and append(), they took 2.5 times as long as
        # untold (3.12); beginnings are 2 us apart while a plan is made, and 4 ms at the most, which is rare.
        sys.monitoring.register_callback(free[0], sys.monitoring.events.PY_START, _called)
        _tools.append(free[0])
    return _tools[0]


def tell_of(codes: Iterable[CodeType], tool: int) -> None:
    """Have it told when this code begins."""
    if sys.version_info >= (3, 12):
        for code in codes:
            sys.monitoring.set_local_events(tool, code, sys.monitoring.events.PY_START)


def codes_of(module: ModuleType) -> Iterator[CodeType]:
    """The code of all functions and methods that a module's file defines, and of those inside of them."""
    waiting: list[Any] = [held for held in vars(module).values() if getattr(held, "__module__", None) == module.__name__]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, CodeType):
            # A decorator's wrapper has the code of its decorator, which others have, too.
            if one.co_filename == module.__file__:
                yield one
                waiting += one.co_consts
        elif isinstance(one, FunctionType):
            waiting.append(one.__code__)
        elif isinstance(one, type):
            waiting += vars(one).values()
        elif isinstance(one, property):
            waiting += [one.fget, one.fset]
        # Behind a cache, a context manager's decorator, a method of the class.
        waiting += [under for name in ("__wrapped__", "__func__") if (under := getattr(one, name, None)) is not None]
