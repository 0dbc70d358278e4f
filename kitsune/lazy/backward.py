"""A backward that is known is followed: the gradients get their placeholders, and the autograd engine does not run."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.graph import increment_version

from kitsune.lazy.cell import Cell
from kitsune.lazy.edges import Before, Edge, Incoming, Made, Returned, arrivals_of, path_between
from kitsune.lazy.realize import Followed
from kitsune.lazy.rebuild import tensors_in
from kitsune.lazy.scalar_sources import ScalarSources
from kitsune.lazy.tensor import LazyTensor, wrapper_maker
from kitsune.lazy.trie import NOTHING

NONE = object()


def take_backward(lane: Any, run: Callable[[], Any], losses: list[Any], gradients: list[Any], plain: bool) -> Any:
    """Take one backward: follow it, or have autograd run it. `plain`: with no option that asks for more than gradients."""
    from kitsune.lazy.call_keys import key_of

    recorder = lane.recorder
    region, call = recorder.region, Incoming()
    leaves = dict(_leaves(region))
    key = None
    if plain and region.history is not None and not _runs_python(leaves.values()) and not lane.hooked(leaves.values()):
        named = [leaf.grad for leaf in leaves.values()]
        tree = (losses, gradients, named)
        key = key_of(region, torch.Tensor.backward, tree, {}, (region.history, tuple(leaves), lane.modes[False]), call)
    if key is not None and not call.unknown and not region.real and region.observed_from is None and not region.slow:
        edge = region.node.calls.get(key)
        numbers = None if edge is None or edge.sights < lane.sights else edge.sources.numbers(region.scalars)
        if numbers is not None and _is_whole(region, edge, losses):
            with recorder.lock:
                return _follow(recorder, edge, call, leaves, numbers)
    lane.own_up([*losses, *gradients])
    return _run(lane, run, None if call.unknown else key, call, leaves)


def _leaves(region: Any) -> Iterator[tuple[int, Any]]:
    """The tensors of the region that collect gradients, by their value number."""
    for cell in region.plain.values():
        if cell.real.requires_grad and cell.real.is_leaf:
            yield cell.came.id, cell.real


def _runs_python(leaves: Any) -> bool:
    """Might Python of somebody run inside of the engine, or see its graph?"""
    if torch.is_anomaly_enabled() or _distributed():
        return True
    return any(leaf._backward_hooks or leaf._post_accumulate_grad_hooks for leaf in leaves)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_whole(region: Any, edge: Edge, losses: list[Any]) -> bool:
    """Which calls lead to the losses? Every loss must come from a call that was followed."""
    if edge.spent is None:
        makers: dict[int, list[int]] = {}
        # Who writes to a tensor's memory, maybe through a view, is one of its makers as well.
        writers: dict[int, list[int]] = {}
        calls = [Followed(*debt) for debt in region.calls]
        for k, call in enumerate(calls):
            for t in call.made:
                makers.setdefault(id(t), []).append(k)
            for storage in call.edge.dirty:
                writers.setdefault(storage, []).append(k)
        waiting = list(losses)
        spent: set[int] = set()
        while waiting:
            tensor = waiting.pop()
            if not tensor.requires_grad or tensor.is_leaf:
                continue
            if id(tensor) not in makers:
                return False
            for k in {*makers[id(tensor)], *writers.get(tensor.cell.storage, ())} - spent:
                spent.add(k)
                waiting += calls[k].flat
        edge.spent = frozenset(spent)
    return bool(edge.spent)


def _follow(recorder: Any, edge: Edge, call: Incoming, leaves: dict[int, Any], numbers: Any) -> None:
    from kitsune.lazy.call_lane import arrive, rewrite

    region = recorder.region
    arrive(region, edge, list(call.fresh.items()))
    region.scalars.extend(numbers)
    rewrite(region, edge, call.flat)
    if edge.bumps:
        increment_version([call.flat[k] for k in edge.bumps])
    region.node = edge.node
    for number, made in edge.grads:
        leaf = leaves[number]
        assert made is not None
        wrapper = made.make()
        wrapper.cell = cell = Cell(region, made.ref, made.type, made.storage)
        region.produced.append(cell)
        leaf.grad = wrapper
        recorder.note_leaf(leaf)
    region.history = region.history.then(edge)
    spend(recorder, region, edge.spent)
    recorder.tally.backwards += 1
    recorder.after_follow()


def spend(recorder: Any, region: Any, spent: frozenset[int]) -> None:
    """The graph of these calls is used up; what the program still holds of them is remembered."""
    kept: list[Any] = []
    gone: list[weakref.ref[LazyTensor]] = []
    for k, debt in enumerate(region.calls):
        if k not in spent:
            kept.append(debt)
            continue
        gone += map(_spend, Followed(*debt).made)
    region.calls = kept
    debt = None
    recorder.lane.spent = [reference for reference in (*recorder.lane.spent, *gone) if reference() is not None]


def _spend(tensor: LazyTensor) -> "weakref.ref[LazyTensor]":
    tensor.cell.spent = tensor.cell.owed is not None
    return weakref.ref(tensor)


def _run(lane: Any, run: Callable[[], Any], key: Any, call: Incoming, leaves: dict[int, Any]) -> Any:
    recorder, region = lane.recorder, lane.recorder.region
    start, first, scalars = region.node, region.node.n_values, tuple(region.scalars)
    flat = call.flat
    before = {number: (leaf, leaf.grad) for number, leaf in leaves.items()}
    written = Before(flat, region)
    region.real = True
    n_unrecorded = recorder.n_unrecorded
    result = lane.made(run)
    if recorder.region is not region:
        return result
    edge = None
    if key is not None and recorder.n_unrecorded == n_unrecorded:
        edge = _edge(region, call, before, written, start, first, len(scalars))
        known = start.calls.get(key)
        if edge is not None:
            if known is not None and known.same(edge):
                known.sources.see(scalars, edge.scalars)
            else:
                edge.sources = ScalarSources(scalars, edge.scalars)
        edge = lane.remember(start, key, edge)
    region.history = None if edge is None or region.history is None else region.history.then(edge)
    return result


def _edge(region: Any, call: Incoming, before: dict[int, Any], known: Before, start: Any, first: int, n: int) -> Edge | None:
    path = path_between(start, region.node)
    if not path:
        return None
    arrivals = arrivals_of(path, list(call.fresh.values()), region)
    if arrivals is None:
        return None
    grads: list[tuple[int, Made | None]] = []
    returned = Returned(None, call.flat, region, first, wrapper_maker)
    for number, (leaf, grad) in before.items():
        now = leaf.grad
        if now is grad:
            continue
        made = returned.new(now) if type(now) is LazyTensor and not now.requires_grad else None
        if made is None:
            return None
        grads.append((number, made))
    written = known.written()
    if written is None:
        return None
    rewrites, bumps = written
    return Edge(
        node=region.node,
        arrivals=arrivals,
        rewrites=rewrites,
        dirty=frozenset(storage for node in path for *_, storage in node.written),
        bumps=bumps,
        scalars=tuple(region.scalars[n:]),
        moves=False,
        structure=None,
        form=NOTHING,
        made=(),
        graded=False,
        grads=tuple(grads),
    )


def losses_of(tensors: Any, gradients: Any) -> tuple[list[Any], list[Any]] | None:
    """The tensors that a backward begins at and its gradients; None if one of them is something else than a tensor."""
    losses = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors) if isinstance(tensors, (tuple, list)) else []
    given = [] if gradients is None else [gradients] if isinstance(gradients, torch.Tensor) else list(gradients)
    if not losses or any(not isinstance(t, torch.Tensor) for t in losses):
        return None
    if len(tensors_in(given)) + sum(t is None for t in given) != len(given):
        return None
    return losses, given
