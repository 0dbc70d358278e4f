"""Graphs in torch's own notation: `$4: f32[2, 4] = aten.mm.default($3, $2)`."""

from typing import Any

from kitsune.ir.graph import Graph, Op, Slot, Value


def graph_text(graph: Graph) -> str:
    """The graph as text, names counting from zero, so that two dumps of one program are equal."""
    names: dict[int, str] = {}
    lines = [f"{_define(v, names)} = input" for v in graph.inputs]
    lines += [_op_text(op, names) for op in graph.ops]
    lines.append(f"return ({', '.join(_name(v, names) for v in graph.outputs)})")
    if graph.awaited:
        lines[-1] += f"  # awaited: {', '.join(_name(v, names) for v in graph.outputs if v.id in graph.awaited)}"
    return "\n".join(lines)


def _name(value: Value, names: dict[int, str]) -> str:
    return names.setdefault(value.id, f"${len(names)}")


def _define(value: Value, names: dict[int, str]) -> str:
    return f"{_name(value, names)}: {value.type}"


def _op_text(op: Op, names: dict[int, str]) -> str:
    arguments = [_argument(a, names) for a in op.args]
    arguments += [f"{name}={_argument(a, names)}" for name, a in op.kwargs]
    results = ", ".join(_define(v, names) for v in op.outputs) or "()"
    return f"{results} = {op.target}({', '.join(arguments)})"


def _argument(argument: Any, names: dict[int, str]) -> str:
    if isinstance(argument, Value):
        return _name(argument, names)
    if isinstance(argument, Slot):
        return str(argument)
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_argument(a, names) for a in argument)}]"
    return repr(argument)
