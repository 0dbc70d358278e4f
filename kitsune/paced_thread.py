"""A thread that computes for a moment and rests for longer, so that the program hardly notices."""

import heapq
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from kitsune.hearing import hearing
from kitsune.ir import is_own, quiet

# Python runs one thread at a time. An operator of the program lets go of Python's lock and waits up to 5 ms to have it back
# from a thread that computes: a step of 1,000 would take seconds. So this thread computes for a moment and then looks who else
# wants to: it rests three times as long if the program does, which then runs at three quarters of its speed in the worst case,
# and goes on at once while the program waits for its device.
WORK_S = 0.0005
REST = 3
# While a step is recorded or run it rests until that is over, ten times as long if need be: a step of ResNet-50 has 9 ms of
# Python and then 27 ms of waiting for the device, and with rests of three times it had 17 ms of Python (H200, unfused).
REST_IN_STEP = 10
LOOK_S = 0.001
# An operator that has taken so long takes longer: it waits for the device, or has torch load a library, and needs no lock. Much
# of a first step is of that kind.
LONG_S = 0.001
# What is for such moments waits so long for them, and so long it is waited for: a first step takes 0.4 to 2 s (BERT, H200), and
# others may wait behind it.
PATIENCE_S = 2.0
# Another thread needs some 50 us to wake up and take the lock. Who gets the lock back much later than that was not alone.
YIELD_S = 0.0001
ALONE_S = 0.0004
# Functions between two looks at the clock, which cost as much as a call: 0.1 to 0.3 ms of work.
EVENTS = 64


class _Closing(BaseException):
    """The process ends."""


