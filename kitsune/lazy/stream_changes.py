"""On which stream what is pending was called. C++ changes streams past all doors: autograd runs each part of a backward on the
stream of its forward.

What C++ orders by events it records and waits for when the calls are made, some of which are still pending then. And autograd
tells the allocator which other streams use a gradient's memory, by a wrapper, which has none. So what comes behind such a change
waits for all.
"""

import contextlib
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

import torch

from kitsune.ir import Barrier, streams
from kitsune.lazy.early_reads import memory_changed

# A recorder's stream where no call has come yet, or its device has none.
NONE = -1
_HERE: Any = contextlib.nullcontext()


def taking(recorder: Any, lock: Any) -> Callable[[], Any]:
    """Takes a recorder's lock, and has what is pending run if it was called on another stream than what comes now."""
    recorder.stream = NONE
    if recorder.device.type != "cuda":
        return lock.acquire  # type: ignore[no-any-return]
    here = streams.handle_of(recorder.device)

    def acquire() -> None:
        lock.acquire()
        try:  # Of all that follows, since an interrupt may come between any two lines.
            if here() != recorder.stream:
                _changed(recorder)
        except BaseException:
            lock.release()
            raise

    return acquire


def _changed(recorder: Any) -> None:
    streams.use(torch.cuda.current_stream(recorder.device))
    if recorder.stream != NONE:
        region = recorder.region
        if region.node.depth and region.node is not region.cut:
            recorder.flush(Barrier.SYNCHRONIZE)
        streams.wait_for_all(recorder.device)
        memory_changed()
    recorder.stream = streams.current_handle(recorder.device)


def called_here(recorder: Any) -> None:
    """Nothing is pending, and what comes is called on what is the current stream now, as far as this thread is its own and is
    not running what was called: a capture has a stream of Kitsune's, to be left again past all doors."""
    own = recorder.running or recorder.lane is None or recorder.lane.thread != get_ident()
    if own or recorder.device.type != "cuda":
        return
    now = streams.current_handle(recorder.device)
    if now != recorder.stream:
        # It may have been made the current one before any door was there.
        streams.use(torch.cuda.current_stream(recorder.device))
        memory_changed()
        recorder.stream = now


def as_called(recorder: Any) -> Any:
    """Inside, the stream that the last call came on is the current one, for which what comes on this one waits then."""
    if recorder.stream in (NONE, streams.current_handle(recorder.device)):
        return _HERE
    return _there(recorder.device, recorder.stream)


@contextlib.contextmanager
def _there(device: torch.device, stream: int) -> Iterator[None]:
    try:
        with streams.on(device, stream):
            # A part may have been called here, behind what it has waited for.
            streams.wait_for_all(device)
            yield
    finally:
        streams.wait_for_all(device)
