"""Streams that C++ makes the current ones, past all doors: autograd runs each part of a backward on the stream of its forward."""

from collections.abc import Callable
from typing import Any

import torch

from kitsune.ir import Barrier, streams


def taking(recorder: Any, lock: Any) -> Callable[[], Any]:
    """Takes a recorder's lock, and has what is pending run if it was called on another stream than what comes now."""
    if recorder.device.type != "cuda":
        return lock.acquire  # type: ignore[no-any-return]
    here, last = streams.handle_of(recorder.device), -1

    def acquire() -> None:
        nonlocal last
        lock.acquire()
        try:  # Of all that follows, since an interrupt may come between any two lines.
            if (now := here()) != last:
                before, last = last, now
                _changed(recorder, before)
        except BaseException:
            lock.release()
            raise

    return acquire


def _changed(recorder: Any, before: int) -> None:
    streams.use(torch.cuda.current_stream(recorder.device))
    region = recorder.region
    if before >= 0 and region.node.depth and region.node is not region.cut:
        with streams.on(recorder.device, before):
            recorder.flush(Barrier.SYNCHRONIZE)
