"""What must hold for a known call to be made without Python: all that it works on is where and as it was."""

import operator
import weakref
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards

from kitsune.ir import Kind, TensorType, Value, storage_of, type_of
from kitsune.lazy import is_strided
from kitsune.static.asked import Asked
from kitsune.static.origins import real_of
from kitsune.static.places import Search, all_there, follow
from kitsune.static.record import Argument, Gradient, Outside, Part, Record, Run
from kitsune.static.surroundings import alike

# Not the attributes of torch.Tensor, which others may have replaced; a call in a loop over them costs 0.1 us per tensor.
_base: Any = torch._C.TensorBase
_data_ptr = _base.data_ptr
_offset = _base.storage_offset
_gradient = _base.grad.__get__
_hooks = _base._backward_hooks.__get__
_later_hooks = _base._post_accumulate_grad_hooks.__get__


class Guards:
    """Of one record. `call` is what it was recorded of, `roots` are the function and the objects that it was given."""

    def __init__(self, record: Record, call: Asked, roots: Sequence[Any]) -> None:
        self._surroundings = record.surroundings
        # Set when what it works on is not there any more, and will hardly come back.
        self.lost = False
        self.numbers = record.surroundings.numbers
        self._signs = [number != 0 for number in self.numbers]
        search = _search(record, roots)
        found = [(k, path, weakref.ref(thing)) for k, path, thing in search.found]
        self._in_place = all_there(found, record.paths, real_of)
        self._variables = search.variables
        self._guard_tensors(record)
        leaves = record.leaves
        self._leaves = [leaf.leaf.tensor for leaf in leaves if isinstance(leaf.leaf, Outside)]
        self._bare = [not leaf.had for leaf in leaves if isinstance(leaf.leaf, Outside)]
        self._argument_leaves = [(leaf.leaf.index, not leaf.had) for leaf in leaves if isinstance(leaf.leaf, Argument)]
        self._read_gradients = [(o.leaf, value.type) for o, value, _ in _inputs(record) if isinstance(o, Gradient)]
        # Where in its memory an argument begins matters only to some.
        self._offsets = [(k, _offset(call.reals[k])) for k in sorted(_placed_arguments(record))]

    def hold(self, roots: Sequence[Any], call: Asked) -> bool:
        """Is all as it was? Sets `lost` where tensors, modules or optimizers are others."""
        if not self._surroundings.in_place() or not self._in_place(roots):
            self.lost = True
            return False
        if not self._storages.isdisjoint(call.storages):
            return False
        return self._same_tensors() and self._surroundings.unchanged() and self._same_leaves(call) and self._same_options(roots)

    def relax(self, record: Record, roots: Sequence[Any]) -> None:
        """A call did the same: what has changed of attributes, variables and addresses does not matter to it."""
        self._guard_tensors(record)
        self._surroundings.relax(record.surroundings)
        self._variables = [v for v in self._variables if alike(follow(v[1], roots[v[0]]), v[2])]

    def _guard_tensors(self, record: Record) -> None:
        read = [origin for run in record.runs for _, origin in run.wiring or ()]
        wholes = [o.tensor for o in map(_whole, read) if isinstance(o, Outside)]
        known = {id(t): t for t in (*wholes, *record.outside()) if type(real_of(t)) is type(t) and t.layout is torch.strided}
        self._tensors = list(known.values())
        sizes: Any = [list(t.shape) for t in self._tensors]
        strides: Any = [list(t.stride()) for t in self._tensors]
        # In C++: type, dtype, device, shape, strides, requires_grad; 0.15 us per tensor.
        self._guards = TensorGuards(*self._tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._read = list({id(t): t for t in wholes}.values())
        self._addresses = list(map(_data_ptr, self._read))
        self._storages = {storage_of(t)._cdata for t in self._tensors}

    def _same_tensors(self) -> bool:
        if torch.is_grad_enabled():
            same = self._guards.check(*self._tensors)
        else:
            # Without it, no tensor would require a gradient.
            with torch.enable_grad():
                same = self._guards.check(*self._tensors)
        return same and list(map(_data_ptr, self._read)) == self._addresses

    def _same_leaves(self, call: Asked) -> bool:
        leaves = self._leaves
        if any(map(_hooks, leaves)) or any(map(_later_hooks, leaves)):
            return False
        if list(map(operator.is_, map(_gradient, leaves), repeat(None))) != self._bare:
            return False
        for k, bare in self._argument_leaves:
            leaf = call.tensors[k]
            if (leaf.grad is None) is not bare or leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
                return False
        for k, offset in self._offsets:
            if _offset(call.reals[k]) != offset:
                return False
        return not self._read_gradients or all(
            _is_like(_gradient(_tensor(leaf, call)), type_) for leaf, type_ in self._read_gradients
        )

    def _same_options(self, roots: Sequence[Any]) -> bool:
        numbers, constants = self._surroundings.options
        # SGD asks whether its weight decay is zero; other values are only passed on.
        if numbers is not self.numbers:
            if [number != 0 for number in numbers] != self._signs or not alike(constants, self._surroundings.constants):
                return False
            self.numbers = numbers
        return not self._variables or all(alike(follow(path, roots[k]), value) for k, path, value in self._variables)


def _is_like(gradient: Any, type_: TensorType) -> bool:
    if type(gradient) is not torch.Tensor or not is_strided(gradient) or gradient.requires_grad:
        return False
    found = type_of(gradient)
    return found is type_ or found.at_start() is type_


def _inputs(record: Record) -> Iterator[tuple[Any, Value, Run]]:
    """Each input of each region: where it came from, and what it is there."""
    for run in record.runs:
        values = {value.id: value for value in run.graph.inputs}
        yield from ((origin, values[number], run) for number, origin in run.wiring or ())


def _placed_arguments(record: Record) -> set[int]:
    """Arguments of which a region takes views, or that it knows by several tensors: those it knows by absolute places."""
    found: set[int] = set()
    seen: set[tuple[int, int]] = set()
    for origin, value, run in _inputs(record):
        whole = _whole(origin)
        if isinstance(whole, Argument):
            key = (whole.index, id(run))
            if key in seen or any(
                op.kind is Kind.VIEW and op.inputs and op.inputs[0].storage == value.storage for op in run.graph.ops
            ):
                found.add(whole.index)
            seen.add(key)
    return found


def _tensor(leaf: Any, call: Asked) -> Any:
    return leaf.tensor if isinstance(leaf, Outside) else call.tensors[leaf.index]


def _whole(origin: Any) -> Any:
    return origin.whole if isinstance(origin, Part) else origin


def _search(record: Record, roots: Sequence[Any]) -> Search:
    """Where the function has its outermost modules and its optimizers from."""
    wanted = {id(thing) for thing in record.surroundings.outermost()}
    return Search(list(roots), lambda thing: id(thing) in wanted).run(len(wanted))
