"""The casts of weights that autocast keeps until its outermost block is left: by whom they are made, and who gets them later.

A call that is followed leaves none with autocast. As long as no weight is written that makes no difference: whoever comes next
has another made of the same numbers. Behind an update eager goes on with those of before.
"""

import threading
from typing import Any, NamedTuple

import torch

from kitsune.lazy.cell import is_leaf, serial_of
from kitsune.lazy.edges import path_between
from kitsune.lazy.region import is_strided
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import Node

# Not the names in torch, which are watched.
clear_casts, set_enabled, set_dtype = torch.clear_autocast_cache, torch.set_autocast_enabled, torch.set_autocast_dtype
set_kept = torch.set_autocast_cache_enabled
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
CAST = torch.ops.aten._to_copy.default
_here = threading.local()


class Casts(NamedTuple):
    """What a call's key has to say of them: the operator behind which autocast has forgotten all of this region, whether it keeps
    any, and whether calls that need one are to be made for real, so that it has those that eager has."""

    since: Node | None
    are_kept: bool
    are_real: bool


def read_modes(lane: Any) -> Any:
    """By grad mode: (grad mode, dtype that autocast casts to, Casts where a block is open). One object for each: matchers compare
    by identity."""
    device = lane.recorder.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    is_open = autocast is not None or _n_blocks() > 0
    return _modes_of(lane, autocast, torch.is_autocast_cache_enabled() if is_open else None)


def _modes_of(lane: Any, autocast: Any, are_kept: bool | None) -> Any:
    recorder = lane.recorder
    table, key = lane.known_modes, None
    if are_kept is not None:
        since, are_real = recorder.cleared, recorder.writes_in_block or lane.outlive_writes
        if since is not None:
            table = since.modes = since.modes or {}
        key = autocast, Casts(since, are_kept, are_real), Casts(since, are_kept, are_real or recorder.graphs_in_block)
    known = table.get(key)
    if known is None:
        by_mode = (None, None) if key is None else key[1:]
        known = table[key] = {graded: (graded, autocast, by_mode[graded]) for graded in (False, True)}
    return known


def _n_blocks() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def forgotten(lane: Any) -> None:
    """Autocast has forgotten all its casts."""
    recorder = lane.recorder
    node = recorder.region.node
    recorder.epoch += 1
    recorder.writes_in_block = recorder.graphs_in_block = False
    recorder.cleared = node if node.depth else None
    lane.read_modes()


def opens(lane: Any) -> None:
    """A lane of this thread opens: what of the casts has been forgotten since it was closed?"""
    recorder = lane.recorder
    if (recorder.writes_in_block or recorder.graphs_in_block) and lane.n_forgotten != n_forgotten():
        forgotten(lane)
    else:
        lane.read_modes()


def n_forgotten() -> int:
    """How often autocast has forgotten its casts in this thread, as far as the doors were there to see."""
    return getattr(_here, "n_forgotten", 0)


def note_forgotten() -> None:
    """Autocast has forgotten its casts in this thread."""
    _here.n_forgotten = n_forgotten() + 1


def begin_anew(recorder: Any, ended: Any) -> None:
    """A region begins, in which autocast has forgotten nothing. Where the one that has `ended` has left graphs in a block that is
    still open, what comes next joins them at the casts, which belong to both."""
    lane = recorder.lane
    graphs = recorder.graphs_in_block or (lane is not None and lane.modes[True][2] is not None and ended.real)
    if recorder.cleared is None and graphs == recorder.graphs_in_block:
        return
    recorder.cleared, recorder.graphs_in_block = None, graphs
    if lane.thread == threading.get_ident():
        lane.read_modes()
    else:  # Another thread that ends a region has an autocast of its own.
        _, autocast, casts = lane.modes[False]
        lane.modes = _modes_of(lane, autocast, None if casts is None else casts.are_kept)


