"""What is learned from calls that are made for real: by the next time they may be followed."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kitsune.lazy.call_keys import with_floats
from kitsune.lazy.casts import are_kept_casts, kept_casts
from kitsune.lazy.cell import serial_of
from kitsune.lazy.cuts import Absent
from kitsune.lazy.derived import derived_of
from kitsune.lazy.edges import Edge, Incoming, arrivals_of, born, cell_in, path_between, viewed_operands
from kitsune.lazy.hands_off import LIKE_ANOTHER, READS_NO_NUMBERS, may_write
from kitsune.lazy.matcher_writer import example_of
from kitsune.lazy.matchers import either, matcher_for
from kitsune.lazy.node_hooks import NodeHooks
from kitsune.lazy.realize import Followed
from kitsune.lazy.rebuild import tensors_in
from kitsune.lazy.recording import PLAIN
from kitsune.lazy.region import is_strided
from kitsune.lazy.returned import Returned
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import NOTHING, SELF, Node
from kitsune.lazy.turned import turned_by
from kitsune.lazy.twins import Twin

# Matchers are written in the background by so many.
MANY = 16


@dataclass(slots=True)
class Sight:
    """A call that was made: what it brought, under what, where the region was, what was known of its operands, its result."""

    call: Incoming
    modes: Any
    start: Node
    first: int
    n_scalars: int
    before: Any
    result: Any


class Learner:
    """Learns from the calls of one accelerating thread."""

    # Is a default device kept from what its code asks of tensors?
    is_shielded = False

    def __init__(self, recorder: Any) -> None:
        self.recorder = recorder
        # By function and names of its keywords: do its floats become scalars of its op as they are? Proven once it was seen
        # with different ones.
        self.moves: dict[Any, bool] = {}
        self.proven: set[Any] = set()
        # How often in a row an optimizer's function could not be learned.
        self.failures: dict[Any, int] = {}
        # Have weights been written in an autocast block that went on with them? See `casts.py`.
        self.outlive_writes = False
        # Views that have got their place in the graph, whose count of writes what was detached before does not share.
        self.twins: list[Twin] = []
        self.hooked = NodeHooks()
        # Of matchers to be written: the edge, the key of its call, what its arguments are like, and what says if its floats move.
        self.unwritten: deque[tuple[Any, ...]] = deque()
        # Those that the background has written: each with its edge.
        self._written: deque[tuple[Any, Edge]] = deque()
        # Has them written in the background, if there is one.
        self.ask_to_write: Callable[[], None] | None = None

    def enter(self) -> bool:
        """See this thread's calls; the pipeline's mode has it, and what is below."""
        raise NotImplementedError

    def leave(self) -> bool:
        """See them no more; False if none was seen."""
        raise NotImplementedError

    def forget(self) -> None:
        """Forget what is known of functions, wherever they are called."""
        self.moves.clear()
        self.proven.clear()
        self.failures.clear()
        self.unwritten.clear()
        self._written.clear()
        self.outlive_writes = False

    def learn(self, key: Any, func: Any, kwargs: Any, sight: Sight) -> Edge | None:
        """Note what a call did that was made for real; returns what is known of it."""
        call, start = sight.call, sight.start
        edge = self._edge(func, kwargs, sight)
        if call.floats:
            name = (func, *kwargs)
            if edge is not None and not (edge.moves and self.moves.setdefault(name, True)):
                self.moves[name] = False
            key = with_floats(key, call.floats, self.moves.get(name, False))
            known = start.calls.get(key)
            if edge is not None and known is not None and known.moves and known.floats != edge.floats and known.same(edge):
                self.proven.add(name)
        return self.remember(start, key, edge)

    def spoils(self, written: list[Any]) -> bool:
        """Does a call that autograd does not know yet know memory of these? Its backward is to say that they changed."""
        region = self.recorder.region
        if not region.calls:
            return False
        region.unfold()
        calls = [Followed(*debt) for debt in region.calls]
        # A backward may need what a call was given and what it returned.
        known = [t for call in calls for t in (*call.flat, *call.made)]
        read = {cell.storage for t in known if (cell := t.cell if type(t) is Absent else cell_in(t, region)) is not None}
        read.update(view.storage for call in calls for view in call.edge.derived)
        return any(_storage_in(t, region) in read for t in written)

    def remember(self, start: Any, key: Any, edge: Edge | None) -> Edge | None:
        """Note what a call did; returns what is known of it by now."""
        known: Edge | None = start.calls.get(key)
        if edge is None or (known is not None and not known.same(edge)):
            # Something else than last time. A matcher of it may be being written.
            with self.recorder.lock:
                if start.calls.pop(key, None) is not None:
                    known.forgotten = True  # type: ignore[union-attr]
                start.matchers.clear()
            known = None
        if edge is None:
            return None
        if known is None:
            start.calls[key] = known = edge
        known.floats = edge.floats
        known.follows = known.follows or edge.node.known or edge.node is start
        return known

    def made(self, func: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Have torch make a call; the call lane does."""
        raise NotImplementedError

    def made_anew(self, edge: Edge, key: Any, args: Any, kwargs: Any) -> Any:
        """Make a call of which nothing could be followed."""
        recorder, region = self.recorder, self.recorder.region
        result = self.made(edge.func, args, kwargs)
        if recorder.region is region and region.node is not edge.node:
            # What it did at first sight was not recorded yet: the next time it is learned.
            self.remember(edge.start, key, None)
        return result

    def know_by_heart(self, edge: Edge, key: Any, args: Any, kwargs: Any) -> None:
        """An edge is to have a matcher, which any floats may come with if they were proven to move."""
        name = (edge.func, *kwargs)
        free = edge.moves and name in self.proven
        if edge.free_matcher is free:
            return
        edge.free_matcher = free
        if edge.follows:
            examples = [*map(example_of, args)], {name: example_of(a) for name, a in kwargs.items()}
            self.unwritten.append((edge, key, *examples, self.moves if free else None))
            if len(self.unwritten) == MANY and self.ask_to_write is not None:
                self.ask_to_write()

    def write_matchers(self) -> None:
        """Have all matchers of the region's calls, which the next one needs: it has ended."""
        self._write(self.take_by)
        while self._written:
            self.take_by(*self._written.popleft())

    def write_ahead(self, breathe: Callable[[], None]) -> None:
        """Write them before that, in the background, while the program waits for something else; `breathe` is called behind each.

        They are taken when the region ends. To take one here needs the recorder's lock, which is held while an operator runs:
        the program's next operator would wait for this thread, which waits for Python's lock, once for each matcher.
        """

        def keep(matcher: Any, edge: Edge) -> None:
            self._written.append((matcher, edge))
            breathe()

        self._write(keep)

    def _write(self, then: Callable[[Any, Edge], None]) -> None:
        while self.unwritten:
            try:
                edge, *known = self.unwritten.popleft()
            except IndexError:  # another thread has taken the last one
                return
            if (matcher := matcher_for(edge, *known)) is not None:
                then(matcher, edge)

    def take_by(self, matcher: Any, edge: Edge) -> None:
        """From now on a matcher takes the calls of an edge, if these are still known."""
        with self.recorder.lock:
            if not edge.forgotten:
                matchers, func = edge.start.matchers, edge.func
                # Two calls at one place: a GAN's real and false batch. More are left to their keys.
                matchers[func] = either(matcher, matchers[func]) if func in matchers else matcher

    def _edge(self, func: Any, kwargs: Any, sight: Sight) -> Edge | None:
        region, call, flat = self.recorder.region, sight.call, sight.call.flat
        path = path_between(sight.start, region.node)
        if path is None:
            return None
        turned = turned_by(sight.before.turned(), flat, sight.start, region)
        returned = Returned(sight.result, flat, region, sight.first, turned)
        gives_back = returned.fits and returned.form == SELF
        if not path and _is_made_anew(func, kwargs, sight, gives_back):
            return _plain_edge(func, sight, region.node)
        # Without an op, a call may give back what it was given: `contiguous()`, a dropout in evaluation.
        if not path and not gives_back:
            return None
        arrivals, lacking = arrivals_of(path, [tensor for _, tensor in call.new()], region)
        derived = derived_of(lacking, path, dict(enumerate(flat)), region) if lacking else ()
        written = sight.before.written()
        if derived is None or written is None or not returned.fits:
            return None
        beside = [] if not path or func in READS_NO_NUMBERS else sight.before.read_beside(path, derived)
        if not are_kept_casts(beside, path, sight.start, sight.modes[2]):
            return None
        rewrites, bumps = written
        if bumps and not returned.graded:
            plain = {cell.storage for cell in region.plain.values()}
            if any(_has_history(t) and _storage_in(t, region) in plain for t in (flat[k] for k in bumps)):
                # A view of a parameter: it shares its count of writes with that once autograd knows of it, and not before.
                return None
        for made in returned.made:
            made.born = born(path, made.ref)
        scalars = tuple(region.scalars[sight.n_scalars :])
        dirty = frozenset(storage for node in path for *_, storage in node.written)
        storages = {cell.storage for t in flat if (cell := cell_in(t, region)) is not None}
        if any(made.storage in storages and made.graded is None for made in returned.made):
            # A view shares its base's count of writes, which only autograd's own kernels can bring about.
            return None if returned.graded or dirty else _plain_edge(func, sight, region.node)
        return Edge(
            start=sight.start,
            func=func,
            modes=sight.modes,
            node=region.node,
            arrivals=arrivals,
            rewrites=rewrites,
            dirty=dirty,
            bumps=bumps,
            scalars=scalars,
            moves=len(path) == 1 and bool(scalars) and list(scalars) == call.floats and _in_order(kwargs),
            structure=returned.structure,
            form=returned.form,
            made=(*returned.made, *(turned or ())),
            # Who writes to a tensor with a history, maybe through a view of it, gets a place in that history.
            graded=returned.graded or (torch.is_grad_enabled() and bool(dirty) and any(t.requires_grad for t in flat)),
            floats=list(call.floats),
            begins=viewed_operands(path, flat, region),
            casts=kept_casts(kwargs, path, flat, region, sight.modes),
            derived=derived,
        )


