"""Graphs as JSON text and back: the corpus of recorded steps, and what a bug report carries."""

import json
from collections.abc import Callable
from typing import Any

import torch

from kitsune.ir.graph import Effects, Graph, Kind, Op, Operand, Result, Slot, Value, values_in
from kitsune.ir.tensor_type import TensorType, tensor_type


def _of_torch(text: str) -> Any:
    try:
        return getattr(torch, text.removeprefix("torch."))
    except AttributeError:
        raise ValueError(f"this version of torch has no {text}") from None


# Constants that JSON has no word for, by the name of their type.
SPELL: dict[type, tuple[str, Callable[[Any], Any]]] = {
    torch.dtype: ("dtype", _of_torch),
    torch.layout: ("layout", _of_torch),
    torch.memory_format: ("format", _of_torch),
    torch.device: ("device", torch.device),
    complex: ("complex", complex),
}
READ = dict(SPELL.values())


def dump_graph(graph: Graph) -> str:
    """One line of JSON for the types, one for each op."""
    types: dict[TensorType, int] = {}
    values = [_spell_value(v, types) for v in graph.inputs]
    ops = [_spell_op(op, types) for op in graph.ops]
    outputs = [v.id for v in graph.outputs]
    awaited = {"awaited": graph.awaited} if graph.awaited else {}
    lines = [
        json.dumps({"types": [_spell_type(t) for t in types], "inputs": values, "outputs": outputs, **awaited}),
        *(json.dumps(op) for op in ops),
    ]
    return "\n".join(lines) + "\n"


def load_graph(text: str) -> Graph:
    """The Graph that `dump_graph` wrote. Raises ValueError if an operator or a dtype is unknown to this version of torch."""
    head, *rows = (json.loads(line) for line in text.splitlines())
    types = [_read_type(t) for t in head["types"]]
    values: dict[int, Value] = {}

    def define(entry: list[int]) -> Value:
        number, type_, storage, version = entry
        values[number] = Value(number, types[type_], storage, version)
        return values[number]

    inputs = tuple(define(entry) for entry in head["inputs"])
    ops = tuple(_read_op(row, values, define) for row in rows)
    return Graph(inputs, ops, tuple(values[number] for number in head["outputs"]), tuple(head.get("awaited", ())))


def _spell_value(value: Value, types: dict[TensorType, int]) -> list[int]:
    return [value.id, types.setdefault(value.type, len(types)), value.storage, value.version]


def _spell_op(op: Op, types: dict[TensorType, int]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "op": str(op.target.name()),  # type: ignore[no-untyped-call]
        "kind": op.kind.name,
        "args": _spell(op.args)["()"],
    }
    row["kwargs"] = [[name, _spell(a)] for name, a in op.kwargs]
    row["results"] = [_spell_value(v, types) for v in op.results]
    row["rewritten"] = [[before.id, _spell_value(after, types)] for before, after in op.rewritten]
    row["returns"] = _spell(op.structure)
    if op.effects.random:
        row["random"] = True
    if op.grad_enabled is not None:
        row["grad"] = op.grad_enabled
    return row


def _read_op(row: dict[str, Any], values: dict[int, Value], define: Callable[[list[int]], Value]) -> Op:
    args = tuple(_read(a, values) for a in row["args"])
    kwargs = tuple((name, _read(a, values)) for name, a in row["kwargs"])
    inputs = tuple(values_in((args, kwargs)))
    results = tuple(define(entry) for entry in row["results"])
    rewritten = tuple((values[before], define(after)) for before, after in row["rewritten"])
    return Op(
        target=overload(row["op"]),
        kind=Kind[row["kind"]],
        args=args,
        kwargs=kwargs,
        inputs=inputs,
        structure=_read(row["returns"], values),
        results=results,
        rewritten=rewritten,
        effects=Effects(tuple(after.storage for _, after in rewritten), row.get("random", False)),
        grad_enabled=row.get("grad"),
    )


def overload(name: str) -> Any:
    """The operator of this name. Raises ValueError if there is none."""
    namespace, _, rest = name.partition("::")
    packet, _, which = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), which or "default")
    except AttributeError:
        raise ValueError(f"this version of torch has no operator {name}") from None


def _spell(a: Any) -> Any:
    if isinstance(a, Value):
        return {"$": a.id}
    if isinstance(a, Slot):
        return {"%": a.index}
    if isinstance(a, Result):
        return {"result": a.index}
    if isinstance(a, Operand):
        return {"operand": a.index}
    if isinstance(a, tuple):
        return {"()": [_spell(x) for x in a]}
    if isinstance(a, list):
        return [_spell(x) for x in a]
    if type(a) in SPELL:
        return {SPELL[type(a)][0]: str(a)}
    if isinstance(a, float):
        return {"float": a.hex()}
    return a


def _read(a: Any, values: dict[int, Value]) -> Any:
    if isinstance(a, list):
        return [_read(x, values) for x in a]
    if not isinstance(a, dict):
        return a
    ((word, content),) = a.items()
    if word == "$":
        return values[content]
    if word == "()":
        return tuple(_read(x, values) for x in content)
    if word == "float":
        return float.fromhex(content)
    nouns: dict[str, Callable[[Any], Any]] = {"%": Slot, "result": Result, "operand": Operand}
    return (nouns.get(word) or READ[word])(content)


def _spell_type(t: TensorType) -> list[Any]:
    return [str(t.dtype), list(t.shape), list(t.stride), t.offset, str(t.device), t.conj, t.neg]


def _read_type(row: list[Any]) -> TensorType:
    dtype, shape, stride, offset, device, conj, neg = row
    return tensor_type(_of_torch(dtype), torch.Size(shape), tuple(stride), offset, torch.device(device), conj, neg)
