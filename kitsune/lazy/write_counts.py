"""Counts of writes while calls are owed: a backward compares that of a tensor with what it was when the call was made."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from kitsune.ir import count_writes_to
from kitsune.lazy.cell import living
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.twins import Twin

_wants_gradients = torch._C.TensorBase.requires_grad_


def count_writes(region: Any, tensors: list[Any], edge: Any) -> None:
    """A call that was followed writes these tensors."""
    counted = count_writes_to(tensors)
    if region.calls:
        # A call that is owed itself counts its writes to what other calls owe when it is made again.
        mine = [t for t in counted if not is_owed(t)] if edge.graded else list(counted)
        region.counted.append((len(region.calls), mine))


def is_owed(tensor: Any) -> bool:
    """Is this what a call has made that is to be made again?"""
    return type(tensor) is LazyTensor and tensor.cell.owed is not None and not tensor.cell.spent


class Recount:
    """Takes back what was counted, and counts it again as the calls are made again: each finds the counts of its time."""

    def __init__(self, region: Any, made: list[Any], twins: list[Twin]) -> None:
        self._left, region.counted = region.counted, []
        self.twins = twins
        # The memory of what no call has made that is made again: there may be something detached in it.
        mine = {id(t.cell) for t in made}
        self._shared = {cell.storage for cell in (*living(region.produced), *region.computed()) if id(cell) not in mine}
        for _, tensors in self._left:
            _move(tensors, -1)
        for twin in twins:
            twin.follow()

    def replaced(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """(now, before) of views that somebody holds, which share the count of their base from here on."""
        for now, before in pairs:
            if now.cell.storage in self._shared:
                self.twins.append(Twin(now, before))
                # Views of it that were taken without gradients are still views of what it was; of one that wants gradients,
                # autograd refuses to have them written.
                _wants_gradients(before)

    def before_call(self, n: int) -> None:
        """Count what was written before call number `n`."""
        while self._left and self._left[0][0] <= n:
            self._again(self._left.pop(0)[1])

    def rest(self) -> None:
        """Count what was written after the last call."""
        for _, tensors in self._left:
            self._again(tensors)

    def _again(self, tensors: list[Any]) -> None:
        _move(tensors, 1)
        for twin in self.twins:
            twin.follow()


def _move(tensors: list[Any], by: int) -> None:
    for tensor in tensors:
        torch._C._autograd._unsafe_set_version_counter((tensor,), (tensor._version + by,))


def counted_before(call: Any, owed: set[int]) -> list[Any]:
    """Those of a call's tensors whose writes were counted when it was followed. What was detached of one that is owed shares its
    count, which is made again."""
    known, new = ([t for t in call.flat if (id(t) in owed) is it_is] for it_is in (False, True))
    if not (known and new and call.edge.bumps) or any(t.is_inference() for t in known):
        return known
    before, counts = [t._version for t in known], tuple(t._version for t in new)
    increment_version(new)
    known = [t for t, n in zip(known, before, strict=True) if t._version == n]
    torch._C._autograd._unsafe_set_version_counter(tuple(new), counts)
    return known
