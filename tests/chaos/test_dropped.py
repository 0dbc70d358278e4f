"""A context that was not left and that nobody holds any more is ended, in its own thread: nothing is left of an interrupt at the
first instruction of its `__exit__`."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

import pytest
import torch

import kitsune
from kitsune.session import Accelerate, _thread as here
from tests.chaos.counting import lazily
from tests.chaos.test_interrupts import leaves_nothing, traced

DROPPED = "was not left was dropped"


def interrupts_leaving(frame: FrameType, event: str, told: Any) -> None:
    if frame.f_code is Accelerate.__exit__.__code__:
        sys.settrace(None)
        raise KeyboardInterrupt


def interrupted() -> torch.Tensor:
    """Something pending in a context whose `__exit__` has not begun."""
    try:
        with traced(interrupts_leaving), lazily():
            pending = torch.ones(3) * 2 + 1
    except KeyboardInterrupt:
        assert here.depth
        return pending
    raise AssertionError("nothing was interrupted")


def test_an_interrupt_before_leaving_leaves_nothing() -> None:
    with pytest.warns(ResourceWarning, match=DROPPED):
        pending = interrupted()
    assert leaves_nothing() is None
    assert pending.tolist() == [3.0] * 3
    assert DROPPED in str(kitsune.explain())


def test_a_decorated_function_leaves_nothing() -> None:
    @lazily()
    def step() -> None:
        made.append(torch.ones(3) * 2 + 1)

    made: list[torch.Tensor] = []
    with pytest.raises(KeyboardInterrupt), traced(interrupts_leaving):
        step()
    assert leaves_nothing() is None
    step()
    assert [t.tolist() for t in made] == [[3.0] * 3] * 2


def test_contexts_around_it_stay_open() -> None:
    with lazily():
        with pytest.warns(ResourceWarning, match=DROPPED):
            interrupted()
        assert list(here.depth.values()) == [1]
        (pipeline,) = here.depth
        assert pipeline.on
        before = pipeline.recorder.region.node.depth
        pending = torch.ones(3) * 2
        assert pipeline.recorder.region.node.depth > before
    assert pending.tolist() == [2.0] * 3
    assert leaves_nothing() is None


def test_contexts_that_were_opened_in_it_stay_open() -> None:
    outer = lazily()
    outer.__enter__()
    inner = kitsune.accelerate(device="cpu", warmup=1)
    with inner:
        pending = torch.ones(3) * 2
        with pytest.warns(ResourceWarning, match=DROPPED):
            del outer
        assert list(here.depth.values()) == [1]
        assert (pending + 1).tolist() == [3.0] * 3
    assert leaves_nothing() is None


def test_one_that_was_entered_twice_is_ended() -> None:
    context = lazily()
    context.__enter__()
    context.__enter__()
    with pytest.warns(ResourceWarning, match=DROPPED):
        del context
    assert leaves_nothing() is None


def test_one_that_is_held_or_was_left_is_not_touched() -> None:
    context = lazily()
    context.__enter__()
    gc.collect()
    assert here.depth
    context.__exit__(None, None, None)
    del context
    gc.collect()
    assert leaves_nothing() is None


def test_another_thread_does_not_end_it() -> None:
    held = [lazily()]
    pipeline = held[0].pipeline()
    held[0].__enter__()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    # It is this thread's, which leaves it open as it always did.
    assert list(here.depth) == [pipeline]
    again = lazily()
    again._stack().append(kitsune.contexts.Entry(pipeline))
    again.__exit__(None, None, None)
    assert leaves_nothing() is None


def test_pythons_end_ends_none() -> None:
    program = (
        "import kitsune, torch; c = kitsune.accelerate(device='cpu'); c.__enter__(); x = torch.ones(3) + 1; print(x.tolist())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[2.0, 2.0, 2.0]"
    assert "Exception ignored" not in done.stderr and DROPPED not in done.stderr
