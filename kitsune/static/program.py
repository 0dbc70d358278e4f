"""A call that is known: when it may be made without Python, and how."""

from collections import Counter as Counts
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from kitsune.ir import Graph, TensorType, count_writes_to, lent_memory, slots_in
from kitsune.lazy import LazyTensor, attach_spent, count_steps
from kitsune.static.asked import Asked
from kitsune.static.foretelling import Foretelling
from kitsune.static.guards import Guards
from kitsune.static.record import KEPT, Argument, Gradient, Made, Outside, Part, Record, Wrapped, mapped
from kitsune.static.surroundings import alike

# The moving numbers of each region: the same tuples while they are the same, which is cheap to see.
Numbers = list[tuple[float, ...]]
# What is returned as the very tensor that it is.
_FOUND = (Argument, Outside, Gradient)
_DETACHES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
# A tensor over the same memory that autograd knows nothing of.
_alias = torch._C.TensorBase.data.__get__  # type: ignore[attr-defined]


class Program:
    """What a record says, ready to be done again. `function` is where the search for its modules begins.

    `needed` is how often it must be seen before Python is skipped.
    """

    def __init__(self, record: Record, function: Any, call: Asked, needed: int) -> None:
        self.record = record
        self._needed = needed
        self.guards = Guards(record, call, [function, *call.others])
        self.sights = 1
        # Has it been seen often enough to go without Python?
        self.ready = False
        # Calls without Python since the last one with it, and when checks will have had their share of the time.
        self.n_skipped, self.rests_until = 0, 0.0
        self._foretelling = Foretelling(record)
        self._foretold: tuple[Any, Numbers | None] = (None, None)
        # The short way to it, once it has been gone.
        self.shortcut: Any = None
        self._prepare(record)

    def see(self, record: Record, roots: list[Any]) -> None:
        """A call has done the same again."""
        self.sights += 1
        self.n_skipped = 0
        self._foretelling.see(record)
        self._foretold, self.shortcut = (None, None), None
        self.ready = self.sights >= self._needed and self._foretelling.unexplained is None
        self.guards.relax(record, roots)

    def foretells(self, record: Record) -> bool:
        """Are the moving numbers of a call those that follow from its hyperparameters?"""
        numbers = self._foretelling.of(record)
        return numbers is not None and alike(list(numbers), record.scalars)

    def numbers(self) -> "Numbers | None":
        """The moving numbers of the next call; None if what they come from has not been seen to move so far."""
        found = self._foretelling.next(self.guards.numbers)
        if found is not self._foretold[0]:
            self._foretold = found, None if found is None else self._by_region(tuple(found))
        return self._foretold[1]

    def _by_region(self, numbers: tuple[float, ...]) -> "Numbers":
        ends = list(accumulate([len(run.scalars) for run in self.record.runs], initial=0))
        return [numbers[begin:end] for begin, end in pairwise(ends)]

    def unexplained(self) -> str | None:
        """Why a number of it cannot be foretold."""
        position = self._foretelling.unexplained
        if position is None:
            return None
        return f"{self._reader(position)} takes a number that changes, and is none of its optimizer's hyperparameters"

    def surprise(self, record: Record) -> str | None:
        """The first number of a call that is another one than was foretold."""
        numbers = self._foretelling.of(record)
        for position, (a, b) in enumerate(zip(numbers or (), record.scalars, strict=False)):
            if not alike(a, b):
                return f"{self._reader(position)} takes another number than was foretold: {b} instead of {a}"
        return None

    def _reader(self, position: int) -> str:
        for run in self.record.runs:
            if position < len(run.scalars):
                op = next(op for op in run.graph.ops if any(s.index == position for s in slots_in((op.args, op.kwargs))))
                return f"{op.target} at {op.site}"
            position -= len(run.scalars)
        raise AssertionError("there are fewer numbers than that")

    def run(self, call: Asked, numbers: "Numbers", pipeline: Any, standing: list[Any] | None = None) -> Any:
        """Make the call, and return what it returns. `standing` has what replays its regions; None where nothing does."""
        skipped = _Call(self, call)
        for leaf in skipped.leaves(self.replaced):
            # Where nobody else holds it, a graph need not move it out of its way.
            leaf.grad = None
        for k, (graph, template, moving) in enumerate(self._steps):
            values = template.copy()
            for number, origin in moving:
                values[number] = skipped.tensor(origin)
            region = standing[k] if standing else None
            if self._twins[k]:
                for number, source in self._twins[k]:
                    values[number] = _twin(values[source])
            elif region is None or not pipeline.again(region, values, numbers[k]):
                if standing:
                    standing[k] = None
                pipeline.run(graph, values, list(numbers[k]))
            # Of what is not kept, a second replay of the same graph moves nothing out of its way.
            last = k == len(self._steps) - 1
            skipped.results.append(values if last else {number: values[number] for number in self._kept[k]})
        self.n_skipped += 1
        return skipped.end(pipeline.recorder)

    def standing(self, pipeline: Any) -> list[Any]:
        """What replays its regions while the guards hold, by which tensors from outside are where they are now."""
        sure = [[n for n, tensor in enumerate(template) if tensor is not None] for _, template, _ in self._steps]
        return [pipeline.standing(graph, template, at) for (graph, template, _), at in zip(self._steps, sure, strict=True)]

    def _prepare(self, record: Record) -> None:
        self._steps: list[tuple[Graph, list[Any], list[tuple[int, Any]]]] = []
        for run in record.runs:
            template: list[Any] = [None] * run.n_values
            moving = []
            for number, origin in run.wiring or ():
                if isinstance(origin, Outside):
                    template[number] = origin.tensor
                elif isinstance(origin, Part) and isinstance(origin.whole, Outside):
                    template[number] = _part(origin.whole.tensor, origin)
                else:
                    moving.append((number, origin))
            self._steps.append((run.graph, template, moving))
        self._twins = [_twins(run.graph) for run in record.runs]
        counted = {id(counter.tensor.tensor) for counter in record.counters}
        counted |= {id(tensor) for it in record.counted for tensor in it.tensors}
        bumps = [(o, n) for o, n in record.bumps if not (isinstance(o, Outside) and id(o.tensor) in counted)]
        self.bumped = _tensors([origin for origin, n in bumps for _ in range(n)])
        gradients = [leaf.now for leaf in record.leaves if isinstance(leaf.now, (Made, Part, Argument, Outside))]
        self.uses = Counts([*gradients, *_wrapped(record.returned)])
        # Gradients that are others afterwards, or none: most are those of parameters, and made by a region for nobody else.
        self.replaced = _tensors([leaf.leaf for leaf in record.leaves if leaf.had and leaf.now != KEPT])
        given = [leaf for leaf in record.leaves if leaf.now is not None and leaf.now != KEPT]
        self.plain = [
            (leaf.leaf.tensor, leaf.now.run, leaf.now.number)
            for leaf in given
            if isinstance(leaf.leaf, Outside) and isinstance(leaf.now, Made) and self.uses[leaf.now] == 1 and not leaf.version
        ]
        seen: dict[Wrapped, Returned] = {}

        def returned(tree: Any) -> Any:
            if not isinstance(tree.origin, Made):
                return seen.setdefault(tree, Returned(tree, None, False))
            graph = record.runs[tree.origin.run].graph
            value = next(v for v in graph.outputs if v.id == tree.origin.number)
            came = any(v.storage == value.storage for v in graph.inputs)
            is_new = not (came or tree.version or tree.graded is not None or self.uses[tree.origin] > 1)
            return seen.setdefault(tree, Returned(tree, value.type, is_new))

        self.returned = mapped(record.returned, Wrapped, returned)
        usual = {id(tensor) for tensor, _, _ in self.plain}
        self.given = [leaf for leaf in given if not (isinstance(leaf.leaf, Outside) and id(leaf.leaf.tensor) in usual)]
        inputs = [origin for run in record.runs for _, origin in run.wiring or ()]
        used = set(map(_whole, [*inputs, *gradients, *_wrapped(record.returned)]))
        self.gradients = {origin for origin in used if isinstance(origin, Gradient)}
        made = [origin for origin in used if isinstance(origin, Made)]
        self._kept = [sorted(o.number for o in made if o.run == k) for k in range(len(record.runs))]


