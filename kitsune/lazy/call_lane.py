"""The call lane: a call of torch's API that is known at its place is followed as a whole, before autograd and dispatch.

What autograd would have done is owed (`region.calls`): a backward that is known is followed too and settles the debt, and
anything else that could tell the difference has the calls made again for their graph (`realize`).
"""

import contextlib
from typing import Any

import torch

from kitsune.lazy import sites
from kitsune.lazy.advance import arrive, place, rewrite
from kitsune.lazy.asides import aside, mark
from kitsune.lazy.backward import losses_of, take_backward
from kitsune.lazy.call_keys import key_of, with_floats
from kitsune.lazy.casts import before_call, let_pass, may_cast, need_casts, read_modes, written
from kitsune.lazy.debts import Debtor
from kitsune.lazy.early_reads import ITEM
from kitsune.lazy.edges import Before, Edge, Incoming, begin_of
from kitsune.lazy.growing_numbers import BY_NUMBER, as_float
from kitsune.lazy.hands_off import (
    ASKS,
    DETACHES,
    FLAGS,
    HARMLESS,
    PRODUCTS,
    REACHES_GRAPH,
    READS,
    SHOWS_GRAPH,
    VALUES,
    is_foreign,
    is_simple,
    is_ungraded,
    may_write,
    stays,
)
from kitsune.lazy.items import PARTS, part
from kitsune.lazy.learning import Sight
from kitsune.lazy.matcher_steps import MISS
from kitsune.lazy.realize import attach_bases, tensor_is_spent
from kitsune.lazy.rebuild import fill, tensors_in
from kitsune.lazy.recording import PLAIN
from kitsune.lazy.replaced import DOORS, is_untouched, original_of
from kitsune.lazy.spent_views import written_views
from kitsune.lazy.step_ends import is_over, note_gradients
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import NOTHING, ONE, SELF
from kitsune.lazy.twins import settle
from kitsune.lazy.used_again import Unused, keep
from kitsune.lazy.words import in_eagers_words
from kitsune.lazy.write_counts import count_writes

_BACKWARD, _BACKWARDS = torch.Tensor.backward, torch.autograd.backward
_profiled, _Mark, _NOTHING = torch.autograd._profiler_enabled, torch._C._profiler._RecordFunctionFast, contextlib.nullcontext()


