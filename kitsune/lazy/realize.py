"""Calls that were followed get their place in the autograd graph after all: they are made again, their values are not.

The wrappers that the program holds of them are handed to autograd as results, so that it is those that get a history.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch.autograd.graph import increment_version

from kitsune.ir import versions_kept
from kitsune.ir.graph import Result
from kitsune.lazy.casts import CAST, Weights, clear_casts, set_dtype, set_enabled, set_kept
from kitsune.lazy.cell import FORMER, GONE, Cell
from kitsune.lazy.cuts import recall_results
from kitsune.lazy.derived import views_of
from kitsune.lazy.edges import Edge, path_between
from kitsune.lazy.hands_off import PRODUCTS
from kitsune.lazy.rebuild import fill, tensors_in
from kitsune.lazy.spent_views import view_again
from kitsune.lazy.tensor import LazyTensor, wrap
from kitsune.lazy.trie import Node
from kitsune.lazy.turned import fresh, turn_back
from kitsune.lazy.write_counts import Recount, counted_before, is_owed


@dataclass(slots=True)
class Followed:
    """A call that was followed: with what, and what it gave."""

    edge: Edge
    args: Any
    kwargs: Any
    flat: Sequence[Any]
    made: Sequence[LazyTensor]
    epoch: int


FLAT, MADE = map([field.name for field in dataclasses.fields(Followed)].index, ("flat", "made"))
_number = attrgetter("id")
TWICE = (
    "Trying to backward through the graph a second time (or directly access saved tensors after they have already been freed). "
    "Saved intermediate values of the graph are freed when you call .backward() or autograd.grad(). Specify retain_graph=True if "
    "you need to backward through the graph a second time or if you need to access saved tensors after calling backward."
)


class Walk:
    """Takes the ops of calls that are made again: each is known, its results are there."""

    def __init__(self, region: Any) -> None:
        self.region = region
        self.path, self.start = list[Node](), region.node
        self.held, self.views = dict[int, LazyTensor](), list[Any]()
        self.weights = Weights(region)

    def begin(self, call: Followed) -> None:
        """From here on the ops of this call come."""
        path = path_between(call.edge.start, call.edge.node)
        assert path is not None
        self.path, self.start, self.views = path[::-1], call.edge.start, views_of(self.region, call.edge.derived)
        self.held = {made.born: tensor for made, tensor in zip(call.edge.made, call.made, strict=True) if made.turned is None}

    def take(self, row: Any, tensors: list[Any]) -> Any:
        """The results of an op."""
        if row.target is CAST and (node := self.weights.made_before(tensors[0], self.path, self.start)) is not None:
            # Autocast had kept the cast of a call that is not made again: one without a gradient, or whose backward has been.
            return self._result(row, self._is_done(node), *node.results[0])
        node = self.path.pop() if self.path else None
        # Of the weights that were cast when the call was followed, autocast may have kept the casts of another call.
        while (weight := self.weights.cast_by(node)) is not None and (row.target is not CAST or weight is not tensors[0]):
            node = self.path.pop() if self.path else None
        uncounted: bool = row.bumps
        # A view that was written by another name: autograd has taken it again before it was read, and does not have to now.
        while node is not None and self._is_beside(node, row):
            node = self.path.pop() if self.path else None
        if node is None or node.row is not row:
            expected = "none" if node is None or node.row is None else node.row.target
            raise RuntimeError(
                f"a call that Kitsune followed was to be made again for its gradient and did another operator, {row.target}, "
                f"instead of {expected}. This is a bug in Kitsune: please report it. KITSUNE_FOLLOW=0 runs the program without "
                "following."
            )
        done = self._is_done(node)
        for operand, _, after, _ in node.written:
            cell = self.region.cell(tensors[operand])
            # What the call has made for itself is new; others stand for what they are by now.
            cell.ref = max(cell.ref, after, key=_number)
            if done and cell.real is None:
                cell.real = self.region.kept.get(cell.ref.id)
        if uncounted:
            # What autograd does not count, who records it does.
            increment_version([tensors[operand] for operand, *_ in node.written])
        return fill(node.structure, [self._result(row, done, *result) for result in node.results], tensors)

    def comes(self, row: Any, base: Any) -> bool:
        """Is this view of a plain tensor the next op? It may have been taken beside the region."""
        cell, nodes = self.region.plain.get(id(base)), (n for n in reversed(self.path) if self.weights.cast_by(n) is None)
        node = None if cell is None else next((n for n in nodes if not self._is_beside(n, row)), None)
        return node is not None and node.row is row and node.op is not None and node.op.inputs[0].storage == cell.storage

    def wants(self) -> frozenset[int]:
        """What is to be kept if all that is pending is run now, for calls that are still to be made again."""
        region = self.region
        path = region.node.path(region.cut)
        made = {value.id for node in path for value, *_ in node.results}
        for node in path:
            made |= {after.id for _, _, after, _ in node.written}
            # What was written has another number since.
            made -= {before for _, before, _, _ in node.written}
        return frozenset(region.kept).union(made)

    def _is_beside(self, node: Node, row: Any) -> bool:
        if node.row is row or node.row is None or not node.row.is_view:
            return False
        return self.held.keys().isdisjoint(ref.id for ref, *_ in node.results)

    def _is_done(self, node: Node) -> bool:
        return self.region.cut is not None and node.depth <= self.region.cut.depth

    def _result(self, row: Any, done: bool, ref: Any, type_: Any, storage: int) -> LazyTensor:
        held = self.held.get(ref.id)
        if held is not None:
            # Autograd makes a copy of a view that somebody holds, and that one would get the history.
            return wrap(held.cell) if row.is_view else held
        cell = Cell(self.region, ref, type_, storage)
        if done:
            # It has run. What autograd does not save was not kept, and nobody will ask for it.
            cell.real = self.region.kept.get(ref.id)
            self.region.see([cell])
        else:
            self.region.produced.append(cell)
        return wrap(cell)


def realize(recorder: Any, region: Any) -> None:
    """Give every followed call of the region its place in the autograd graph."""
    # Who asks for the graph may be in inference mode, in which none is made: the calls were made outside of it.
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
    with outside:
        _realize(recorder, region)


def _realize(recorder: Any, region: Any) -> None:
    recall_results(region)
    calls, region.calls = [Followed(*debt) for debt in region.calls], []
    recount = Recount(region, [t for call in calls for t in call.made], recorder.lane.twins)
    owed = {id(t) for call in calls for t in call.made if is_owed(t)}
    turn_back(calls)
    walk = Walk(region)
    hook, recorder.hook, recorder.walk = recorder.hook, None, walk
    try:
        with torch._C.DisableTorchFunction(), recorder.above_autograd(), _modes(recorder) as adopt:
            for n, call in enumerate(calls):
                recount.before_call(n)
                adopt(call)
                walk.begin(call)
                recorder.making = call.edge.func in PRODUCTS
                for tensor in call.made:
                    tensor.cell.owed = tensor.cell.home = None
                # Writes to them are counted once more as they are made again.
                new = fresh(call.edge, call.made)
                torch._C._autograd._unsafe_set_version_counter(tuple(new), (0,) * len(new))
                for tensor in call.flat:
                    if tensor_is_spent(tensor):
                        attach_spent(recorder, tensor)
                with versions_kept(counted_before(call, owed)):
                    recount.replaced(hand_over(call.edge.func(*call.args, **(call.kwargs or {})), call))
    finally:
        recorder.walk, recorder.hook, recorder.making = None, hook, False
        recount.rest()
    region.real = True


def hand_over(result: Any, call: Followed) -> Iterator[tuple[LazyTensor, LazyTensor]]:
    """Let the wrappers that the program holds be the tensors that the call has returned; (now, before) of those replaced."""
    for made, held in zip(tensors_in(_results(result, call.edge.structure)), fresh(call.edge, call.made), strict=True):
        if made is held or not made.requires_grad:
            continue
        try:
            # One is new, the other has never been known to C++: nothing else refers to either.
            torch._C._swap_tensor_impl(held, made)
        except RuntimeError:
            Same.apply(made, held)
        else:
            yield held, made


def _results(result: Any, structure: Any) -> Any:
    """The part of a result that the call has made, in order."""
    if isinstance(structure, Result):
        return [result]
    if isinstance(structure, (list, tuple)):
        return [_results(part, form) for part, form in zip(result, structure, strict=True)]
    return []


class Same(torch.autograd.Function):
    """Gives a wrapper the history of another one that stands for the same value."""

    @staticmethod
    def forward(ctx: Any, made: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(held)
        return held

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad, None


def tensor_is_spent(tensor: Any) -> bool:
    """Is this a wrapper whose graph is used up?"""
    return type(tensor) is LazyTensor and bool(tensor.cell.spent)


class Gone(torch.autograd.Function):
    """The history of a wrapper whose graph is used up: it says so when it is asked for gradients of any of the leaves."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, wrapper: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(wrapper)
        return wrapper

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError(TWICE)


