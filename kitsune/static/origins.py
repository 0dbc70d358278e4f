"""Says of a tensor where a static function's call has it from, or could have it from in the next call."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from kitsune.ir import Graph, reads_slots, type_of
from kitsune.lazy import LazyTensor, serial_of
from kitsune.static.places import Path, Search
from kitsune.static.record import Argument, Gradient, Made, Origin, Outside, Part, Wrapped, mapped
from kitsune.static.surroundings import Surroundings

_offset: Any = torch._C.TensorBase.storage_offset
_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


class Unclear(Exception):
    """Says in a sentence why a call cannot do without Python."""


def place_of(tensor: Any) -> tuple[Any, ...]:
    """The memory that a tensor shows, and how."""
    return serial_of(tensor), _offset(tensor), tensor.shape, tensor.stride(), tensor.dtype


def real_of(tensor: Any) -> Any:
    """The tensor that has the memory; None if there is none yet."""
    return tensor.cell.real if type(tensor) is LazyTensor else tensor


def version_of(tensor: Any) -> int:
    """How often autograd has counted a write."""
    return 0 if tensor.is_inference() else int(tensor._version)


def leaves_in(tensors: Iterable[Any]) -> list[Any]:
    """Those that collect gradients, each once."""
    return list({id(t): t for t in tensors if t.requires_grad and t.is_leaf}.values())


def is_constant(graph: Graph, number: int) -> bool:
    """Does a value follow from none of the region's inputs, moving numbers and random numbers?"""
    varying = {value.storage for value in graph.inputs}
    for op in graph.ops:
        if op.effects.random or reads_slots(op) or any(value.storage in varying for value in op.inputs):
            varying.update(value.storage for value in op.outputs)
    return all(value.storage not in varying for value in graph.outputs if value.id == number)


def _constant(leaf: Any) -> Any:
    if type(leaf) not in _SIMPLE:
        raise Unclear(f"it returns a {type(leaf).__name__}; let it return tensors, numbers, or tuples and dicts of them")
    return leaf


class Results:
    """What the regions of a call have made so far."""

    def __init__(self) -> None:
        self.at: dict[Any, Made] = {}
        # By storage: its first result and that one's offset.
        self.wholes: dict[int, tuple[Made, int, torch.dtype]] = {}
        # Storages that came from elsewhere: what a region returns on one of them is a view of what came.
        self.foreign: set[int] = set()

    def add(self, tensor: Any, made: Made) -> None:
        """A region has returned this."""
        serial = serial_of(tensor)
        if serial not in self.foreign:
            self.at.setdefault(place_of(tensor), made)
            self.wholes.setdefault(serial, (made, _offset(tensor), tensor.dtype))