class CallLane(Debtor):
    """Takes the calls of one accelerating thread, for its recorder."""

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        # What torch is making calls with; and is one of them an update that is learned as a whole?
        self.given, self.part_of_update, self.unused = tuple[Any, ...](), False, Unused()
        # By what modes of calls are told apart, and how often autocast had forgotten its casts when the lane was closed.
        self.known_modes, self.n_forgotten = dict[Any, Any](), 0
        self.read_modes()

    def call(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: C901 - calls cost 0.1 us
        """Take one call of torch's API (the `__torch_function__` of the pipeline's mode)."""
        recorder = self.recorder
        region = recorder.region
        if region.deferred is not None and func not in HARMLESS:
            region.unfold()
        node = region.node
        matcher = node.matchers.get(func)
        if matcher is not None and not recorder.paused:
            result = matcher(self, region, node, args, kwargs)
            if result is not MISS:
                return result
        if func in HARMLESS:
            return func(*args, **kwargs) if kwargs else func(*args)
        if (original := original_of(func)) is not None:
            return self.call(original, types, args, kwargs)
        if recorder.paused:
            return let_pass(self, func, args, kwargs or {})
        if stays(func, args, kwargs):
            return args[0]
        if func in PARTS and (found := part(self, func, args, kwargs)) is not MISS:
            return found
        if func in BY_NUMBER:
            args = as_float(region.node, func, args, kwargs)
        kwargs = kwargs or {}
        if func in ASKS:
            return self._asked(func, args, kwargs)
        if func in FLAGS and type(args[0]) in PLAIN and id(args[0]) not in region.plain:
            recorder.known.drop(args[0])
            return self.made(func, args, kwargs)
        if func is _BACKWARD or func is torch.Tensor.backward:
            return self._backward_of_method(*args, **kwargs)
        if func is _BACKWARDS or func is torch.autograd.backward:  # After its door: others have no gradients.
            return _BACKWARDS(*args, **kwargs)
        if not self.inside and is_over(recorder, region, func, args):
            return self.call(func, types, args, kwargs)
        call = Incoming()
        modes = self.modes[torch.is_grad_enabled()]
        plain_key = key_of(region, func, args, kwargs, modes, call)
        key = with_floats(plain_key, call.floats, self.moves.get((func, *kwargs), False))
        if not call.unknown and not region.slow:
            edge = region.node.calls.get(key)
            if edge is not None and edge.follows and self._may_follow(edge, region, func, kwargs, call):
                if edge.plain:
                    return self.made_anew(edge, key, args, kwargs)
                # The second of two questions about a loss: its region has been run.
                found = None if region.node.depth else recorder.early.made_before(recorder, edge, call)
                return self._follow(region, edge, args, kwargs, call) if found is None else found
        if is_foreign(func):  # A library's, which asks before it does what it likes: also with the graph.
            self.lose_track()
            return self.made(func, args, kwargs)
        return self._make(func, args, kwargs, None if call.unknown else plain_key, call, modes)

    def _may_follow(self, edge: Edge, region: Any, func: Any, kwargs: Any, call: Incoming) -> bool:
        if (edge.graded and region.real) or any(begin_of(call.flat[k]) != begin for k, begin in edge.begins):
            return False
        if any(tensor_is_spent(call.flat[k]) for k in written_views(edge)):
            return False
        return not call.floats or call.floats == edge.floats or (func, *kwargs) in self.proven

    def read_modes(self) -> None:
        """Look at autocast again: it has changed."""
        self.modes = read_modes(self)

    def _asked(self, func: Any, args: Any, kwargs: Any) -> Any:
        kind = READS.get(func)
        # Of one number whose read comes to the recorder and to nobody else. Torch's way there takes 20 us.
        if kind is not None and len(args) == 1 and not kwargs and is_simple(args[0]) and self.recorder.is_on_top():
            with _Mark("aten::item") if _profiled() else _NOTHING:
                return kind(self.made(self.recorder.record, (ITEM, (), args)))
        tensors = tensors_in((args, kwargs))
        if any(type(t) is LazyTensor and t.cell.owed is not None for t in tensors):
            self.own_up(tensors if func not in VALUES else ())
        if func in SHOWS_GRAPH and self.recorder.region.real:  # What its backward does may be something else the next time.
            self.recorder.region.past = None
        return self.made(func, args, kwargs)

    def _backward_of_method(
        self, loss: Any, gradient: Any = None, retain_graph: Any = None, create_graph: Any = False, inputs: Any = None
    ) -> Any:
        def run() -> None:
            torch.autograd.backward(loss, gradient, retain_graph, create_graph, inputs=inputs)

        plain = not retain_graph and not create_graph and inputs is None and is_untouched(torch.autograd.backward)
        return self.backward(run, loss, gradient, plain)

    def backward(self, run: Any, tensors: Any, gradients: Any, plain: bool) -> Any:
        """Take a backward, which `run` would make."""
        if self.recorder.paused or self.inside:
            return run()
        found = losses_of(tensors, gradients)
        if found is None:
            self.own_up()
            return self.made(run)
        return take_backward(self, run, *found, plain)

    def _follow(self, region: Any, edge: Edge, args: Any, kwargs: Any, call: Incoming) -> Any:  # noqa: C901
        recorder, flat, start = self.recorder, call.flat, region.node
        # Before anything else: who makes objects may have others finalized, and their finalizers may end the region.
        wrappers = [made.make() if made.turned is None else flat[made.turned] for made in edge.made]
        with recorder.lock:
            if recorder.region is not region or region.node is not start:
                return self.call(edge.func, (), args, kwargs)
            if edge.arrivals or edge.derived:
                arrive(region, edge, call.new(), flat)
            if edge.scalars:
                region.scalars.extend(call.floats if edge.moves else edge.scalars)
            if edge.dirty:
                rewrite(region, edge, flat)
            for made, wrapper in zip(edge.made, wrappers, strict=True):
                place(region, made, wrapper)
            region.node = edge.node
            if edge.graded:
                region.past.append(edge)
                # What is about to be returned is held by more than the debt.
                region.calls.append((edge, args, kwargs, flat, [*wrappers], recorder.epoch))
            recorder.outlived.nodes.extend(edge.casts)
            if edge.bumps:
                count_writes(region, [flat[k] for k in edge.bumps], edge)
            recorder.tally.followed += 1
            if edge.node.full:
                recorder.flush(edge.node.full)
        if edge.form == ONE:
            return wrappers[0]
        if edge.form == SELF:
            return flat[edge.structure.index]
        return None if edge.form == NOTHING else fill(edge.structure, wrappers, flat)

    def _settle(self) -> None:
        """Count for twins what was written; beside calls that are owed, that counts when these are made again."""
        if self.twins and not self.recorder.region.calls:
            settle(self.twins)

    @sites.makes_calls
    def made(self, func: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Have torch make a call."""
        keep((args, kwargs))
        recorder = self.recorder
        hook, inside, given, site = recorder.hook, self.inside, self.given, sites.call.site
        self._settle()
        try:  # Within, since an interrupt may come between any two lines.
            recorder.hook, self.inside, self.given, sites.call.site = None, inside + 1, (args, kwargs), sites.UNKNOWN
            return func(*args, **kwargs) if kwargs else func(*args)
        except RuntimeError as error:
            in_eagers_words(error)
            raise
        finally:
            recorder.hook, self.inside, self.given, sites.call.site = hook, inside, given, site

    def _make(self, func: Any, args: Any, kwargs: Any, key: Any, call: Incoming, modes: Any) -> Any:
        """Make a call for real and learn from it."""
        recorder, region = self.recorder, self.recorder.region
        flat = call.flat if key is not None else tensors_in((args, kwargs))
        graph, bare = func in REACHES_GRAPH, is_ungraded(func, args, kwargs)
        if graph:
            recorder.known.forget()
            note_gradients(func, region)
        graded = graph or (modes[0] and not bare and func not in DETACHES and any(t.requires_grad for t in flat))
        writes = may_write(func, args, kwargs)
        targets = tensors_in((args[:1] or kwargs, kwargs.get("out"))) if writes or graph else []
        if writes and modes[0]:
            attach_bases(recorder, targets)
        wrong = writes and self.spoils(targets)
        owes = writes and any(type(t) is LazyTensor and t.cell.owed is not None for t in flat)
        rewrites = before_call(self, modes, flat, targets)
        history = aside(self, flat, targets) if graded and not graph else None
        if (graded and history is None) or wrong or owes or (region.calls and may_cast(modes, flat)):
            self.own_up(flat)
        region.real = region.real or (graded and history is None)
        start, first, n_scalars, n_unrecorded = region.node, region.node.n_values, len(region.scalars), recorder.n_unrecorded
        learns = key is not None and not (graph or history is not None or wrong or self.part_of_update or rewrites is not None)
        self._settle()  # Or it would count as done by the call.
        before = Before(flat, region) if learns else None
        leaves = [t for t in flat if not t.requires_grad] if graded else []
        recorder.making = func in PRODUCTS
        try:
            result = self.made(torch.no_grad()(func) if bare else DOORS.get(func, func), args, kwargs)
        finally:
            recorder.making = False
            written(self, rewrites)
        known = set(map(id, flat))
        if not graded and any(t.requires_grad for t in tensors_in(result) if id(t) not in known):
            # A factory has made a leaf, or a function of others has built a graph.
            recorder.region.real, recorder.region.past = True, None
        if any(t.requires_grad for t in leaves):  # Written, with a history now; so have those that share its memory.
            recorder.known.forget()
        mark(history, flat, result)
        if history is not None or recorder.region is not region:
            return result
        edge = None
        learns = not need_casts(self, modes, flat, start) and learns and recorder.n_unrecorded == n_unrecorded
        if learns and not (graded and region.past is None):
            edge = self.learn(key, func, kwargs, Sight(call, modes, start, first, n_scalars, before, result))
            if edge is not None:
                self.know_by_heart(edge, key, args, kwargs)
        if graded and (edge is None or edge.graded):
            # As when it is followed: one that gave back what it was given has made no node.
            region.extend_past(edge)
        return result
