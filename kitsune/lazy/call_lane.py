"""The call lane: a call of torch's API that is known at its place is followed as a whole, before autograd and dispatch.

What autograd would have done is owed (`region.calls`): a backward that is known is followed too and settles the debt, and
anything else that could tell the difference has the calls made again for their graph (`realize`).
"""

import weakref
from typing import Any

import torch
from torch.autograd.graph import increment_version

from kitsune.ir import Barrier
from kitsune.lazy.backward import losses_of, take_backward
from kitsune.lazy.call_keys import key_of
from kitsune.lazy.cell import Cell
from kitsune.lazy.edges import Before, Edge, Incoming, cell_in
from kitsune.lazy.hands_off import ASKS, DETACHES, HARMLESS, REACHES_GRAPH, VALUES, may_write
from kitsune.lazy.learning import Learner, Sight
from kitsune.lazy.realize import attach_spent, realize, tensor_is_spent
from kitsune.lazy.rebuild import fill, tensors_in
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import NOTHING, ONE, SELF

# An edge is followed once it was seen this often: on the second sight it must do again what it did on the first.
SIGHTS = 2


class CallLane(Learner):
    """Takes the calls of one accelerating thread, for its recorder."""

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self.sights = SIGHTS
        # Wrappers whose graph a followed backward has used up.
        self.spent: list[weakref.ref[LazyTensor]] = []
        # Calls of torch's API that torch is making now.
        self.inside = 0
        self.read_modes()

    def call(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take one call of torch's API (the `__torch_function__` of the pipeline's mode)."""
        if func in HARMLESS or self.recorder.paused:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if func in ASKS:
            return self._asked(func, args, kwargs)
        if func is torch.Tensor.backward:
            return self._backward_of_method(*args, **kwargs)
        region, call = self.recorder.region, Incoming()
        modes = self.modes[torch.is_grad_enabled()]
        key = key_of(region, func, args, kwargs, modes, call)
        if call.floats and not self.moves.get((func, *kwargs), False):
            key = (key, tuple(map(float.hex, call.floats)))
        if not call.unknown and not region.slow:
            edge = region.node.calls.get(key)
            if edge is not None and edge.sights >= self.sights and self._may_follow(edge, region, func, kwargs, call):
                if edge.plain:
                    return self.made(lambda: func(*args, **kwargs))
                return self._follow(edge, func, args, kwargs, call, modes)
        return self._make(func, args, kwargs, None if call.unknown else key, call, modes)

    def _may_follow(self, edge: Edge, region: Any, func: Any, kwargs: Any, call: Incoming) -> bool:
        if edge.graded and region.real:
            return False
        return not call.floats or call.floats == edge.floats or (func, *kwargs) in self.proven

    def read_modes(self) -> None:
        """Look at autocast again: it has changed."""
        device = self.recorder.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.modes = {graded: (graded, autocast) for graded in (False, True)}

    def stray(self, args: Any, kwargs: Any) -> bool:
        """An op comes that no call of the API has brought: may autograd know of its operands? True if it must come again."""
        region = self.recorder.region
        if not torch.is_grad_enabled():
            return False
        tensors = tensors_in((args, kwargs))
        virtual = any(type(t) is LazyTensor and t.cell.owed is not None for t in tensors)
        if virtual or (not region.real and any(t.requires_grad for t in tensors)):
            self.own_up(tensors)
            region.real, region.history = True, None
        return virtual

    def lose_track(self) -> None:
        """Something begins that builds or reads a graph where calls do not show it."""
        if not self.inside:
            self.own_up()
            self.settle_spent()
            self.recorder.region.real, self.recorder.region.history = True, None

    def settle_spent(self) -> None:
        """Let autograd know which wrappers had a graph that is used up."""
        # Taken first: to attach one makes a graph, and whatever does that comes by here.
        spent, self.spent = self.spent, []
        for reference in spent:
            tensor = reference()
            if tensor is not None and tensor_is_spent(tensor):
                attach_spent(self.recorder, tensor)

    def _asked(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = tensors_in((args, kwargs))
        if any(type(t) is LazyTensor and t.cell.owed is not None for t in tensors):
            self.own_up(tensors if func not in VALUES else ())
        return self.made(lambda: func(*args, **kwargs))

    def _backward_of_method(
        self, loss: Any, gradient: Any = None, retain_graph: Any = None, create_graph: Any = False, inputs: Any = None
    ) -> Any:
        def run() -> None:
            torch.autograd.backward(loss, gradient, retain_graph, create_graph, inputs=inputs)

        return self.backward(run, loss, gradient, not retain_graph and not create_graph and inputs is None)

    def backward(self, run: Any, tensors: Any, gradients: Any, plain: bool) -> Any:
        """Take a backward, which `run` would make."""
        if self.recorder.paused or self.inside:
            return run()
        found = losses_of(tensors, gradients)
        if found is None:
            self.own_up()
            return self.made(run)
        return take_backward(self, run, *found, plain)

    def _follow(  # noqa: C901 - the hot path: calls cost 0.1 us
        self, edge: Edge, func: Any, args: Any, kwargs: Any, call: Incoming, modes: Any
    ) -> Any:
        recorder, flat = self.recorder, call.flat
        shared = recorder.shared
        if shared:
            recorder.lock.acquire()
        try:
            region = recorder.region
            start, dirty, undo = region.node, region.dirty, None
            if edge.arrivals:
                arrive(region, edge, list(call.fresh.items()))
            if edge.scalars:
                region.scalars.extend(call.floats if edge.moves else edge.scalars)
            if edge.dirty:
                undo = rewrite(region, edge, flat)
            wrappers = []
            for made in edge.made:
                wrapper = made.make()
                wrapper.cell = cell = Cell(region, made.ref, made.type, made.storage)
                region.produced.append(cell)
                if made.graded is not None:
                    cell.owed = made
                wrappers.append(wrapper)
            region.node = edge.node
            if edge.graded:
                region.history = region.history.then(edge)
                region.calls.append((edge, start, func, args, kwargs, flat, wrappers, undo, dirty, modes, recorder.epoch))
            if edge.bumps:
                increment_version([flat[k] for k in edge.bumps])
            recorder.tally.followed += 1
            if edge.node.full:
                recorder.flush(Barrier.BOUND)
        finally:
            if shared:
                recorder.lock.release()
        if edge.form == ONE:
            return wrappers[0]
        if edge.form == SELF:
            return flat[edge.structure.index]
        return None if edge.form == NOTHING else fill(edge.structure, wrappers, flat)

    def made(self, run: Any) -> Any:
        """Have torch make a call."""
        recorder = self.recorder
        hook, recorder.hook = recorder.hook, None
        self.inside += 1
        try:
            return run()
        finally:
            self.inside -= 1
            recorder.hook = hook

    def _make(self, func: Any, args: Any, kwargs: Any, key: Any, call: Incoming, modes: Any) -> Any:
        """Make a call for real and learn from it."""
        recorder, region = self.recorder, self.recorder.region
        flat = call.flat if key is not None else tensors_in((args, kwargs))
        graph = func in REACHES_GRAPH
        if graph:
            recorder.forget_arrivals()
        graded = graph or (modes[0] and func not in DETACHES and any(t.requires_grad for t in flat))
        writes = may_write(func) or "out" in kwargs
        wrong = writes and self.spoils(tensors_in((args[:1], kwargs.get("out"))))
        if graded or wrong or (writes and any(type(t) is LazyTensor and t.cell.owed is not None for t in flat)):
            self.own_up(flat)
        region.real = region.real or graded
        start, first, n_scalars = region.node, region.node.n_values, len(region.scalars)
        learns = key is not None and not graph and not wrong
        n_unrecorded = recorder.n_unrecorded
        before = Before(flat, region) if learns else None
        result = self.made(lambda: func(*args, **kwargs))
        if not graded and any(t.requires_grad for t in tensors_in(result) if not any(t is known for known in flat)):
            # A factory has made a leaf, or a function of others has built a graph.
            recorder.region.real, recorder.region.history = True, None
        if recorder.region is not region:
            return result
        edge = None
        if learns and recorder.n_unrecorded == n_unrecorded and not (graded and region.history is None):
            edge = self.learn(key, func, kwargs, Sight(call, start, first, n_scalars, before, result))
        if graded:
            region.history = None if edge is None or region.history is None else region.history.then(edge)
        return result

    def own_up(self, tensors: Any = ()) -> None:
        """From here on autograd is to know of every call so far."""
        region = self.recorder.region
        if region.calls:
            self.inside += 1
            try:
                self.recorder.tally.realized += 1
                realize(self.recorder, region)
            finally:
                self.inside -= 1
        for tensor in tensors:
            if tensor_is_spent(tensor):
                attach_spent(self.recorder, tensor)


def rewrite(region: Any, edge: Edge, flat: list[Any]) -> list[tuple[Cell, Any]]:
    """Let the tensors that a call writes stand for what they are afterwards; returns what they stood for."""
    undo = []
    for k, after in edge.rewrites:
        cell = cell_in(flat[k], region)
        assert cell is not None
        undo.append((cell, cell.ref))
        cell.ref = after
    # A new set: those of earlier calls keep theirs, in case they are made again.
    region.dirty = region.dirty | edge.dirty
    return undo


def arrive(region: Any, edge: Edge, fresh: list[tuple[int, Any]]) -> None:
    """Let the tensors in that a call brings along."""
    plain, inputs, storages = region.plain, region.inputs, region.storages
    for k, number, type_, storage, graded in edge.arrivals:
        serial, tensor = fresh[k]
        storages[serial] = storage
        if type(tensor) is LazyTensor:
            cell = tensor.cell
            inputs.append((number.id, cell.real))
            cell.region, cell.ref, cell.storage = region, number, storage
        else:
            cell = plain[id(tensor)] = Cell(region, number, type_, storage)
            cell.real = tensor
            inputs.append((number.id, tensor))
            if graded:
                region.recorder.note_leaf(tensor)
        cell.external, cell.came = True, number
