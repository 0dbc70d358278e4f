"""Hearing of the calls that one thread makes: those of its own, in code that was told of."""

import importlib
import sys
import threading
import types
from pathlib import Path

import pytest

import kitsune
from kitsune import hearing

SOURCE = """
import contextlib, functools, json

def small(x):
    return x

def plain(x):
    return [small(k) for k in range(x)], (lambda y: y)

@functools.cache
def cached(x):
    def inside(): return x
    return inside()

@contextlib.contextmanager
def managed():
    yield

class Class:
    @property
    def shown(self): return 1
    @classmethod
    def made(cls): return cls()
    @staticmethod
    def static(): return 2
    def method(self): return 3

borrowed = json.dumps
"""


def module() -> types.ModuleType:
    made = types.ModuleType("kitsune_heard")
    made.__file__ = "heard.py"
    exec(compile(SOURCE, "heard.py", "exec"), vars(made))
    return made


def test_all_code_of_a_module_is_found_and_none_of_others() -> None:
    names = {code.co_name for code in hearing.codes_of(module())}
    wanted = {"small", "plain", "<lambda>", "cached", "inside", "managed", "shown", "made", "static", "method"}
    # A comprehension has code of its own until Python 3.11.
    assert wanted <= names <= {*wanted, "<listcomp>"}


@pytest.mark.parametrize("name", hearing.HEARD)
def test_what_is_heard_of_is_there_and_has_code(name: str) -> None:
    path = Path(kitsune.__file__).parent.joinpath(*name.split(".")[1:])
    files = [*path.parent.glob(f"{path.name}*.py"), *path.glob("*.py")]
    names = [".".join(file.relative_to(Path(kitsune.__file__).parent.parent).with_suffix("").parts) for file in files]
    assert any(list(hearing.codes_of(importlib.import_module(one))) for one in names if not one.endswith("__init__"))


def heard_in(run: types.FunctionType) -> int:
    made, heard = module(), []
    if (tool := hearing._tool()) is not None:
        hearing.tell_of(hearing.codes_of(made), tool)
    with hearing.hearing(lambda *_: heard.append(1)):
        run(made)
    n = len(heard)
    made.plain(100)
    assert len(heard) == n, "heard after the end"
    return n


def test_calls_of_this_thread_are_heard() -> None:
    assert heard_in(lambda made: made.plain(100)) > 100


def test_calls_of_another_thread_are_not() -> None:
    def elsewhere(made: types.ModuleType) -> None:
        thread = threading.Thread(target=made.plain, args=(1000,))
        thread.start()
        thread.join()

    # Those that start a thread and wait for it are its own.
    assert heard_in(elsewhere) < 1000


def test_who_hears_may_raise() -> None:
    def hear(*_: object) -> None:
        raise ZeroDivisionError

    made = module()
    if (tool := hearing._tool()) is not None:
        hearing.tell_of(hearing.codes_of(made), tool)
    with pytest.raises(ZeroDivisionError), hearing.hearing(hear):
        made.plain(1)
    assert made.plain(1)[0] == [0] and sys.getprofile() is None


def test_a_module_that_is_imported_later_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module()
    with hearing.hearing(lambda *_: None):
        pass
    monkeypatch.setattr(hearing, "HEARD", (made.__name__,))
    monkeypatch.setitem(sys.modules, made.__name__, made)
    heard: list[int] = []
    with hearing.hearing(lambda *_: heard.append(1)):
        made.plain(100)
    assert len(heard) > 100


def test_who_hears_may_rest_while_functions_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    n_told: list[int] = []
    monkeypatch.setattr(hearing, "_looked_at", set())
    monkeypatch.setattr(hearing, "tell_of", lambda codes, tool: told.extend(codes))
    for _ in range(2):
        hearing._tell_of_new(0, lambda: n_told.append(len(told)))
    # Before each of them, and none a second time.
    assert n_told == list(range(len(told))) and len(set(map(id, told))) == len(told) > 500


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python has nothing else than a profiler's hook before 3.12")
def test_code_that_was_not_told_of_is_as_fast_as_before() -> None:
    heard: list[int] = []
    with hearing.hearing(lambda *_: heard.append(1)):
        module().plain(100)
        assert sys.getprofile() is None
    assert not heard
