"""A matcher of a backward: one loss, gradients of leaves that have none yet. It looks at all that `take_backward` looks at, but
at all leaves in a few steps, and at no key: of the 109 us that a backward of 6 gradients took, 60 were for that.
"""

import weakref
from bisect import bisect_left
from itertools import chain, compress, repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from kitsune.lazy.cell import Cell, is_leaf, left_in
from kitsune.lazy.cuts import Absent
from kitsune.lazy.edges import Edge, Incoming, Made
from kitsune.lazy.matcher_steps import MISS
from kitsune.lazy.realize import FLAT, MADE
from kitsune.lazy.replaced import is_untouched
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.used_again import give_back

_real, _came = attrgetter("real"), attrgetter("came")
_base: Any = torch._C.TensorBase
_requires_grad, _is_leaf, _grad = _base.requires_grad.__get__, _base.is_leaf.__get__, _base.grad.__get__
_storage_offset = _base.storage_offset
_hooks, _later_hooks = _base._backward_hooks.__get__, _base._post_accumulate_grad_hooks.__get__
_is_anomaly_on = torch.is_anomaly_enabled
_distributed = torch.distributed.is_initialized if torch.distributed.is_available() else lambda: False


class BackwardMatcher:
    """Takes the backwards that lead along an edge. It is made where one is about to be followed, with these leaves."""

    def __init__(self, lane: Any, edge: Edge, call: Incoming, leaves: dict[int, Any]) -> None:
        region = lane.recorder.region
        self._edge, self._modes, self._past = edge, lane.modes[False], list(region.past)
        self._loss = call.flat[0].cell.ref
        cells = list(region.plain.values())
        reals = list(map(_real, cells))
        self._cames = list(map(_came, cells))
        self._graded = list(map(_requires_grad, reals))
        # What needs no gradient is a leaf.
        self._are_leaves = list(map(is_leaf, compress(reals, self._graded)))
        self._leaves = [k for k, cell in enumerate(cells) if cell.came.id in leaves]
        # Of each gradient: the place of its leaf, and what it is.
        places = {cells[k].came.id: k for k in self._leaves}
        self._grads = [(places[number], made) for number, made in edge.grads]
        numbers = {cell.came.id: k for k, cell in enumerate(cells)}
        self._begins = [(numbers[number], begin) for number, begin in edge.begins]
        # The leaves whose nodes were found to have no hooks, and how many handles of hooks there had been by then.
        self._without: tuple[list[int], int] = [], -1

    @staticmethod
    def suits(edge: Edge, call: Incoming, losses: list[Any], gradients: list[Any], leaves: dict[int, Any]) -> bool:
        """Is this backward so simple?"""
        simple = len(losses) == len(call.flat) == 1 and not gradients and all(leaf.grad is None for leaf in leaves.values())
        return simple and type(losses[0]) is LazyTensor and not (edge.arrivals or edge.derived or edge.rewrites or edge.bumps)

    def __call__(self, lane: Any, region: Any, node: Any, args: Any, kwargs: Any) -> Any:
        """Follow the call of `Tensor.backward`, or return MISS with nothing changed."""
        recorder, edge = lane.recorder, self._edge
        if region.slow or region.real or lane.inside or lane.modes[False] is not self._modes or region.past != self._past:
            return MISS
        if not is_untouched(torch.autograd.backward):
            return MISS
        if len(args) != 1 or (kwargs and not all(option is None or option is False for option in kwargs.values())):
            return MISS
        loss = args[0]
        if type(loss) is not LazyTensor or loss.cell.region is not region or loss.cell.ref is not self._loss:
            return MISS
        if loss.cell.owed is None or region.observed_from is not None or not edge.spent or _is_anomaly_on() or _distributed():
            return MISS
        # From the look at the region to the step along it: another thread may end the region.
        with torch._C.DisableTorchFunction(), recorder.lock:
            if recorder.region is not region or region.node is not node or region.real:
                return MISS
            found = self._leaves_in(lane, region)
            numbers = None if found is None else edge.sources.numbers(region.scalars)
            if found is None or numbers is None:
                return MISS
            # Before anything else: who makes objects may have others finalized, and their finalizers may end the region.
            wrappers = [made.spare.pop() if made.spare else _new(made) for _, made in self._grads]
            if recorder.region is not region or region.node is not node:
                return MISS
            region.scalars.extend(numbers)
            region.node = edge.node
            append = region.produced.append
            for wrapper, (place, _) in zip(wrappers, self._grads, strict=True):
                cell = wrapper.cell
                cell.region = region
                append(cell)
                found[place].grad = wrapper
            region.past.append(edge)
            spend(recorder, region, edge.spent, [found[place] for place, _ in self._grads])
            recorder.tally.backwards += 1
            recorder.after_follow()
        return None

    def _leaves_in(self, lane: Any, region: Any) -> list[Any] | None:
        """The plain tensors of the region, if the same as then collect gradients, and nothing of Python's is at them."""
        cells = list(region.plain.values())
        if list(map(_came, cells)) != self._cames:
            return None
        reals = list(map(_real, cells))
        try:
            if list(map(_requires_grad, reals)) != self._graded:
                return None
            if list(map(_is_leaf, compress(reals, self._graded))) != self._are_leaves:
                return None
        except RuntimeError:
            # Of some views autograd refuses to tell.
            return None
        if any(_storage_offset(reals[k]) != begin for k, begin in self._begins):
            return None
        leaves = [reals[k] for k in self._leaves]
        if any(map(_hooks, leaves)) or any(map(_later_hooks, leaves)):
            return None
        if not all(map(is_, map(_grad, leaves), repeat(None))):
            return None
        ids = list(map(id, leaves))
        if self._without != (ids, RemovableHandle.next_id):
            if lane.hooked(leaves):
                return None
            self._without = ids, RemovableHandle.next_id
        # Whoever is to get a gradient must be known to the recorder, as it is since it came in.
        return reals if lane.recorder.leaves.keys() >= set(ids) else None


