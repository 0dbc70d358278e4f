"""Calls that are made of many: a backward, an optimizer's update. What one did is learned from the ops that it brought."""

from collections.abc import Sequence
from typing import Any

import torch

from kitsune.lazy.derived import derived_of, given_before
from kitsune.lazy.edges import Before, Edge, Incoming, Made, arrivals_of, path_between, viewed_inputs, viewed_operands
from kitsune.lazy.scalar_sources import ScalarSources
from kitsune.lazy.trie import NOTHING


class Mark:
    """Where a region was before such a call, which has the tensors of `call` and depends on the numbers `before` it."""

    def __init__(self, recorder: Any, key: Any, call: Incoming, before: Sequence[float]) -> None:
        region = recorder.region
        self.recorder, self.region, self.key, self.call = recorder, region, key, call
        self.numbers = tuple(before)
        self.start, self.first, self.n_scalars = region.node, region.node.n_values, len(region.scalars)
        self._n_unrecorded = recorder.n_unrecorded
        self._tensors = Before(call.flat, region)

    @property
    def kept(self) -> bool:
        """Is the region still the same, and has every op since been recorded?"""
        return self.recorder.region is self.region and self.recorder.n_unrecorded == self._n_unrecorded

    def learn(self, lane: Any, func: Any, grads: Sequence[tuple[int, Made]] = ()) -> Edge | None:
        """Note what the call did; returns what is known of it by now."""
        edge = self._edge(func, tuple(grads))
        known = self.start.calls.get(self.key)
        if edge is not None:
            if known is not None and known.same(edge):
                known.sources.see(self.numbers, edge.scalars)
            else:
                edge.sources = ScalarSources(self.numbers, edge.scalars)
        found: Edge | None = lane.remember(self.start, self.key, edge)
        return found

    def _edge(self, func: Any, grads: tuple[tuple[int, Made], ...]) -> Edge | None:
        region, call = self.region, self.call
        path = path_between(self.start, region.node)
        written = self._tensors.written()
        if not path or written is None or self._tensors.turned():
            return None
        arrivals, lacking = arrivals_of(path, list(call.fresh.values()), region)
        of_region = func is torch.Tensor.backward
        derived = derived_of(lacking, path, given_before(region, self.first) if of_region else {}, region) if lacking else ()
        if derived is None:
            return None
        rewrites, bumps = written
        # A backward views what the calls before it were given.
        begins = viewed_inputs(path, region, self.first) if of_region else viewed_operands(path, call.flat, region)
        if begins is None:
            return None
        return Edge(
            start=self.start,
            func=func,
            modes=None,
            node=region.node,
            arrivals=arrivals,
            rewrites=rewrites,
            dirty=frozenset(storage for node in path for *_, storage in node.written),
            bumps=bumps,
            scalars=tuple(region.scalars[self.n_scalars :]),
            moves=False,
            structure=None,
            form=NOTHING,
            made=(),
            graded=False,
            grads=grads,
            begins=begins,
            is_backward=of_region,
            derived=derived,
        )
