"""The program's own CUDA graphs, and its own pools of memory.

What is called while it captures has to be started then, in memory of the graph's, so that nothing is recorded meanwhile. What
the graph refers to has to stay where it is. And a replay reads and writes memory past the dispatcher.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

from kitsune.ir import Barrier, plain_times, workspaces
from kitsune.lazy.casts import will_write, written
from kitsune.lazy.early_reads import memory_changed
from kitsune.lazy.paused import Paused
from kitsune.lazy.recorders import EVERY, is_of_this_thread, listening, of_this_thread


class Aside:
    """Kitsune out of the way of one capture, or of one use of a pool: `key` tells which. After an interrupt at any line, `end`
    may be called again; and once it has ended, too."""

    def __init__(self, key: Any) -> None:
        self.key, self.thread = key, threading.get_ident()
        self._paused = Paused(of_this_thread(), Barrier.CAPTURE)
        # Each is there before what it undoes is done, and may be called again.
        self._ends: list[Callable[[], None]] = []

    def of_capture(self) -> None:
        """To be called before one."""
        self._paused.begin()
        # Results of contexts that are closed may still be held, too; and Kitsune's threads ask the device for things whoever
        # captures.
        for recorder in list(EVERY):
            if recorder.stand_aside is not None:
                recorder.stand_aside(self._ends, is_of_this_thread(recorder))
        self._ends.append(workspaces.let_go)
        workspaces.let_go()

    def of_pool(self) -> None:
        """To be called before its use."""
        self._ends.append(functools.partial(plain_times.end, self))
        plain_times.begin(self)
        self._paused.begin()

    def end(self) -> None:
        """It is over: record again."""
        # The last one first, and each whatever becomes of those before it.
        with contextlib.ExitStack() as stack:
            stack.callback(self._paused.end)
            for end in self._ends:
                stack.callback(end)
        self._ends = []


# A pool may be used inside of its own use, and in several threads.
_under_way: list[Aside] = []


def capture_begin_door(original: Any) -> Any:
    """A method of a graph, which captures from then on."""

    @functools.wraps(original)
    def door(graph: Any, *args: Any, **kwargs: Any) -> Any:
        aside = Aside(id(graph))
        try:
            aside.of_capture()
            returned = original(graph, *args, **kwargs)
            # One that was begun and never ended, of a graph that is gone, may have had the same number.
            for other in [other for other in _under_way if other.key == aside.key]:
                _end(other)
            _under_way.append(aside)
            return returned
        except BaseException:
            _end(aside)
            raise

    return door


def _end_door(key_of: Callable[..., Any]) -> Callable[[Any], Any]:
    """A door behind which what the arguments name is over, also if it fails."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def door(*args: Any, **kwargs: Any) -> Any:
            aside = _latest(key_of(*args))
            try:
                try:
                    return original(*args, **kwargs)
                finally:
                    _end(aside)
            finally:
                # An interrupt may have come at any line of it.
                _end(aside)

        return door

    return make


# Of a graph's method, after which it captures no more; and of the use of a pool on a device.
capture_end_door = _end_door(lambda graph, *_: id(graph))
pool_end_door = _end_door(lambda device, pool, *_: pool)


def replay_door(original: Any) -> Any:
    """Reads and writes memory that nobody names."""

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        lanes = [recorder.lane for recorder in listening() if recorder.lane is not None]
        for recorder in listening():
            recorder.flush(Barrier.CAPTURE)
            recorder.known.forget()
        for lane in lanes:
            will_write(lane)
        try:
            return original(*args, **kwargs)
        finally:
            memory_changed()
            for lane in lanes:
                written(lane)

    return door


def pool_begin_door(original: Any) -> Any:
    """From then on this thread's memory is taken from a pool of the program's."""

    @functools.wraps(original)
    def door(device: Any, pool: Any, *args: Any) -> Any:
        aside = Aside(pool)
        try:
            aside.of_pool()
            original(device, pool, *args)
            _under_way.append(aside)
        except BaseException:
            _end(aside)
            raise

    return door


def _latest(key: Any) -> Aside | None:
    """What was done for the capture or the use that this thread has begun last; by another one, if it has not begun any."""
    found = [aside for aside in list(_under_way) if aside.key == key]
    own = [aside for aside in found if aside.thread == threading.get_ident()]
    return (own or found or [None])[-1]  # type: ignore[list-item]


def _end(aside: Aside | None) -> None:
    if aside is not None:
        try:
            aside.end()
        finally:
            if aside in _under_way:
                _under_way.remove(aside)
