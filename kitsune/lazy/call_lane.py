"""The call lane: a call of torch's API that is known at its place is followed as a whole, before autograd and dispatch.

What autograd would have done is owed (`region.calls`): a backward that is known is followed too and settles the debt, and
anything else that could tell the difference has the calls made again for their graph (`realize`).
"""

import weakref
from typing import Any

import torch
from torch.autograd.graph import increment_version

from kitsune.lazy.backward import losses_of, take_backward
from kitsune.lazy.call_keys import key_of
from kitsune.lazy.cell import Cell
from kitsune.lazy.edges import Before, Edge, Incoming, cell_in
from kitsune.lazy.hands_off import ASKS, HARMLESS, REACHES_GRAPH, VALUES, may_write
from kitsune.lazy.learning import Learner, Sight
from kitsune.lazy.realize import Followed, attach_spent, realize, tensor_is_spent
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

    def call(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take one call of torch's API (the `__torch_function__` of the pipeline's mode)."""
        if func in HARMLESS or self.recorder.paused:
            return func(*args, **kwargs) if kwargs else func(*args)
        if func in ASKS:
            return self._asked(func, args, kwargs or {})
        if func is torch.Tensor.backward:
            return self._backward_of_method(*args, **kwargs or {})
        return self._take(func, args, kwargs or {})

    def stray(self, args: Any, kwargs: Any) -> bool:
        """An op comes that no call of the API has brought: may autograd know of its operands? True if it must come again."""
        region = self.recorder.region
        if not torch.is_grad_enabled():
            return False
        tensors = tensors_in((args, kwargs))
        virtual = any(type(t) is LazyTensor and t.virtual is not None for t in tensors)
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
        for reference in self.spent:
            tensor = reference()
            if tensor is not None and tensor_is_spent(tensor):
                attach_spent(self.recorder, tensor)
        self.spent.clear()

    def _asked(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = tensors_in((args, kwargs))
        if any(type(t) is LazyTensor and t.virtual is not None for t in tensors):
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

    def _take(self, func: Any, args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        region, call = recorder.region, Incoming()
        modes = self._modes()
        key = key_of(region, func, args, kwargs, modes, call)
        if call.floats and not self.moves.get((func, *kwargs), False):
            key = (key, tuple(map(float.hex, call.floats)))
        if not call.unknown and region.observed_from is None and not region.slow:
            edge = region.node.calls.get(key)
            if (
                edge is not None
                and edge.sights >= self.sights
                and not (edge.graded and region.real)
                and (call.floats == list(edge.floats) or (func, *kwargs) in self.proven)
            ):
                if edge.plain:
                    return self.made(lambda: func(*args, **kwargs))
                # Autograd has threads of its own. A call that is made for real must not hold the lock: they record its ops.
                with recorder.lock:
                    return self._follow(edge, func, args, kwargs, call, modes)
        return self._make(func, args, kwargs, None if call.unknown else key, call, modes)

    def _modes(self) -> Any:
        device = self.recorder.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return torch.is_grad_enabled(), autocast

    def _follow(self, edge: Edge, func: Any, args: Any, kwargs: Any, call: Incoming, modes: Any) -> Any:
        recorder, region = self.recorder, self.recorder.region
        start, dirty, flat = region.node, region.dirty, call.flat
        if edge.arrivals:
            arrive(region, edge, list(call.fresh.values()))
        region.scalars.extend(call.floats if edge.moves else edge.scalars)
        undo = []
        for k, after in edge.rewrites:
            cell = cell_in(flat[k], region)
            assert cell is not None
            undo.append((cell, cell.ref))
            cell.ref = after
        if edge.dirty:
            region.dirty = dirty | edge.dirty
        region.node = edge.node
        wrappers = [place(region, made) for made in edge.made]
        if edge.graded:
            owe(region, edge, wrappers)
            region.calls.append(Followed(edge, start, func, args, kwargs, flat, wrappers, undo, dirty, modes, recorder.epoch))
        if edge.bumps:
            # Those with a history yet to come are counted when they get it.
            increment_version([t for k in edge.bumps if type(t := flat[k]) is not LazyTensor or t.virtual is None])
        recorder.tally.followed += 1
        if edge.form == ONE:
            result: Any = wrappers[0]
        elif edge.form == SELF:
            result = flat[edge.structure.index]
        else:
            result = None if edge.form == NOTHING else fill(edge.structure, wrappers, flat)
        recorder.after_follow()
        return result

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
        graded = graph or (modes[0] and any(t.requires_grad for t in flat))
        if graded or any(type(t) is LazyTensor and t.virtual is not None for t in flat if may_write(func)):
            self.own_up(flat)
        region.real = region.real or graded
        start, first, n_scalars = region.node, region.node.n_values, len(region.scalars)
        learns = key is not None and not graph
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


def place(region: Any, made: Any) -> LazyTensor:
    """A new wrapper for a value of the region."""
    wrapper: LazyTensor = made.make()
    wrapper.cell = cell = Cell(region, made.ref, made.type, made.storage)
    region.produced.append(cell)
    return wrapper


def owe(region: Any, edge: Edge, wrappers: list[LazyTensor]) -> None:
    """The wrappers have a history that autograd does not know of yet."""
    for wrapper, made in zip(wrappers, edge.made, strict=True):
        if made.graded is not None:
            wrapper.virtual, wrapper.virtual_name = region, made.graded
    region.history = region.history.then(edge)


def arrive(region: Any, edge: Edge, fresh: list[tuple[Any, int]]) -> None:
    """Let the tensors in that a call brings along."""
    for k, number, type_, storage in edge.arrivals:
        tensor, serial = fresh[k]
        region.let_in(tensor, serial, number, type_, storage)
