"""The program's own CUDA graphs, and its own pools of memory.

What is called while it captures has to be started then, in memory of the graph's, so that nothing is recorded meanwhile. What
the graph refers to has to stay where it is. And a replay reads and writes memory past the dispatcher.
"""

import functools
from collections.abc import Callable
from typing import Any

from kitsune.ir import Barrier, workspaces
from kitsune.lazy.casts import will_write, written
from kitsune.lazy.early_reads import memory_changed
from kitsune.lazy.recorders import EVERY, is_of_this_thread, listening, of_this_thread

Ends = list[Callable[[], None]]
# What is to be done when a capture, or the use of a pool, ends: by the graph or the pool's number. A pool may be used inside of
# its own use.
_ends: dict[Any, list[Ends]] = {}


def capture_begin_door(original: Any) -> Any:
    """A method of a graph, which captures from then on."""

    @functools.wraps(original)
    def door(graph: Any, *args: Any, **kwargs: Any) -> Any:
        ends: Ends = []
        # One that was begun and never ended, of a graph that is gone, may have had the same number.
        _end(id(graph))
        try:
            _pass_all(ends)
            # Results of contexts that are closed may still be held, too.
            ends.extend(recorder.stand_aside() for recorder in list(EVERY) if is_of_this_thread(recorder))
            ends.append(workspaces.let_go)
            workspaces.let_go()
            _ends[id(graph)] = [ends]
            return original(graph, *args, **kwargs)
        except BaseException:
            _ends.pop(id(graph), None)
            _call(ends)
            raise

    return door


def capture_end_door(original: Any) -> Any:
    """A method of a graph after which it captures no more, also if it fails."""

    @functools.wraps(original)
    def door(graph: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(graph, *args, **kwargs)
        finally:
            _end(id(graph))

    return door


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
        ends: Ends = []
        try:
            _pass_all(ends)
            original(device, pool, *args)
            _ends.setdefault(pool, []).append(ends)
        except BaseException:
            _call(ends)
            raise

    return door


def pool_end_door(original: Any) -> Any:
    @functools.wraps(original)
    def door(device: Any, pool: Any, *args: Any) -> Any:
        try:
            return original(device, pool, *args)
        finally:
            _end(pool)

    return door


def _pass_all(ends: Ends) -> None:
    """This thread's recorders run what is pending, and let all pass until `ends` are called."""
    for recorder in of_this_thread():
        recorder.flush(Barrier.CAPTURE)
        recorder.pause()
        ends.append(recorder.resume)


def _end(key: Any) -> None:
    if begun := _ends.get(key):
        _call(begun[-1])
        begun.pop()
    if not begun:
        _ends.pop(key, None)


def _call(ends: Ends) -> None:
    while ends:
        ends.pop()()
