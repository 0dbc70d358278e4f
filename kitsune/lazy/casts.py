"""The casts of weights that autocast keeps until its outermost block is left: by whom they are made, and who gets them later.

A call that is followed leaves none with autocast. As long as no weight is written that makes no difference: whoever comes next
has another made of the same numbers. Behind an update eager goes on with those of before.
"""

import threading
from typing import Any, NamedTuple

import torch

from kitsune.ir import Graph
from kitsune.lazy.cell import is_leaf, serial_of
from kitsune.lazy.edges import path_between
from kitsune.lazy.hands_off import may_write
from kitsune.lazy.outlived import numbers_of_plain
from kitsune.lazy.rebuild import tensors_in
from kitsune.lazy.region import is_strided
from kitsune.lazy.replaced import DOORS
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import Node

# Not the names in torch, which are watched.
clear_casts, set_enabled, set_dtype = torch.clear_autocast_cache, torch.set_autocast_enabled, torch.set_autocast_dtype
set_kept = torch.set_autocast_cache_enabled
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
HALVES = torch.bfloat16, torch.float16
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


def _renew_modes(lane: Any) -> None:
    """Something else is known of casts. Of autocast itself nothing has changed, and it is not to be asked: who ends a region may
    be another thread, with an autocast of its own, or an operator that is being handled, for which torch has it switched off."""
    _, autocast, casts = lane.modes[False]
    lane.modes = _modes_of(lane, autocast, None if casts is None else casts.are_kept)


def _n_blocks() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def outlive_calls() -> bool:
    """Is a block open in which casts are kept?"""
    return _n_blocks() > 0 and torch.is_autocast_cache_enabled()


def casts_down(graph: Graph) -> bool:
    """Does a region cast what comes in to fewer bits?"""
    return any(op.target is CAST and op.inputs[0] in graph.inputs and op.results[0].type.dtype in HALVES for op in graph.ops)


def forgotten(lane: Any) -> None:
    """Autocast has forgotten all its casts."""
    recorder = lane.recorder
    node = recorder.region.node
    recorder.epoch += 1
    recorder.writes_in_block = recorder.graphs_in_block = False
    recorder.outlived.forget()
    recorder.cleared = node if node.depth else None
    lane.read_modes()


def goes(lane: Any) -> None:
    """A lane of this thread is about to see nothing for a while: in a block, whoever comes next is to find what eager has."""
    lane.read_modes()
    lane.n_forgotten = n_forgotten()
    if lane.modes[False][2] is not None and lane.thread == threading.get_ident():
        recorder = lane.recorder
        recorder.outlived.hand_over(recorder)
        recorder.outlived.look(recorder)


def comes(lane: Any) -> None:
    """It sees calls again: what of the casts has been forgotten since then, and has a weight been written?"""
    recorder = lane.recorder
    were_there, were_written = recorder.outlived.look_again()
    if lane.n_forgotten != n_forgotten():
        forgotten(lane)
    elif were_there and _n_blocks():
        # Others may have left graphs. (Or the block has ended, and nobody has heard of it: then it is no more than slow.)
        recorder.graphs_in_block = True
        if were_written:
            recorder.writes_in_block = recorder.outlived.outside = True
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
    recorder.outlived.region_ends(ended)
    graphs = recorder.graphs_in_block or (lane is not None and lane.modes[True][2] is not None and ended.real)
    if recorder.cleared is None and graphs == recorder.graphs_in_block:
        return
    recorder.cleared, recorder.graphs_in_block = None, graphs
    _renew_modes(lane)


def will_write(lane: Any) -> None:
    """Weights are about to be written at once: who goes on in the same block is to have the casts of before."""
    casts = lane.modes[False][2]
    if casts is not None and not casts.are_real and lane.thread == threading.get_ident():
        lane.recorder.outlived.make(lane.recorder)


def written(lane: Any, weights: bool | None = True) -> None:
    """Weights have been written: behind that, in the same block, casts of before are used."""
    casts = lane.modes[False][2] if weights else None
    if casts is not None and not casts.are_real and lane.thread == threading.get_ident():
        lane.recorder.writes_in_block = True
        _renew_modes(lane)


def may_cast(modes: Any, flat: list[Any]) -> bool:
    """May autocast cast a weight for this call? It holds a lock meanwhile, so that calls which are owed cannot be made then."""
    return modes[1] is not None and any(map(_is_weight, flat))