class Origins:
    """Of the tensors of one call. `gradients` has those that the leaves had when it began, as weak references."""

    def __init__(
        self,
        arguments: Sequence[Any],
        gradients: Iterable[tuple[Any, "weakref.ref[torch.Tensor]"]],
        results: Results,
        surroundings: Surroundings,
        roots: list[Any],
    ) -> None:
        self._passed = {id(t): Argument(k) for k, t in reversed(list(enumerate(arguments)))}
        self._results, self._roots = results, roots
        self._exact: dict[int, tuple[Any, Any]] = {}
        # By storage: what a view may be a view of.
        self._wholes: dict[int, tuple[Any, Any]] = {}
        # Where loose tensors were found: the number of the root, the path, and the tensor.
        self.paths: list[tuple[int, Path, Any]] = []
        for k, t in enumerate(arguments):
            self._add(Argument(k), real_of(t))
        for t in surroundings.tensors():
            self._add(Outside(t), t)
        self._gradients = [(leaf, gradient) for leaf, reference in gradients if (gradient := reference()) is not None]
        self._add_gradients()

    def look_for(self, tensors: Iterable[Any]) -> None:
        """Look for what is no argument, and in no module or optimizer, among the variables of the function."""
        of_loose_leaves = {id(gradient) for _, gradient in self._gradients}
        loose = {
            id(t): t
            for t in tensors
            if id(t) not in self._exact and id(t) not in of_loose_leaves and serial_of(t) not in self._wholes
        }
        wanted = {serial_of(t) for t in loose.values()} - self._results.wholes.keys()
        if not wanted:
            return

        def is_wanted(thing: Any) -> bool:
            real: Any = real_of(thing) if isinstance(thing, torch.Tensor) else None
            plain = type(real) in (torch.Tensor, torch.nn.Parameter) and real.layout is torch.strided
            return plain and (id(real) in loose or serial_of(real) in wanted)

        for k, path, thing in Search(self._roots, is_wanted).run(len(wanted)).found:
            real = real_of(thing)
            if serial_of(real) not in self._wholes or id(real) in loose:
                self._add(Outside(real), real)
                self.paths.append((k, path, real))
        self._add_gradients()

    def of(self, tensor: Any) -> Origin:
        """Where a tensor with memory came from; raises Unclear."""
        # First: a replay may hand out the tensor again that was a gradient before and that nobody holds any more.
        made = self._results.at.get(place_of(tensor))
        if made is not None:
            return made
        exact = self._exact.get(id(tensor))
        if exact is not None:
            return exact[0]
        serial = serial_of(tensor)
        if serial in self._results.wholes:
            whole, start, dtype = self._results.wholes[serial]
        elif serial in self._wholes:
            whole, of = self._wholes[serial]
            start, dtype = _offset(of), of.dtype
        else:
            raise Unclear(
                f"it reads a tensor, {type_of(tensor)}, that is no argument and was found in no module, optimizer or variable"
            )
        if isinstance(whole, Gradient):
            raise Unclear("it reads a part of a gradient that was there before")
        if dtype is not tensor.dtype or tensor.is_conj() or tensor.is_neg():
            raise Unclear(f"it reads a tensor, {type_of(tensor)}, as another dtype than the one that it has outside")
        return Part(whole, tuple(tensor.shape), tuple(tensor.stride()), _offset(tensor) - start)

    def outside(self, tensor: Any) -> Outside:
        """The same for a tensor that has to be one from outside as it is."""
        origin = self.of(tensor)
        if not isinstance(origin, Outside):
            raise Unclear(f"it writes a counter, {type_of(tensor)}, beside the recorded operators")
        return origin

    def tree(self, returned: Any) -> Any:
        """A return value with origins for its tensors."""
        return mapped(returned, torch.Tensor, self._returned, _constant)

    def _returned(self, tensor: Any) -> Any:
        if id(tensor) in self._passed:
            return self._passed[id(tensor)]
        if type(tensor) is not LazyTensor:
            exact = self._exact.get(id(tensor))
            if exact is not None:
                return exact[0]
        real = real_of(tensor)
        if real is None or type(real) not in (torch.Tensor, torch.nn.Parameter):
            raise Unclear("it returns a tensor that was not computed, or one of another library")
        graded = None
        if tensor.requires_grad:
            cell = tensor.cell if type(tensor) is LazyTensor else None
            if cell is None or cell.owed is None or not cell.spent:
                raise Unclear("it returns a tensor that still has its autograd graph; let it return `.detach()` of that")
            graded = cell.owed.graded
        return Wrapped(self.of(real), version_of(tensor), graded)

    def _add_gradients(self) -> None:
        for leaf, gradient in self._gradients:
            origin = self._exact.get(id(leaf), (None, None))[0]
            if isinstance(origin, (Argument, Outside)):
                self._add(Gradient(origin), gradient)

    def _add(self, origin: Any, tensor: Any) -> None:
        self._exact.setdefault(id(tensor), (origin, tensor))
        self._wholes.setdefault(serial_of(tensor), (origin, tensor))