class _Call:
    """One call without Python."""

    def __init__(self, program: Program, call: Asked) -> None:
        self._program, self._tensors = program, call.tensors
        self._reals = call.reals
        self._gradients = {g: self._leaf(g.leaf).grad for g in program.gradients} if program.gradients else {}
        # The values of each region, by number.
        self.results: list[Any] = []

    def end(self, recorder: Any) -> Any:
        """What Python would do with the results; returns what the call returns."""
        program = self._program
        if program.bumped[1]:
            count_writes_to(self.leaves(program.bumped))
        self._give_gradients()
        if program.record.counters:
            with torch.no_grad():
                for counter in program.record.counters:
                    counter.target(counter.tensor.tensor, *counter.args, **dict(counter.kwargs))
        for it in program.record.counted:
            count_steps(it.tensors)

        if type(program.returned) is Returned:
            return self._wrapped(program.returned, recorder)

        def built(leaf: Any) -> Any:
            if isinstance(leaf, Returned):
                found = made.get(leaf)
                if found is None:
                    found = made[leaf] = self._wrapped(leaf, recorder)
                return found
            return self._tensors[leaf.index] if isinstance(leaf, Argument) else self.tensor(leaf)

        made: dict[Returned, torch.Tensor] = {}
        return mapped(program.returned, (Returned, *_FOUND), built)

    def _give_gradients(self) -> None:
        for tensor, run, number in self._program.plain:
            tensor.grad = self.results[run][number]
        for leaf in self._program.given:
            gradient = self.tensor(leaf.now)
            if self._program.uses[leaf.now] > 1:
                gradient = _twin(gradient)
            if leaf.version:
                torch._C._autograd._unsafe_set_version_counter((gradient,), (leaf.version,))  # type: ignore[attr-defined]
            self._leaf(leaf.leaf).grad = gradient

    def tensor(self, origin: Any) -> torch.Tensor:
        """The tensor of an origin, in this call."""
        if isinstance(origin, Argument):
            return self._reals[origin.index]  # type: ignore[no-any-return]
        if isinstance(origin, Made):
            return self.results[origin.run][origin.number]  # type: ignore[no-any-return]
        if isinstance(origin, Outside):
            return origin.tensor
        if isinstance(origin, Gradient):
            return self._gradients[origin]  # type: ignore[no-any-return]
        return _part(self.tensor(origin.whole), origin)

    def leaves(self, known: tuple[bool, list[Any]]) -> list[Any]:
        outside, leaves = known
        return leaves if outside else [self._leaf(origin) for origin in leaves]

    def _leaf(self, origin: Any) -> Any:
        return origin.tensor if type(origin) is Outside else self._tensors[origin.index]

    def _wrapped(self, returned: "Returned", recorder: Any) -> torch.Tensor:
        tree, real = returned.wrapped, self.tensor(returned.wrapped.origin)
        if returned.is_new and lent_memory(real) is None and not torch.is_inference_mode_enabled():
            # Nobody else knows of it, and nobody will write it.
            return real
        wrapper: LazyTensor = recorder.settled(real, returned.type)
        if tree.version:
            torch._C._autograd._unsafe_set_version_counter((wrapper,), (tree.version,))  # type: ignore[attr-defined]
        if tree.graded is not None:
            attach_spent(recorder, wrapper)
        return wrapper


