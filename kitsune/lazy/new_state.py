"""What an optimizer makes in its first step and finds in all later ones: averages of zeros, counts of steps.

It is made at once and comes into the region as it will in the steps to come, so that they have the region of the first one. As
operators of the region it would make the second step another region: observed from the update on, its graph made and prepared in
the middle of the step, and the third step's again. On an H200 BERT's second step took 71 ms for that, and its fourth one 34.
"""

from collections.abc import Callable
from typing import Any

import torch

from kitsune.ir import Barrier, OpRow
from kitsune.lazy.rebuild import tensors_in
from kitsune.lazy.recording import PLAIN


def collect(recorder: Any, collected: Callable[[], Any], only_makes: bool = False) -> Any:
    """Have an optimizer collect what it updates; returns what `collected` does. `only_makes`: it writes to none of the tensors
    that were there before."""
    if recorder.paused or recorder.collecting:
        return collected()
    if only_makes and recorder.region.observed_from is not None and recorder.is_on_top():
        # Nothing is pending, and nothing of it would be learned.
        recorder.n_unrecorded += 1
        try:  # Within, since an interrupt may come between any two lines.
            recorder.leave()
            return collected()
        finally:
            recorder.enter()
    rows, recorder.rows, recorder.collecting = recorder.rows, {}, True
    try:
        return collected()
    finally:
        recorder.collecting = False
        # While it is paused the rows say so.
        recorder.rows = {} if recorder.paused else rows


def make_state(recorder: Any, row: OpRow, args: Any, kwargs: Any) -> Any:
    """Take an op of an optimizer that collects: at once, where it has nothing to do with what is pending."""
    tensors = tensors_in((args, kwargs))
    apart = not (row.writes or row.random or row.barrier) and all(type(t) in PLAIN for t in tensors)
    # In a region that is observed nothing is pending.
    lazy = recorder.region.observed_from is None
    if not apart or (lazy and any(recorder.is_pending(t) for t in tensors)):
        return _as_anywhere(recorder, row, args, kwargs)
    # Who follows a call in which this happened would leave it out.
    recorder.n_unrecorded += 1
    recorder.tally.passed_through[(Barrier.NEW_STATE, str(row.target))] += 1
    # Nothing is learned of a step that is observed.
    if recorder.watcher is not None and lazy:
        recorder.watcher.passed(row, args, kwargs, Barrier.NEW_STATE)
    with recorder.below_autograd(), torch._C.DisableTorchFunction():
        return row.target(*args, **kwargs)


def _as_anywhere(recorder: Any, row: OpRow, args: Any, kwargs: Any) -> Any:
    rows, recorder.rows, recorder.collecting = recorder.rows, {}, False
    try:
        return recorder.record(row.target, (), args, kwargs)
    finally:
        recorder.rows, recorder.collecting = rows, True
