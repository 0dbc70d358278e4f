"""One op through aten: arguments bound, results stored in the expected layout, errors given the user's line."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from kitsune.ir import WITH_PLANS, Op, Result, Slot, TensorType, Value, type_of, versions_kept
from kitsune.runtime.plan_thread import key_of, plan_thread

_BOUND, _LATE = (Slot, tuple), frozenset({Slot, tuple, Value})
_INTS, _PLAIN = frozenset({int}), frozenset({Value, tuple, int})
_base, aten = torch._C.TensorBase, torch.ops.aten

# What makes the call of an op: `call`, or what takes less time.
Call = Callable[[Op, list[Any], list[float]], None]


def call(op: Op, values: list[Any], scalars: list[float]) -> None:
    """Make one call. `values` has its operands by value number and receives everything that it defines."""
    # The second step of a program is made of this: what most ops do not need is asked for once.
    args = [values[a.id] if type(a) is Value else bind(a, values, scalars) if type(a) in _BOUND else a for a in op.args]
    kwargs = {name: bind(a, values, scalars) for name, a in op.kwargs} if op.kwargs else {}
    try:
        if op.rewritten and _writes_a_list(op):
            with versions_kept(args[0]):
                result = _make(op.target, op, args, kwargs)
        elif op.grad_enabled is None:
            # What the overload itself calls, and nothing else: 0.3 us less for each of BERT's 2,600 calls of 5 us (CPU host).
            result = op.target._op(*args, **kwargs)
        else:
            result = _make(op.target, op, args, kwargs)
        if op.results:
            _store(op.structure, result, op, values)
    except Exception as error:
        _name_the_line(error, op)
        raise
    if op.rewritten:
        for before, after in op.rewritten:
            values[after.id] = values[before.id]


def call_of(op: Op) -> Call:
    """What makes the calls of an op where its grad mode is set: `call`, or what has been told all but the tensors.

    The second step of a program is made of these: of 2.3 ms that ResNet-18's 220 took beyond their kernels, 1.3 went (CPU host).
    """
    arguments, made = _arguments(op), _made(op)
    if arguments is None or len(made) != len(op.results) or (op.rewritten and _writes_a_list(op)):
        return call
    function, row, tensors, numbers, named = arguments
    if op.grad_enabled is not None and op.target._opname in WITH_PLANS:
        function = _handing_over(op)
    view = _methods.get(id(op.target))
    if view is not None and function is view and len(tensors) == 1:
        return _viewed(view, tensors[0][1], row[1:], made[0][1])
    rewritten = [(after.id, before.id) for before, after in op.rewritten] if op.rewritten else ()
    return _told(function, row, tensors, numbers, named, made, rewritten)


def _arguments(op: Op) -> tuple[Any, ...] | None:
    """What is called; its arguments by position, with the places of tensors and of moving numbers among them; those by name. None
    if something is inside of a list."""
    method = None if op.kwargs or type(op.structure) is not Result else _methods.get(id(op.target))
    row: list[Any] = [*op.args]
    tensors, numbers, named = [], [], {}
    for k, a in enumerate(row):
        cls = type(a)
        if cls is Value:
            tensors.append((k, a.id))
        elif cls is Slot:
            numbers.append((k, a.index))
        elif cls is tuple:
            types = {*map(type, a)}
            if not types.isdisjoint(_LATE):
                return None
            row[k], method = [*a], method if types <= _INTS else None
        if cls not in _PLAIN:
            method = None
    for name, a in op.kwargs:
        if type(a) in _LATE:
            return None
        named[name] = a
    return method or op.target._op, row, tensors, numbers, named


def _made(op: Op) -> list[tuple[Any, int, TensorType]]:
    """Where in what a call returns a new tensor is, None of the one that is all of it; its number, and what it is like. Of a list
    none: how long that is is looked at each time."""
    if type(op.structure) is Result:
        value = op.results[op.structure.index]
        return [(None, value.id, value.type)]
    leaves = enumerate(op.structure) if isinstance(op.structure, tuple) else ()
    found = [(k, op.results[leaf.index]) for k, leaf in leaves if type(leaf) is Result]
    return [(k, value.id, value.type) for k, value in found]


def _handing_over(op: Op) -> Callable[..., Any]:
    key, device = key_of(op), op.inputs[0].type.device

    def handed_over(*args: Any, **kwargs: Any) -> Any:
        if plan_thread.has(key):
            return plan_thread.call(op.target, args, kwargs, device)
        return op.target._op(*args, **kwargs)

    return handed_over


def _told(function: Any, row: Any, tensors: Any, numbers: Any, named: Any, made: Any, rewritten: Any) -> Call:
    def told(op: Op, values: list[Any], scalars: list[float]) -> None:
        args = row.copy()
        for k, number in tensors:
            args[k] = values[number]
        for k, index in numbers:
            args[k] = scalars[index]
        try:
            returned = function(*args, **named)
            for k, number, expected in made:
                result = returned if k is None else returned[k]
                if result.shape != expected.shape or result.stride() != expected.stride or result.dtype is not expected.dtype:
                    result = _conform(result, expected, op)
                values[number] = result
        except Exception as error:
            _name_the_line(error, op)
            raise
        for after, before in rewritten:
            values[after] = values[before]

    return told


def _viewed(method: Callable[..., Any], source: int, rest: list[Any], number: int) -> Call:
    """Of a view alone: what it is like follows from its operand, which was looked at when it was made. These are 1,100 of BERT's
    2,600 calls, and take half a microsecond less each (CPU host)."""

    def viewed(op: Op, values: list[Any], scalars: list[float]) -> None:
        try:
            values[number] = method(values[source], *rest)
        except Exception as error:
            _name_the_line(error, op)
            raise

    return viewed


# By the ids of overloads, methods of the first operand with nothing but numbers beside it: one takes torch 0.5 us to find and
# call where the overload takes 1.1 (CPU host), and a third of BERT's operators are these.
_methods: dict[int, Callable[..., Any]] = {
    id(overload): method
    for overload, method in (
        (aten.expand.default, _base.expand),
        (aten.permute.default, _base.permute),
        (aten.select.int, _base.select),
        (aten.t.default, _base.t),
        (aten.transpose.int, _base.transpose),
        (aten.unsqueeze.default, _base.unsqueeze),
        (aten.view.default, _base.view),
    )
}


def try_out(op: Op, values: dict[int, Any]) -> None:
    """Make one call for nothing: what it returns is dropped, whatever that is."""
    kwargs = {name: bind(a, values, []) for name, a in op.kwargs}
    _make(op.target, op, [bind(a, values, []) for a in op.args], kwargs)


def call_into(
    op: Op, target: OpOverload, names: Sequence[str], memory: Sequence[torch.Tensor], values: list[Any], scalars: list[float]
) -> None:
    """The same by the op's out= form `target`: result k goes into `memory[k]`, which is argument `names[k]`."""
    args = [bind(a, values, scalars) for a in op.args]
    kwargs = {name: bind(a, values, scalars) for name, a in op.kwargs}
    kwargs.update(zip(names, memory, strict=True))
    try:
        _make(target, op, args, kwargs)
    except Exception as error:
        _name_the_line(error, op)
        raise
    for value, tensor in zip(op.results, memory, strict=True):
        values[value.id] = tensor