def _storage_in(tensor: Any, region: Any) -> Any:
    cell = cell_in(tensor, region)
    if cell is not None:
        return cell.storage
    real: Any = tensor.cell.real if type(tensor) is LazyTensor else tensor
    return region.storages.get(serial_of(real)) if type(real) in PLAIN and is_strided(real) else None


def _has_history(tensor: Any) -> bool:
    return type(tensor) is LazyTensor and tensor.requires_grad


def _in_order(kwargs: Any) -> bool:
    # Keywords come in the order in which the user wrote them, the op's scalars in that of its schema.
    return sum(type(a) is float for a in kwargs.values()) < 2


def _is_made_anew(func: Any, kwargs: Any, sight: Sight, gives_back: bool) -> bool:
    """Is a call without an op, which has to do with no history, made each time?"""
    flat = sight.call.flat
    read = flat[:1] if func in LIKE_ANOTHER else flat
    if any(_has_history(t) for t in (*read, *tensors_in(sight.result))):
        return False
    # What is no result, as a batch that is on its device already, may be another tensor the next time. And who gives back what
    # was written may have moved its strides alone: `h.t_()`.
    return not gives_back or may_write(func, (), kwargs) or not all(type(t) is LazyTensor for t in flat)


def _plain_edge(func: Any, sight: Sight, node: Node) -> Edge:
    nothing = frozenset[int]()
    edge = Edge(sight.start, func, sight.modes, node, (), (), nothing, (), (), False, None, NOTHING, (), False, plain=True)
    # By which it is told from others, as any call.
    edge.floats = list(sight.call.floats)
    return edge