class PacedThread:
    """Calls what it is given, in order, with rests. The thread is started with the first call and ends with the process."""

    def __init__(self) -> None:
        # A heap: in the order of their ranks, those of one rank in the order in which they came. And a token for each.
        self._calls: list[tuple[int, int, bool, Callable[[], None]]] = []
        self._numbers = itertools.count()
        # Of C, not a PriorityQueue: when the thread is closed, its hook raises inside of what is written in Python.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = False
        # How many wait for it and have nothing else to do: it does not rest meanwhile.
        self.n_waiting = 0
        # Those who have asked it to `pause`, and whether it makes a call.
        self.pauses, self._in_call = set[object](), False
        os.register_at_fork(after_in_child=self._alone_in_child)
        # Is the program in the middle of a step, which this thread makes slower?
        self.in_a_step: Callable[[], bool] = lambda: False
        # Where it is in it, and since when this was seen; None where nobody can tell.
        self.where: Callable[[], Any] = lambda: None
        self._seen: tuple[Any, float] = (None, 0.0)
        # Until when does what it does now wait for idle moments?
        self._patient_until = 0.0
        self._look: Callable[[], None] = lambda: None
        self._is_unbroken = False

    def submit(self, call: Callable[[], None], rank: int = 0, in_idle_moments: bool = False) -> None:
        """Call it soon, before what has a higher rank. It must not raise. `in_idle_moments`: during a step only while an operator
        of the program takes long; it says itself where it may rest, by `breathe`."""
        heapq.heappush(self._calls, (rank, next(self._numbers), in_idle_moments, call))
        self._tokens.put(None)
        self.start()

    def start(self) -> None:
        """To be called between regions before anything is submitted in the middle of one: a thread that starts ends one."""
        with self._lock:
            # A forked child has none of its parent's threads.
            if not self._closing and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._serve, name="kitsune-background", daemon=True)
                self._thread.start()

    def pause(self, who: object) -> None:
        """Wait for the end of the call that is being made, and have no other made until `go_on` is called with the same object,
        in any thread; also after an interrupt in the middle of this."""
        self.pauses.add(who)
        # Not for ever: it may wait for a lock which the calling thread holds. By no lock, which an interrupt could leave held.
        until = time.monotonic() + PATIENCE_S
        while self._in_call and time.monotonic() < until:
            time.sleep(LOOK_S)

    def go_on(self, who: object) -> None:
        """The opposite of `pause`; may be called again."""
        self.pauses.discard(who)
        self._tokens.put(None)

    def _alone_in_child(self) -> None:
        self.pauses, self._in_call = set(), False

    def close(self) -> None:
        """End the thread, also in the middle of a call: one that is stopped inside of C++ code by the interpreter's own end
        would end the process with a crash."""
        with self._lock:
            self._closing = True
        self._tokens.put(None)
        if self._thread is not None:
            self._thread.join(5)

    def _serve(self) -> None:
        is_own()
        pace = self._pace()
        with suppress(_Closing):
            while not self._closing:
                self._tokens.get()
                self._keep_quiet()
                while self._calls and self._call_next(pace):
                    self._keep_quiet()

    def _call_next(self, pace: Callable[..., None]) -> bool:
        """Make the next call, if nobody has this thread paused."""
        entry = heapq.heappop(self._calls)
        *_, in_idle_moments, call = entry
        self._patient_until = time.perf_counter() + PATIENCE_S if in_idle_moments else 0.0
        if in_idle_moments:
            self._rest(0.0)
        # Before it looks: who pauses it looks at this afterwards.
        self._in_call = True
        try:
            if self.pauses:
                heapq.heappush(self._calls, entry)
                return False
            # It hears of every function that this thread begins, so that no stage has to offer places to rest. To be told of
            # them takes 4 ms (CPU host) the first time: too long for a first step.
            with nullcontext() if in_idle_moments else hearing(pace):
                call()
        finally:
            self._in_call = False
        return not self._closing

    def _is_awaited(self) -> bool:
        return self.n_waiting > 0 or bool(self.pauses)

    def _pace(self) -> Callable[..., None]:
        """Rests whenever this thread has computed for WORK_S; waiting does not count."""
        start, n = time.thread_time(), 0

        def hook(*_: Any) -> None:
            nonlocal n
            n += 1
            if n >= EVENTS:
                n = 0
                look()

        def look() -> None:
            nonlocal start
            worked = time.thread_time() - start
            if self._closing:
                raise _Closing
            if self._is_unbroken:
                start = time.thread_time()
            elif worked >= WORK_S:
                if not self._is_awaited():
                    self._rest(worked)
                    self._keep_quiet()
                start = time.thread_time()

        self._look = look
        return hook

    def breathe(self) -> None:
        """For a call of which nothing is heard to call now and then: rest if it is time for that."""
        self._look()

    @contextmanager
    def at_a_stretch(self) -> Iterator[None]:
        """It does not rest inside of this, which keeps the program from its device as long as it lasts."""
        self._is_unbroken = True
        try:
            yield
        finally:
            self._is_unbroken = False

    def _keep_quiet(self) -> None:
        """Begin or go on with nothing while steps are timed. Who needs a lock that this thread has waits as long, at the most."""
        quiet.wait(lambda: self._closing or self._is_awaited())

    def _rest(self, worked: float) -> None:
        """Rest after so many seconds of work, if the program has something to do."""
        if not self.in_a_step():
            if not _alone():
                time.sleep(worked * REST)
            return
        until = max(self._patient_until, time.perf_counter() + worked * REST_IN_STEP)
        while self.in_a_step() and not (self._closing or self._is_awaited()) and (left := until - time.perf_counter()) > 0:
            if self._is_in_a_long_operator() and _alone():
                return
            time.sleep(min(LOOK_S, left))

    def _is_in_a_long_operator(self) -> bool:
        where, now = self.where(), time.perf_counter()
        if where is None or where != self._seen[0]:
            self._seen = where, now
        return where is not None and now - self._seen[1] >= LONG_S


def _alone() -> bool:
    """Lets another thread have Python's lock; True if none wanted it for long."""
    start = time.perf_counter()
    time.sleep(YIELD_S)
    return time.perf_counter() - start < ALONE_S