def bind(argument: Any, values: list[Any] | dict[int, Any], scalars: list[float]) -> Any:
    """What an argument of an op stands for in this run."""
    cls = type(argument)
    if cls is Value:
        return values[argument.id]
    if cls is Slot:
        return scalars[argument.index]
    if cls is tuple:
        # A value or a constant needs no call, and most arguments are one.
        return [values[a.id] if type(a) is Value else bind(a, values, scalars) if type(a) in _BOUND else a for a in argument]
    return argument


def _writes_a_list(op: Op) -> bool:
    return op.target._opname.startswith("_foreach_")


def _make(target: OpOverload, op: Op, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if op.grad_enabled is None:
        return target(*args, **kwargs)
    with torch.set_grad_enabled(op.grad_enabled):
        if plan_thread.knows(op):
            return plan_thread.call(target, args, kwargs, op.inputs[0].type.device)
        return target(*args, **kwargs)


def _store(structure: Any, result: Any, op: Op, values: list[Any]) -> None:
    if type(structure) is Result:
        value = op.results[structure.index]
        expected = value.type
        if result.shape != expected.shape or result.stride() != expected.stride or result.dtype is not expected.dtype:
            result = _conform(result, expected, op)
        values[value.id] = result
    elif isinstance(structure, (list, tuple)):
        for part, leaf in zip(structure, result, strict=True):
            _store(part, leaf, op, values)


def _conform(result: torch.Tensor, expected: TensorType, op: Op) -> torch.Tensor:
    """A result in another layout than the program was told is copied into that layout; any other difference is an error."""
    difference = (
        f"{op.target} at {op.site} returned {type_of(result)} with strides {result.stride()} where {expected} with strides "
    )
    difference += f"{expected.stride} was expected. This is a bug in Kitsune: please report it."
    if result.shape != expected.shape or result.dtype is not expected.dtype:
        raise RuntimeError(f"{difference} KITSUNE=0 runs the program without Kitsune.")
    warnings.warn(difference, RuntimeWarning, stacklevel=2)
    laid_out = torch.empty_strided(expected.shape, expected.stride, dtype=expected.dtype, device=expected.device)
    return laid_out.copy_(result)


def _name_the_line(error: Exception, op: Op) -> None:
    note = f"while running {op.target}, recorded by Kitsune at {op.site}"
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