@dataclass(slots=True, eq=False)
class Returned:
    """A wrapper among what is returned; one object for each, however often it is. Its type, where that is known; and whether it
    is a new tensor that is returned once, nothing else, and as its region left it."""

    wrapped: Wrapped
    type: TensorType | None
    is_new: bool


def _tensors(origins: list[Any]) -> tuple[bool, list[Any]]:
    """Are they all from outside? Then their tensors, else they as they are."""
    outside = all(isinstance(origin, Outside) for origin in origins)
    return outside, [origin.tensor for origin in origins] if outside else origins


def _twins(graph: Graph) -> list[tuple[int, int]]:
    """Of a region that only detaches, such as a loss after the step has ended its region: what becomes a twin of what."""
    if any(op.target not in _DETACHES for op in graph.ops):
        return []
    return [(op.outputs[0].id, op.inputs[0].id) for op in graph.ops]


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor on the same memory, which moves with it."""
    twin: torch.Tensor = _alias(tensor)
    memory = lent_memory(tensor)
    if memory is not None:
        memory.adopt(twin)
    return twin


def _part(whole: torch.Tensor, part: Part) -> torch.Tensor:
    offset = torch._C.TensorBase.storage_offset(whole) + part.offset
    return (_alias(whole) if whole.requires_grad else whole).as_strided(part.shape, part.stride, offset)


def _whole(origin: Any) -> Any:
    return origin.whole if isinstance(origin, Part) else origin


def _wrapped(tree: Any) -> list[Any]:
    """The origins of the tensors in a return value."""
    found: list[Any] = []
    mapped(tree, Wrapped, lambda leaf: found.append(leaf.origin))
    mapped(tree, _FOUND, found.append)
    return found
