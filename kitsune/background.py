"""Work that can wait, made by a thread that the program hardly notices: planning, and loading what was compiled."""

import atexit
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from kitsune.ir import quiet
from kitsune.paced_thread import PacedThread

R = TypeVar("R")

thread = PacedThread()
atexit.register(thread.close)
_changed = threading.Condition()
# Calls of `later` that have not ended: what they make is being made, or what they wait for.
_open: set[Future[Any]] = set()
# What the open ones wait for.
_awaited: list[list[Future[Any]]] = []


def later(make: Callable[[], tuple[R, Iterable["Future[Any]"]]], in_idle_moments: bool = False) -> "Future[R]":
    """What `make()` returns, once all futures beside it are done as well; how these end is not looked at. Until it is begun it
    can be cancelled. See `PacedThread.submit`."""
    result: Future[R] = Future()
    result.add_done_callback(_close)

    def work() -> None:
        if not result.set_running_or_notify_cancel():
            return
        try:
            made, futures = make()
        except BaseException as error:
            return result.set_exception(error)
        awaited = list(futures)
        _awaited.append(awaited)

        def finish() -> None:
            _awaited.remove(awaited)
            result.set_result(made)

        when_done(awaited, finish)

    try:
        _open.add(result)
        # After the loading of what others wait for.
        thread.submit(work, 1, in_idle_moments)
    except BaseException:
        # An interrupt. Nobody knows of it, and whoever waits for all would wait for ever.
        result.cancel()
        raise
    return result


def soon(call: Callable[[], None], in_idle_moments: bool = False) -> None:
    """Call it in the background. See `PacedThread.submit`."""

    def make() -> tuple[None, list[Future[Any]]]:
        call()
        return None, []

    later(make, in_idle_moments)


def n_awaited() -> int:
    """Futures that somebody waits for in `later`."""
    return len({id(future) for futures in list(_awaited) for future in futures if not future.done()})


def when_done(futures: list["Future[Any]"], call: Callable[[], None]) -> None:
    """Call it when all are done, on the thread that ends the last one."""
    # A future keeps its callbacks when they have been called, and those of kernels stay: what is called must not stay with them.
    lock, left, calls = threading.Lock(), [len(futures) + 1], [call]

    def one(_: Any) -> None:
        with lock:
            left[0] -= 1
            last = not left[0]
        if last:
            calls.pop()()

    for future in futures:
        future.add_done_callback(one)
    one(None)


def wait(timeout: float | None = None) -> bool:
    """Wait until nothing is open; False if that takes longer than `timeout` seconds, or the thread is paused."""
    with _changed:
        if thread.pauses:
            return not _open
        thread.n_waiting += 1
        quiet.end()
        try:
            return _changed.wait_for(lambda: not _open, timeout)
        finally:
            thread.n_waiting -= 1


def _close(result: "Future[Any]") -> None:
    with _changed:
        _open.discard(result)
        _changed.notify_all()
