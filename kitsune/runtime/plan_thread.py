"""A thread for operators that make plans for the thread they run in, which a program's own thread would have to wait for.

Autograd has a thread for each device, and cuDNN's execution plans stay where they were made. Whoever runs a backward's operators
elsewhere makes them once more, 53 to 76 ms for attention and 3 for each shape of a convolution (H200), at the end of a first step
that has no room for it. This thread makes them while autograd is still busy with that step, and has the operators run here from
then on: in the second step, which runs them one by one, and in the captures. Of a program that it has met before, it also makes
those that the plan with kernels will need (`ThreadPlans.foresee`).
"""

import atexit
import gc
import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from kitsune.ir import WITH_PLANS, Op, Value, is_own, streams

# A plan for attention takes 76 ms.
PATIENCE_S = 2.0


class _Request:
    """A call to be made. Who `claims` it first makes it, or sees to it that nobody does; it is `done` when that lock is free."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.claims, self.done = threading.Lock(), threading.Lock()
        self.done.acquire()
        self._result: Any = None
        self._error: BaseException | None = None

    def serve(self) -> None:
        """Make the call, unless nobody wants it any more."""
        if self.claims.acquire(blocking=False):
            try:
                self._result = self._call()
            except BaseException as error:
                self._error = error
            self.done.release()

    def result(self) -> Any:
        """What the call has returned. Raises what it has raised."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                # It refers to this frame.
                self._error = None
        return self._result


class PlanThread:
    """Runs calls for others, one after the other, once it was started. It ends with the process."""

    def __init__(self) -> None:
        # Operators whose plans it has, or is about to have before anything else is asked of it; see `key_of`.
        self.known: set[Any] = set()
        # Of C: nothing of it is written in Python, where an interrupt might come.
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        # What is made while nothing is asked for.
        self._spare: deque[tuple[Any, _Request]] = deque()
        self._thread: threading.Thread | None = None
        self._ident = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """To be called between regions: a thread that starts ends one."""
        with self._lock:
            if not self._is_alive():
                self._thread = threading.Thread(target=self._serve, name="kitsune-plans", daemon=True)
                self._thread.start()

    def learn(self, op: Op, run_once: Callable[[], None], is_spare: bool = False) -> None:
        """Have the plan of an operator made, which `run_once` does. Nobody waits for it; all else comes before a spare one."""
        if not self._is_alive():
            return
        key = key_of(op)
        self.known.add(key)

        def make() -> None:
            try:
                run_once()
            except BaseException:
                # Also for want of memory. Whoever needs it has to make it.
                self.known.discard(key)

        if is_spare:
            self._spare.append((key, _Request(make)))
        # This one wakes it.
        self._requests.put(_Request(_nothing if is_spare else make))

    def spare_nothing(self) -> None:
        """Spare ones that were not begun are not made."""
        while self._spare:
            with suppress(IndexError):  # the thread has just taken the last one
                key, _ = self._spare.popleft()
                self.known.discard(key)

    def knows(self, op: Op) -> bool:
        """Is an operator to be run here?"""
        # Asked of each operator that no kernel is written for.
        return op.target._opname in WITH_PLANS and self.has(key_of(op))

    def has(self, key: Any) -> bool:
        """Are operators with this key to be run here?"""
        return self._is_alive() and threading.get_ident() != self._ident and key in self.known

    def call(self, target: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> Any:
        """Call `target` here, with the settings of the calling thread, which waits. Returns and raises what it does."""
        there = _Settings(device)

        def call() -> Any:
            with there:
                return target(*args, **kwargs)

        request, collects = _Request(call), gc.isenabled()
        # A finalizer that the collector ran on the other thread might wait for a lock which this one holds.
        gc.disable()
        try:
            self._requests.put(request)
            request.done.acquire()
        except BaseException:
            # An interrupt. What is computed is no longer wanted, but what it computes with has to stay until then.
            if not request.claims.acquire(blocking=False):
                request.done.acquire()
            raise
        finally:
            if collects:
                gc.enable()
        return request.result()

    def settle(self) -> None:
        """Wait until all that was asked of it so far is over; not for ever, since it might wait for a lock of who asks."""
        if self._is_alive():
            self.spare_nothing()
            request = _Request(_nothing)
            self._requests.put(request)
            request.done.acquire(timeout=PATIENCE_S)

    def close(self) -> None:
        """End the thread, which must not be inside of C++ code when the interpreter ends."""
        if self._thread is not None and self._is_alive():
            self._requests.put(None)
            self._thread.join(5)

    def _is_alive(self) -> bool:
        # A forked child has none of its parent's threads.
        return self._thread is not None and self._thread.is_alive()

    def _serve(self) -> None:
        is_own()
        self._ident = threading.get_ident()
        while (request := self._next()) is not None:
            request.serve()
            del request

    def _next(self) -> _Request | None:
        while self._spare and self._requests.empty():
            with suppress(IndexError):  # they were dropped
                return self._spare.popleft()[1]
        return self._requests.get()


class _Settings:
    """What torch keeps for each thread, of the one that has made this; in effect inside of `with`."""

    def __init__(self, device: torch.device) -> None:
        self._graded = torch.is_grad_enabled()
        self._keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        self._stream = self._before = streams.current(device.index or 0) if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self._stream is not None:
            self._before = streams.current(self._stream[1])
            streams.enter(self._stream)
        torch._C._set_grad_enabled(self._graded)
        self._guard = torch._C._ForceDispatchKeyGuard(*self._keys)
        self._guard.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._guard.__exit__(*raised)
        # Of a capture: what is tried out later is no part of one.
        if self._before is not None:
            streams.enter(self._before)


def _nothing() -> None:
    pass


def key_of(op: Op) -> Any:
    """Operators with the same key have the same plan."""
    return op.target, tuple(a.type.at_start() if type(a) is Value else a for a in op.args), op.kwargs


# Of the process, as a device's thread of autograd's is.
plan_thread = PlanThread()
atexit.register(plan_thread.close)