def _new(made: Made) -> Any:
    wrapper = made.make()
    wrapper.cell = cell = Cell(None, made.ref, made.type, made.storage)
    cell.home = made
    return wrapper


def spend(recorder: Any, region: Any, spent: frozenset[int], leaves: list[Any]) -> None:
    """The graph of these calls, which leads to these leaves, is used up; what the program still holds of them is remembered."""
    calls, gone = region.calls, []
    made = [*chain.from_iterable([calls[k][MADE] for k in spent])]
    wrappers = [t for t in made if type(t) is LazyTensor]
    for token in [t for t in made if type(t) is Absent]:
        token.spent = leaves
    made.clear()
    region.calls = [call for k, call in enumerate(calls) if k not in spent]
    if region.cut is not None:
        # It has time until the next graph was started: since the cut the device has nothing to do. Calls that are still owed have
        # to find of what they were given that its graph is used up.
        given = {id(t) for call in region.calls for t in call[FLAT]}
        are_unused = [is_left and id(t) not in given for t, is_left in zip(wrappers, left_in(region, wrappers), strict=True)]
        recorder.lane.unused.add([*compress(wrappers, are_unused)])
        wrappers = [t for t, is_unused in zip(wrappers, are_unused, strict=True) if not is_unused]
    left = [k for k in range(len(calls)) if k not in spent]
    region.counted = [(bisect_left(left, n), tensors) for n, tensors in region.counted] if left else []
    del calls
    for tensor in (wrappers := give_back(wrappers)):
        tensor.cell.home = None
        if tensor.cell.owed is not None:
            tensor.cell.spent = leaves
            gone.append(weakref.ref(tensor))
    tensor = None
    del wrappers
    recorder.lane.spent = [reference for reference in (*recorder.lane.spent, *gone) if reference() is not None]
