"""Where a step is over that no optimizer ends: the program has written its parameters, or calls a model again without gradients.

Without an end there a loop that reads its loss before the backward, or reads nothing, would be one region that never comes back:
each of its operators is new, and a step of an MLP took 14 to 43 times as long as eager's (CPU host).
"""

from typing import Any

import torch
from torch.nn import Parameter

from kitsune.ir import Barrier
from kitsune.lazy.cell import serial_of
from kitsune.lazy.tensor import LazyTensor

# Calls of a model without gradients: behind what has a graph, where a step of a training may have a few, of its teacher; and of
# what may be a part of a model that is a loop itself, for no new batch has come.
FEW, MANY = 4, 16


class Step:
    """What tells of a region that a step is over. `after_backward` is how many values there were when gradients were made last;
    `first` are the function that was first given a parameter without gradients, and that; `n_again` is how often that came again
    with no gradients in between."""

    __slots__ = ("after_backward", "first", "n_again", "n_graded")

    def __init__(self) -> None:
        self.after_backward: int | None = None
        self.first: tuple[Any, Parameter] | None = None
        self.n_again = self.n_graded = 0


def is_over(recorder: Any, region: Any, func: Any, args: Any) -> bool:
    """A call comes that is not known here. Does it begin another step? Then the region has ended, the next time as soon as a call
    that is followed leads here: not in the middle of one, where autograd may hold a lock."""
    cause = _cause(region, func, args)
    if cause is None or not region.node.depth:
        return False
    if not region.past or cause is Barrier.UPDATE:
        region.node.full = cause
    recorder.flush(cause)
    return recorder.region is not region


def _cause(region: Any, func: Any, args: Any) -> Barrier | None:
    step = region.step
    if torch.is_grad_enabled():
        return Barrier.UPDATE if step.after_backward is not None and _is_updated(region) else None
    given = next((a for a in args if type(a) is Parameter), None)
    # What is owed a graph would have to be made again for it.
    return Barrier.AGAIN if given is not None and _comes_again(region, func, given, args) and not region.calls else None


def _comes_again(region: Any, func: Any, given: Parameter, args: Any) -> bool:
    step, n_graded = region.step, -1 if region.past is None else len(region.past)
    if step.first is None or step.n_graded != n_graded:
        step.first, step.n_graded, step.n_again = (func, given), n_graded, 0
        return False
    first, parameter = step.first
    # A weight may have another use as well: an embedding's, that of the last layer.
    if given is not parameter or func is not first:
        return False
    step.n_again += 1
    return step.n_again >= (MANY if not any(_is_new(region, a) for a in args) else FEW if n_graded else 1)


def _is_new(region: Any, argument: Any) -> bool:
    """Is it a tensor that has come from outside just now?"""
    real = argument.cell.real if type(argument) is LazyTensor else argument if type(argument) is torch.Tensor else None
    try:
        return real is not None and serial_of(real) not in region.storages
    except (RuntimeError, NotImplementedError):  # a sparse one has no storage, and one that is mapped shows none
        return False


def _is_updated(region: Any) -> bool:
    """Were parameters written since the backward that came last?"""
    first = region.step.after_backward
    written = (cell for cell in region.plain.values() if cell.ref.id >= first and cell.ref.id != cell.came.id)
    return any(cell.real.requires_grad for cell in written)


def note_gradients(func: Any, region: Any) -> None:
    """Does a call ask for gradients, as a backward does?"""
    if func is torch.autograd.grad:
        region.step.after_backward = region.node.n_values
