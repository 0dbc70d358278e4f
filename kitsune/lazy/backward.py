"""A backward that is known is followed: the gradients get their placeholders, and the autograd engine does not run."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kitsune.lazy.advance import arrive, place, rewrite
from kitsune.lazy.backward_matchers import BackwardMatcher, spend
from kitsune.lazy.call_keys import key_of
from kitsune.lazy.cell import is_leaf
from kitsune.lazy.cuts import calls_behind, regret
from kitsune.lazy.derived import given_before
from kitsune.lazy.edges import Edge, Incoming, Made, begin_of
from kitsune.lazy.full_backwards import is_distributed, runs_hooks, why_full
from kitsune.lazy.realize import Followed
from kitsune.lazy.rebuild import tensors_in
from kitsune.lazy.returned import Returned
from kitsune.lazy.sites import user_site
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.wholes import Mark
from kitsune.lazy.write_counts import count_writes


def take_backward(lane: Any, run: Callable[[], Any], losses: list[Any], gradients: list[Any], plain: bool) -> Any:
    """Take one backward: follow it, or have autograd run it. `plain`: with no option that asks for more than gradients."""
    recorder = lane.recorder
    call = Incoming()
    # From the look at the region to the step along it: another thread may end the region.
    with recorder.lock:
        region = recorder.region
        region.unfold()
        regret(losses, region)
        leaves = dict(_leaves(region))
        key = _key(lane, region, losses, gradients, leaves, call) if plain else None
        if key is not None and not region.real and region.observed_from is None and not region.slow:
            edge = region.node.calls.get(key)
            numbers = None if edge is None else edge.sources.numbers(region.scalars)
            if numbers is not None and _begin_there(region, edge) and _is_whole(region, edge, losses):
                if BackwardMatcher.suits(edge, call, losses, gradients, leaves):
                    lane.take_by(BackwardMatcher(lane, edge, call, leaves), edge)
                return _follow(recorder, edge, call, leaves, numbers)
        recorder.tally.full_backwards[why_full(lane, region, plain, key, leaves), user_site()] += 1
    lane.own_up([*losses, *gradients], asked=False)
    return _run(lane, run, key, call, leaves)


def _key(lane: Any, region: Any, losses: list[Any], gradients: list[Any], leaves: dict[int, Any], call: Incoming) -> Any:
    """By what this backward is known; None if it may do more than what it does by itself."""
    if region.past is None or _runs_python(leaves.values()) or lane.hooked(leaves.values()):
        return None
    tree = (losses, gradients, [leaf.grad for leaf in leaves.values()])
    key = key_of(region, torch.Tensor.backward, tree, {}, (tuple(region.past), tuple(leaves), lane.modes[False]), call)
    return None if call.unknown or call.beside else key


def _leaves(region: Any) -> Iterator[tuple[int, Any]]:
    """The tensors of the region that collect gradients, by their value number."""
    for cell in region.plain.values():
        if cell.real.requires_grad and is_leaf(cell.real):
            yield cell.came.id, cell.real


def _runs_python(leaves: Any) -> bool:
    """Might Python of somebody run inside of the engine, or see its graph?"""
    return torch.is_anomaly_enabled() or is_distributed() or runs_hooks(leaves)


def _begin_there(region: Any, edge: Edge) -> bool:
    """Do the inputs that it views begin where they did?"""
    if not edge.begins:
        return True
    reals = {cell.came.id: cell.real for cell in region.plain.values()}
    return all(begin_of(reals[number]) == begin for number, begin in edge.begins)


def _is_whole(region: Any, edge: Edge, losses: list[Any]) -> bool:
    """Which calls lead to the losses? Every loss must come from a call that was followed."""
    if edge.spent is None:
        spent = calls_behind(region.calls, losses)
        if spent is None:
            return False
        edge.spent = frozenset(spent)
    return bool(edge.spent)


def _follow(recorder: Any, edge: Edge, call: Incoming, leaves: dict[int, Any], numbers: Any) -> None:
    region = recorder.region
    arrive(region, edge, list(call.fresh.items()), given_before(region, region.node.n_values) if edge.derived else ())
    region.scalars.extend(numbers)
    rewrite(region, edge, call.flat)
    if edge.bumps:
        count_writes(region, [call.flat[k] for k in edge.bumps], edge)
    region.node = edge.node
    for number, made in edge.grads:
        leaf = leaves[number]
        leaf.grad = place(region, made, made.make())
        recorder.leaves.note(leaf)
    region.extend_past(edge)
    flat = [t for k in edge.spent for t in Followed(*region.calls[k]).flat if type(t) is not LazyTensor and t.requires_grad]
    spend(recorder, region, edge.spent, list({id(t): t for t in flat if is_leaf(t)}.values()))
    region.step.after_backward = edge.node.n_values
    recorder.tally.backwards += 1
    recorder.after_follow()


def _run(lane: Any, run: Callable[[], Any], key: Any, call: Incoming, leaves: dict[int, Any]) -> Any:
    recorder, region = lane.recorder, lane.recorder.region
    before = {number: (leaf, leaf.grad) for number, leaf in leaves.items()}
    mark = Mark(recorder, key, call, region.scalars)
    region.real = recorder.making = True
    try:
        result = lane.made(run)
    finally:
        recorder.making = False
        recorder.region.step.after_backward = recorder.region.node.n_values
    if recorder.region is not region:
        return result
    edge = None
    if key is not None and mark.kept:
        grads = _gradients(region, before, mark.first)
        func = torch.Tensor.backward
        edge = lane.remember(mark.start, key, None) if grads is None else mark.learn(lane, func, grads)
    region.extend_past(edge)
    return result


def _gradients(region: Any, before: dict[int, Any], first: int) -> list[tuple[int, Made]] | None:
    """(leaf's value, its gradient) of every leaf that got a new one; None if that cannot be made again without the backward."""
    grads = []
    returned = Returned(None, [], region, first, [])
    for number, (leaf, grad) in before.items():
        now = leaf.grad
        if now is grad:
            continue
        made = returned.new(now) if type(now) is LazyTensor and not now.requires_grad else None
        if made is None:
            return None
        grads.append((number, made))
    return grads


def losses_of(tensors: Any, gradients: Any) -> tuple[list[Any], list[Any]] | None:
    """The tensors that a backward begins at and its gradients; None if one of them is something else than a tensor."""
    losses = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors) if isinstance(tensors, (tuple, list)) else []
    given = [] if gradients is None else [gradients] if isinstance(gradients, torch.Tensor) else list(gradients)
    if not losses or any(not isinstance(t, torch.Tensor) for t in losses):
        return None
    if len(tensors_in(given)) + sum(t is None for t in given) != len(given):
        return None
    return losses, given