def written(lane: Any, are_weights: bool = True) -> None:
    """Weights have been written: behind that, in the same block, casts of before are used."""
    casts = lane.modes[False][2] if are_weights else None
    if casts is not None and not casts.are_real and lane.thread == threading.get_ident():
        lane.recorder.writes_in_block = True
        lane.read_modes()


def may_cast(modes: Any, flat: list[Any]) -> bool:
    """May autocast cast a weight for this call? It holds a lock meanwhile, so that calls which are owed cannot be made then."""
    return modes[1] is not None and any(map(_is_weight, flat))


def need_casts(lane: Any, modes: Any, flat: list[Any], start: Node) -> bool:
    """Is a call that was made to be made for real, each time, since autocast's own casts matter? Once one was seen behind an
    update, so are those before it: the next time, its casts must be there. `start` is where it began."""
    if modes[2] is None or not modes[2].are_real or not may_cast(modes, flat):
        return False
    region = lane.recorder.region
    path = path_between(start, region.node) or []
    taken = {value.id for node in path if node.op is not None and node.op.target is not CAST for value in node.op.inputs}
    cells = [region.plain.get(id(t)) for t in filter(_is_weight, flat)]
    if all(cell is not None and not taken.isdisjoint((cell.came.id, cell.ref.id)) for cell in cells):
        # As they are.
        return False
    lane.outlive_writes = lane.outlive_writes or lane.recorder.writes_in_block
    return True


def are_kept_casts(tensors: list[tuple[Any, Any]], path: list[Node], start: Node, casts: Casts | None) -> bool:
    """Has autocast handed the ops of `path`, in place of each of these (tensor, value), the cast that it had kept of it?"""
    if not tensors or casts is None:
        return not tensors
    made = {node.op.inputs[0].id: node.results[0][0].id for node in start.path() if is_cast(node) and node.op is not None}
    taken = {value.id for node in path if node.op is not None for value in node.op.inputs}
    return all(value is not None and made.get(value.id) in taken for _, value in tensors)


def is_cast(node: Node | None) -> bool:
    """Is this an operator of those by which autocast casts?"""
    return node is not None and node.row is not None and node.row.target is CAST and node.op is not None


def write_weights(recorder: Any, modes: Any, tensors: list[Any]) -> bool:
    """Does a call that writes these, where a block is open, write weights?"""
    if modes[2] is None:
        return False
    reals: list[Any] = [real for t in tensors if _has_memory(real := t.cell.real if type(t) is LazyTensor else t)]
    # By their memory: it may be through an alias.
    weights = {serial_of(leaf) for leaf in recorder.leaves.living() if _has_memory(leaf)} if reals else ()
    return any(serial_of(real) in weights for real in reals)


def _has_memory(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not _is_transformed(tensor) and is_strided(tensor)


def _is_weight(tensor: Any) -> bool:
    return type(tensor) is not LazyTensor and tensor.requires_grad and is_leaf(tensor)


class Weights:
    """Which weights of a region its operators cast."""

    def __init__(self, region: Any) -> None:
        came = {cell.came.id: cell.real for cell in region.plain.values()}
        self._by_number = {number: real for number, real in came.items() if _is_weight(real)}
        self._ids = set(map(id, self._by_number.values()))

    def cast_by(self, node: Node | None) -> Any:
        """The weight that an operator casts, if that is what it does. Not of one that the region has written: casts that autocast
        has kept from before are not used then, or the call is made for real."""
        return self._by_number.get(node.op.inputs[0].id) if is_cast(node) else None  # type: ignore[union-attr]

    def made_before(self, weight: Any, path: list[Node], start: Node) -> Node | None:
        """Where the region has cast a weight, before a call that begins at `start` and does not cast it on its own `path`."""
        if id(weight) not in self._ids or any(self.cast_by(node) is weight for node in path):
            return None
        return next((node for node in reversed(start.path()) if self.cast_by(node) is weight), None)
