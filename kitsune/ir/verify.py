"""What every Graph must satisfy. Run on each new graph under KITSUNE_VERIFY=1, which is the default in the tests."""

from kitsune.ir.graph import Graph, Op, Value


def verify(graph: Graph) -> None:
    """Raise ValueError, naming the op, if a value is used before it is defined, defined twice, or a write is out of order."""
    defined: dict[int, Value] = {}
    versions: dict[int, int] = {}
    for value in graph.inputs:
        _define(value, defined, "the inputs")
        versions[value.storage] = 0
    for position, op in enumerate(graph.ops):
        where = f"op {position} ({op.target})"
        for value in op.inputs:
            if defined.get(value.id) is not value:
                raise ValueError(f"{where} reads {value}, which is not defined before it")
        _check_writes(op, versions, where)
        for value in op.outputs:
            _define(value, defined, where)
            versions[value.storage] = max(versions.get(value.storage, 0), value.version)
    for value in graph.outputs:
        if value.id not in defined:
            raise ValueError(f"the graph returns {value}, which it does not define")
        if defined[value.id] != value:
            raise ValueError(f"the graph returns {value} as {value!r}, and has made it as {defined[value.id]!r}")


def _define(value: Value, defined: dict[int, Value], where: str) -> None:
    if value.id in defined:
        raise ValueError(f"{where} defines {value} twice")
    defined[value.id] = value


def _check_writes(op: Op, versions: dict[int, int], where: str) -> None:
    # Two operands of one call may share a storage (a foreach over views): each of them is one write.
    expected = dict(versions)
    for before, after in op.rewritten:
        if after.storage != before.storage:
            raise ValueError(f"{where} moves {before} to another storage")
        expected[before.storage] = expected.get(before.storage, 0) + 1
        if after.version != expected[before.storage]:
            raise ValueError(f"{where} writes version {after.version} of storage {after.storage}, not {expected[before.storage]}")
    if op.effects.writes != tuple(after.storage for _, after in op.rewritten):
        raise ValueError(f"{where} does not declare what it writes")