def let_pass(lane: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Make a call that nobody takes."""
    modes = lane.modes[torch.is_grad_enabled()]
    if modes[2] is not None:
        targets = tensors_in((args[:1] or kwargs, kwargs.get("out"))) if may_write(func, args, kwargs) else []
        written(lane, before_call(lane, modes, tensors_in((args, kwargs)), targets))
    return DOORS.get(func, func)(*args, **kwargs)


def before_call(lane: Any, modes: Any, flat: list[Any], targets: list[Any]) -> bool | None:
    """A call is about to be made that may cast what it is given, or writes these; returns whether it writes weights. None: surely
    not, however the weights come in."""
    if modes[2] is None:
        return None
    if may_cast(modes, flat) and not hand_over(lane) and lane.recorder.outlived.nodes:
        lane.recorder.outlived.share(lane.recorder)
    if are_weights(lane.recorder, targets):
        will_write(lane)
        return True
    # What came from outside may be an alias of a weight that has not come in yet.
    return False if any(type(t) is not LazyTensor and t.dtype is torch.float32 for t in targets) else None


def are_weights(recorder: Any, tensors: list[Any]) -> bool:
    """Is one of these a weight, or an alias of one that has come in?"""
    if not tensors:
        return False
    region = recorder.region
    serials = {serial_of(leaf) for leaf in recorder.leaves.living() if _has_memory(leaf)}
    inside = {region.storages.get(serial) for serial in serials}
    for tensor in tensors:
        if type(tensor) is LazyTensor and tensor.cell.region is region and tensor.cell.storage in inside:
            return True
        real: Any = tensor.cell.real if type(tensor) is LazyTensor else tensor
        if _has_memory(real) and (serial_of(real) in serials or _is_weight(real)):
            return True
    return False


def lets_out(recorder: Any, tensor: Any) -> None:
    """Somebody gets at the memory of a tensor, and may write it."""
    lane = recorder.lane
    if lane is not None and lane.modes[False][2] is not None and are_weights(recorder, [tensor]):
        will_write(lane)
        written(lane)


def hand_over(lane: Any) -> bool:
    """Whoever comes next may cast: behind a write, autocast is to have the casts of before it. Is it behind one?"""
    if lane.recorder.writes_in_block and lane.thread == threading.get_ident():
        lane.recorder.outlived.hand_over(lane.recorder)
    return lane.recorder.writes_in_block  # type: ignore[no-any-return]


def need_casts(lane: Any, modes: Any, flat: list[Any], start: Node) -> bool:
    """Is a call that was made to be made for real, each time, since autocast's own casts matter? Once one was seen behind an
    update, so are those before it: the next time, its casts must be there. `start` is where it began."""
    if modes[2] is None or not modes[2].are_real or not may_cast(modes, flat):
        return False
    recorder = lane.recorder
    region = recorder.region
    path = path_between(start, region.node) or []
    taken = {value.id for node in path if node.op is not None and node.op.target is not CAST for value in node.op.inputs}
    cells = [region.plain.get(id(t)) for t in filter(_is_weight, flat)]
    if all(cell is not None and not taken.isdisjoint((cell.came.id, cell.ref.id)) for cell in cells):
        # As they are.
        return False
    lane.outlive_writes = lane.outlive_writes or (recorder.writes_in_block and not recorder.outlived.outside)
    return True


def are_kept_casts(tensors: list[tuple[Any, Any]], path: list[Node], start: Node, casts: Casts | None) -> bool:
    """Has autocast handed the ops of `path`, in place of each of these (tensor, value), the cast that it had kept of it?"""
    if not tensors or casts is None:
        return not tensors
    made = {node.op.inputs[0].id: node.results[0][0].id for node in start.path() if is_cast(node) and node.op is not None}
    taken = {value.id for node in path if node.op is not None for value in node.op.inputs}
    return all(value is not None and made.get(value.id) in taken for _, value in tensors)


def kept_casts(kwargs: Any, path: list[Node], flat: list[Any], region: Any, modes: Any) -> tuple[Node, ...]:
    """The operators of a call by which autocast has cast weights, and kept what they made. Not those that the program has asked
    for: a call that does nothing else, or that names a type."""
    if modes[1] is None or not modes[2].are_kept or "dtype" in kwargs:
        return ()
    cells = [region.plain.get(id(t)) for t in flat if _is_weight(t) and t.dtype is torch.float32 and not t._is_view()]
    weights = {number for cell in cells if cell is not None for number in (cell.came.id, cell.ref.id)}
    made = [(node, node.op) for node in path if node.op is not None and is_cast(node) and node.results[0][1].dtype is modes[1]]
    found = tuple(node for node, op in made if op.inputs[0].id in weights)
    return found if not all(map(is_cast, path)) else ()


def is_cast(node: Node | None) -> bool:
    """Is this an operator of those by which autocast casts?"""
    return node is not None and node.row is not None and node.row.target is CAST and node.op is not None


def _has_memory(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not _is_transformed(tensor) and is_strided(tensor)


def _is_weight(tensor: Any) -> bool:
    return type(tensor) is not LazyTensor and tensor.requires_grad and is_leaf(tensor)


class Weights:
    """Which weights of a region its operators cast."""

    def __init__(self, region: Any) -> None:
        came = numbers_of_plain(region)
        self._by_number = {number: real for number, real in came.items() if _is_weight(real)}
        self._ids = set(map(id, self._by_number.values()))

    def cast_by(self, node: Node | None) -> Any:
        """The weight that an operator casts, if that is what it does."""
        return self._by_number.get(node.op.inputs[0].id) if is_cast(node) else None  # type: ignore[union-attr]

    def made_before(self, weight: Any, path: list[Node], start: Node) -> Node | None:
        """Where the region has cast a weight, before a call that begins at `start` and does not cast it on its own `path`."""
        if id(weight) not in self._ids or any(self.cast_by(node) is weight for node in path):
            return None
        return next((node for node in reversed(start.path()) if self.cast_by(node) is weight), None)
