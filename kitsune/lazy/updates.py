"""An optimizer's update that is known is followed as one call: `torch.optim.adam.adam` with its lists of tensors."""

from typing import Any

import torch

from kitsune.lazy.call_keys import key_of, with_floats
from kitsune.lazy.edges import Edge, Incoming, begin_of
from kitsune.lazy.host_counts import HostCounts, host_counts
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.update_matchers import UpdateMatcher
from kitsune.lazy.wholes import Mark
from kitsune.lazy.write_counts import count_writes

# A function that does something else each time, or something that is not recorded (step counts on the host), is left to the
# calls that it makes after this many tries, and looked at again once in a while.
TRIES, AGAIN = 3, 64


def take_update(lane: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Take one call of an optimizer's function: follow it, or make it and learn from it."""
    recorder = lane.recorder
    filled, recorder.filled = recorder.filled, None
    if recorder.paused or lane.inside or torch.is_grad_enabled():
        return func(*args, **kwargs)
    matcher = recorder.region.node.matchers.get(func)
    if matcher is not None:
        # Reading 200 tensors' `requires_grad` would be 200 calls of the API. And another thread may end the region, from the look
        # at it to the step along it.
        with torch._C.DisableTorchFunction(), recorder.lock:
            recorder.region.unfold()
            found = matcher.match(lane, args, kwargs, filled)
            if found is not None:
                return _follow(recorder, matcher.edge, *found)
    name = (func, *(a for a in kwargs.values() if a is None or type(a) is bool))
    n_failures = lane.failures.get(name, 0)
    if n_failures >= TRIES and n_failures % AGAIN:
        lane.failures[name] = n_failures + 1
        return func(*args, **kwargs)
    with torch._C.DisableTorchFunction(), recorder.lock:
        recorder.region.unfold()
        key, call = _key(lane, func, args, kwargs)
        counts = _counts(recorder, func, args, kwargs)
        before = call.floats if counts is None else call.floats + counts.numbers
        key = None if key is None else (key, None if counts is None else counts.pattern)
        edge = None if key is None or recorder.region.slow else recorder.region.node.calls.get(key)
        if edge is not None and any(begin_of(call.flat[k]) != begin for k, begin in edge.begins):
            edge = None
        numbers = None if edge is None else edge.sources.numbers(before)
        if edge is not None and numbers is not None:
            if (order := UpdateMatcher.order(args, kwargs, call, filled)) is not None:
                recorder.region.node.matchers[func] = UpdateMatcher(lane, edge, kwargs, call, filled, order, counts)
            return _follow(recorder, edge, call.flat, tuple(call.fresh), tuple(call.fresh.values()), numbers, counts)
        mark = None if key is None else Mark(recorder, key, call, before)
    lists = [list(map(id, a)) for a in args if type(a) is list]
    if mark is not None and counts is not None:
        recorder.counting = frozenset(map(id, counts.counts))
        if recorder.watcher is not None:
            recorder.watcher.counted(counts)
    lane.part_of_update = mark is not None
    try:
        result = func(*args, **kwargs)
    finally:
        lane.part_of_update, recorder.counting = False, frozenset()
    # A first step of SGD puts its momentum buffers into the list that it was given.
    same = result is None and lists == [list(map(id, a)) for a in args if type(a) is list]
    with torch._C.DisableTorchFunction():
        learned = mark.learn(lane, func) if same and mark is not None and mark.kept else None
    lane.failures[name] = 0 if learned is not None else n_failures + 1
    return result


def _counts(recorder: Any, func: Any, args: Any, kwargs: Any) -> HostCounts | None:
    found = host_counts(func, args, kwargs)
    # What the region reads as it is now, such as a copy that is pending, is counted in its turn.
    return None if found is not None and any(map(recorder.takes_part, found.counts)) else found


def _key(lane: Any, func: Any, args: Any, kwargs: Any) -> tuple[Any, Incoming]:
    call = Incoming()
    key = key_of(lane.recorder.region, func, args, kwargs, lane.modes[False], call)
    return None if call.unknown or call.beside else with_floats(key, call.floats, True), call


def _follow(
    recorder: Any, edge: Edge, flat: list[Any], serials: Any, fresh: Any, numbers: Any, counts: HostCounts | None = None
) -> None:
    region = recorder.region
    if counts is not None:
        if recorder.watcher is not None:
            recorder.watcher.counted(counts)
        counts.advance()
    # Mostly the region ends here: nobody asks for the 800 tensors of an update again.
    region.deferred = (edge, flat, serials, fresh)
    region.scalars.extend(numbers)
    count_writes(region, [flat[k] for k in edge.bumps], edge)
    # But a gradient's wrapper stands for the gradient as it is afterwards, which decides what is alive at the end: by its schema
    # a fused update writes gradients. One that came in from outside is a wrapper at one time and plain at another.
    for k, after in edge.rewrites:
        if type(flat[k]) is LazyTensor:
            flat[k].cell.ref = after
    region.node = edge.node
    recorder.tally.updates += 1
    recorder.after_follow()