_base_of: Any = torch._C.TensorBase._base.__get__  # type: ignore[union-attr]
_anchor = torch.zeros((), requires_grad=True)


def attach_spent(recorder: Any, tensor: LazyTensor) -> None:
    """Let autograd know that the wrapper had a graph, which is gone."""
    leaves, tensor.cell.owed, tensor.cell.spent = tensor.cell.spent, None, FORMER
    # Of what a static function returns, its leaves are those that came in.
    leaves = leaves or recorder.leaves.living()
    hook, recorder.hook = recorder.hook, None
    try:
        with torch._C.DisableTorchFunction(), recorder.above_autograd(), torch.enable_grad():
            if not view_again(recorder, tensor, leaves):
                with versions_kept([tensor]):
                    Gone.apply(_anchor, tensor, *leaves)
                tensor.cell.spent = GONE
    finally:
        recorder.hook = hook


def attach_bases(recorder: Any, written: list[Any]) -> None:
    """Autograd lets nobody write a view that was taken without gradients of what has a history, also where that is used up."""
    for tensor in written:
        if tensor_is_spent(base := _base_of(tensor)):
            attach_spent(recorder, base)


def settle_spent(lane: Any) -> None:
    """Let autograd know which wrappers of a lane had a graph that is used up."""
    # Taken first: to attach one makes a graph, and whatever does that comes by here.
    spent, lane.spent = lane.spent, []
    for reference in spent:
        tensor = reference()
        if tensor is not None and tensor_is_spent(tensor):
            attach_spent(lane.recorder, tensor)


@contextlib.contextmanager
def _modes(recorder: Any) -> Iterator[Any]:
    """Brings back the grad mode and the autocast of each call, with the casts of weights that it shared with others."""
    device = recorder.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    are_kept = torch.is_autocast_cache_enabled()
    epoch = [recorder.epoch]

    def adopt(call: Followed) -> None:
        if epoch[0] != call.epoch:
            clear_casts()
        epoch[0] = call.epoch
        _, autocast, casts = call.edge.modes
        set_enabled(device, autocast is not None)
        if autocast is not None:
            set_dtype(device, autocast)
            set_kept(casts.are_kept)

    torch.autocast_increment_nesting()
    try:
        with torch.enable_grad():
            yield adopt
    finally:
        set_enabled(device, enabled)
        set_dtype(device, dtype)
        set_kept(are_kept)
        torch.autocast_decrement_nesting()
        # Also of a block that is open in another thread.
        if epoch[0] != recorder.epoch:
            clear_casts()
