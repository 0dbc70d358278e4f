"""Casts of weights that outlive a write: in the same block, eager goes on with those that it made before.

A call that is followed leaves none with autocast. So before a weight gets other numbers, those that it would have left are made,
and before the next call that may cast is made for real, they are put where autocast looks for them.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from kitsune.lazy.cell import Cell
from kitsune.lazy.tensor import wrap

# Not the names in torch, which are watched.
_set_enabled, _set_kept = torch.set_autocast_enabled, torch.set_autocast_cache_enabled
_version, _address = torch._C.TensorBase._version.__get__, torch._C.TensorBase.data_ptr  # type: ignore[attr-defined]
CAST = torch.ops.aten._to_copy.default


class Outlived:
    """The casts that eager would have in the block that is open, and autocast has not."""

    def __init__(self) -> None:
        # The operators by which calls cast weights that were followed in this region.
        self.nodes: list[Any] = []
        # Weights that calls have cast which were followed in regions that have ended: each with the type of its cast, by id.
        self.before: dict[int, tuple[Any, torch.dtype]] = {}
        # (weight, its cast) of those that autocast is to get; None as long as no weight has been written.
        self.casts: list[tuple[Any, Cell]] | None = None
        # What was seen when nobody was to see calls for a while; and have weights been written then?
        self._seen: list[tuple[Any, list[int]]] = []
        self.outside = False

    def look(self, recorder: Any) -> None:
        """Nobody sees calls from here on: note how often the weights have been written."""
        self._seen = [(weakref.ref(leaf), _memory_of(leaf)) for leaf in recorder.leaves.living()]
        self.casts = None
        self.nodes.clear()
        self.before.clear()

    def look_again(self) -> tuple[bool, bool]:
        """Were there weights, in a block; and has one of them been written since?"""
        seen, self._seen = self._seen, []
        leaves = [(leaf(), memory) for leaf, memory in seen]
        return bool(seen), any(leaf is not None and _memory_of(leaf) != memory for leaf, memory in leaves)

    def forget(self) -> None:
        """The block has been left."""
        self.casts, self.outside = None, False
        self.nodes.clear()
        self.before.clear()

    def region_ends(self, region: Any) -> None:
        """A region ends; nothing of it is known but in a block that is still open."""
        if self.nodes:
            for weight, node in _first_casts(self.nodes, region):
                self.before.setdefault(id(weight), (weight, node.results[0][1].dtype))
            self.nodes.clear()

    def before_run(self, recorder: Any) -> None:
        """What is pending is about to run."""
        if recorder.writes_in_block:
            self.make(recorder)

    def make(self, recorder: Any) -> None:
        """Weights are about to be written, or what writes them is about to run: make the casts of before that."""
        region = recorder.region
        if self.casts is not None:
            return
        self.casts = [(weight, _cast(recorder, weight, dtype)) for weight, dtype in self.before.values()]
        if self.nodes:
            done = _n_done(region)
            for weight, node in _first_casts(self.nodes, region):
                if id(weight) not in self.before:
                    made = _result(region, node) if node.depth > done else _cast(recorder, weight, node.results[0][1].dtype)
                    self.casts.append((weight, made))

    def hand_over(self, recorder: Any) -> None:
        """A call comes that may cast, behind a write: autocast is to have what it has in eager."""
        self.make(recorder)
        casts, self.casts = self.casts, []
        _hand(recorder, casts or [])

    def share(self, recorder: Any) -> None:
        """One comes where none was written, beside calls that were followed: of what is still to be made, it has their casts, so
        that gradients meet there."""
        region = recorder.region
        pending = [node for node in self.nodes if node.depth > _n_done(region)]
        self.nodes = [node for node in self.nodes if node.depth <= _n_done(region)]
        _hand(recorder, [(weight, _result(region, node)) for weight, node in _first_casts(pending, region)])


def _n_done(region: Any) -> int:
    """How many operators of a region have been run."""
    depth: int = region.observed_from if region.observed_from is not None else getattr(region.cut, "depth", 0)
    return depth


def _hand(recorder: Any, casts: list[tuple[Any, Cell]]) -> None:
    """Put casts where autocast looks for them."""
    if casts:
        walk = _Cast({id(weight): cell for weight, cell in casts})
        before = recorder.hook, recorder.rows, recorder.paused
        try:
            recorder.hook, recorder.rows, recorder.paused, recorder.walk = None, {}, 0, walk
            with torch._C.DisableTorchFunction(), recorder.above_autograd(), _keeping(recorder.device.type), torch.no_grad():
                for weight, _ in casts:
                    # Autocast casts for it, with a graph in any case; and nothing is saved for a backward.
                    torch.mm(weight, weight)
        finally:
            recorder.walk = None
            recorder.hook, recorder.rows, recorder.paused = before


class _Cast:
    """Takes the operators of a call that is made for its casts."""

    def __init__(self, casts: dict[int, Cell]) -> None:
        self._casts, self._last = casts, next(iter(casts.values()))

    def take(self, row: Any, tensors: list[Any]) -> Any:
        """The cast of a weight; of the rest, which nobody uses, anything."""
        if row.target is CAST:
            self._last = self._casts[id(tensors[0])]
        return wrap(self._last)


@contextlib.contextmanager
def _keeping(device: str) -> Iterator[None]:
    """Autocast is on, and keeps its casts."""
    enabled, are_kept = torch.is_autocast_enabled(device), torch.is_autocast_cache_enabled()
    _set_enabled(device, True)
    _set_kept(True)
    try:
        yield
    finally:
        _set_enabled(device, enabled)
        _set_kept(are_kept)


def _memory_of(weight: Any) -> list[int]:
    with torch._C.DisableTorchFunction():
        return [_version(weight), _address(weight)]


def numbers_of_plain(region: Any) -> dict[int, Any]:
    """What has come in, by all the numbers that it has had."""
    found = {cell.came.id: cell.real for cell in region.plain.values()}
    if region.dirty:
        for node in region.node.path():
            found |= {after.id: found[old] for _, old, after, _ in node.written if old in found}
    return found


def _first_casts(nodes: list[Any], region: Any) -> Iterator[tuple[Any, Any]]:
    """(weight, operator) of the first cast of each weight."""
    weights, seen = numbers_of_plain(region), set()
    for node in nodes:
        weight = weights[node.op.inputs[0].id]
        if id(weight) not in seen:
            seen.add(id(weight))
            yield weight, node


def _result(region: Any, node: Any) -> Cell:
    """What an operator that is pending makes."""
    cell = Cell(region, *node.results[0])
    region.produced.append(cell)
    return cell


def _cast(recorder: Any, weight: Any, dtype: torch.dtype) -> Cell:
    """The cast of what a weight is in its memory now."""
    with recorder.below_autograd(), torch._C.DisableTorchFunction():
        return recorder.settled(CAST(weight.detach(), dtype=dtype)).cell  # type: ignore[no-any-return]
