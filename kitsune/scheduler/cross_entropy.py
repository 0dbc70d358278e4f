"""Cross entropy without the logarithms of all probabilities in memory.

Eager writes log_softmax(x), reads one number of each row for the loss, and reads all again for the gradient. Here each row leaves
log(sum(exp(x))), and what is needed of x less that is made again where it is read: x is read once for the loss, and once for the
gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from kitsune.ir import Graph, Kind, Op, Result, Value, named
from kitsune.scheduler.build import Builder
from kitsune.scheduler.rewriting import view_types

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
LOG_SOFTMAX, FORWARD, BACKWARD, GRADIENT = (
    aten._log_softmax.default,
    aten.nll_loss_forward.default,
    aten.nll_loss_backward.default,
    aten._log_softmax_backward_data.default,
)
SEEN_AS = (aten.detach.default, aten.view.default, aten.alias.default)


@dataclass
class Loss:
    """A log_softmax, the loss that reads it, and whatever else does; `storages` are those of the logarithms, also as float32."""

    softmax: Op
    forward: Op | None = None
    readers: list[Op] = field(default_factory=list)
    storages: set[int] = field(default_factory=set)
    casts: list[Op] = field(default_factory=list)
    # What the rewritten graph has: x, and log(sum(exp(x))) of each row.
    source: Value | None = None
    total: Value | None = None
    # The logarithms as the backward reads them, by dtype.
    again: dict[torch.dtype, Value] = field(default_factory=dict)


def cross_entropies(graph: Graph, why_not: Callable[[Op], str | None]) -> Graph:
    """Every log_softmax that only a loss over positions, and its backward, reads."""
    losses = _losses(graph)
    if not losses:
        return graph
    makers = {v.id: op for op in graph.ops for v in op.results}
    written = {storage for op in graph.ops for storage in op.effects.writes}
    of: dict[int, Loss] = {}
    dropped: set[int] = set()
    for loss in losses:
        dropped |= {id(op) for op in (loss.softmax, *loss.casts)}
        of.update((id(op), loss) for op in loss.readers)
    b = Builder(graph)
    for op in graph.ops:
        found = of.get(id(op))
        if found is None:
            seen = any(v.storage in loss.storages for loss in losses for v in op.results) and op.kind is Kind.VIEW
            if id(op) not in dropped and not seen:
                b.ops.append(op)
        elif op is found.forward:
            _forward(b, found, op, makers, written)
        else:
            _backward(b, found, op)
    if any(op.kind is not Kind.VIEW and why_not(op) is not None for op in b.made):
        return graph
    return Graph(graph.inputs, tuple(b.ops), graph.outputs)


def _losses(graph: Graph) -> list[Loss]:
    found: dict[int, Loss] = {}
    spoiled: set[int] = {v.storage for v in (*graph.inputs, *graph.outputs)}
    # What the softmax read is read again for the gradient, and must be then what it was.
    written = {storage for op in graph.ops for storage in op.effects.writes}
    for op in graph.ops:
        if op.target is LOG_SOFTMAX and _is_plain(op) and op.inputs[0].storage not in written:
            found[op.results[0].storage] = loss = Loss(op, storages={op.results[0].storage})
            continue
        for loss in {id(known): known for v in op.inputs if (known := found.get(v.storage)) is not None}.values():
            if op.kind is Kind.VIEW:
                if op.target not in SEEN_AS or op.results[0].type.shape != loss.softmax.results[0].type.shape:
                    spoiled |= loss.storages
            elif op.target is aten._to_copy.default and op.results[0].type.dtype is torch.float32 and not loss.casts:
                found[op.results[0].storage] = loss
                loss.casts.append(op)
                loss.storages.add(op.results[0].storage)
            elif not _joins(loss, op):
                spoiled |= loss.storages
    complete = {id(loss): loss for loss in found.values() if loss.forward is not None and not loss.storages & spoiled}
    return list(complete.values())


def _is_plain(op: Op) -> bool:
    x, y = op.inputs[0].type, op.results[0].type
    arguments = named(op)
    return len(x.shape) == 2 and arguments["dim"] in (1, -1) and not arguments["half_to_float"] and bool(y.nbytes)


def _joins(loss: Loss, op: Op) -> bool:
    arguments = named(op)
    if op.target is GRADIENT:
        fits = op.inputs[0].storage not in loss.storages and loss.forward is not None
    elif op.target in (FORWARD, BACKWARD):
        fits = arguments["weight"] is None and arguments["reduction"] in (1, 2) and len(arguments["target"].type.shape) == 1
        fits = fits and (loss.forward is None) is (op.target is FORWARD)
    else:
        fits = False
    if fits:
        loss.readers.append(op)
        loss.forward = op if op.target is FORWARD else loss.forward
    return fits


def _forward(b: Builder, loss: Loss, op: Op, makers: dict[int, Op], written: set[int]) -> None:
    arguments = named(op)
    loss.source = _source(b, loss.softmax, makers, written)
    wide = _wide(b, op, loss.source)
    rows, dtype = wide.type.shape[0], wide.type.dtype
    loss.total = b.call(op, aten.logsumexp.default, Kind.REDUCTION, (wide, (1,), True), (dtype, (rows, 1)))
    made = _logarithms(b, op, loss, wide)
    read = made[arguments["self"].type.dtype]
    target, ignored = arguments["target"], arguments["ignore_index"]
    each = b.call(op, FORWARD, Kind.REDUCTION, (read, target, None, 0, ignored), (read.type.dtype, (rows,)))
    b.ops[-1] = b.made[-1] = replace(b.ops[-1], structure=(Result(0), None))
    counts = b.call(op, aten.ne.Scalar, Kind.POINTWISE, (target, ignored), (torch.bool, (rows,)))
    result, count = op.results
    b.call(op, aten.sum.dim_IntList, Kind.REDUCTION, (counts, (0,), False), count, dtype=count.type.dtype)
    if arguments["reduction"] == 1:
        total = b.call(op, aten.sum.dim_IntList, Kind.REDUCTION, (each, (0,), False), (result.type.dtype, ()))
        b.call(op, aten.div.Tensor, Kind.POINTWISE, (total, count), result)
    else:
        b.call(op, aten.sum.dim_IntList, Kind.REDUCTION, (each, (0,), False), result)


def _backward(b: Builder, loss: Loss, op: Op) -> None:
    assert loss.source is not None
    if not loss.again:
        start = len(b.ops)
        loss.again = _logarithms(b, op, loss, _wide(b, op, loss.source))
        b.ops[start:] = [replace(made, late=True) for made in b.ops[start:]]

    def now(value: Value) -> Value:
        return loss.again[value.type.dtype] if value.storage in loss.storages else value

    args = tuple(now(a) if isinstance(a, Value) else a for a in op.args)
    b.add(replace(op, args=args, inputs=tuple(a for a in args if isinstance(a, Value))))


def _source(b: Builder, softmax: Op, makers: dict[int, Op], written: set[int]) -> Value:
    """What the softmax reads, before it was widened if it was: that is half as much to read twice."""
    x = wide = softmax.inputs[0]
    maker = makers.get(x.id)
    while maker is not None and maker.target in (aten.view.default, aten._unsafe_view.default):
        wide = maker.inputs[0]
        maker = makers.get(wide.id)
    if maker is None or maker.target is not aten._to_copy.default:
        return x
    source = maker.inputs[0]
    if source.type.dtype not in HALF or source.storage in written or source.type.shape[-1] != x.type.shape[-1]:
        return x
    if source.type.shape == x.type.shape:
        return source
    shape = tuple(x.type.shape)
    types = view_types(Op(aten.view.default, Kind.VIEW, (source, shape), (), (source,), Result(0), ()))
    return x if types is None else b.view(softmax, source, shape, types[0].stride)


def _wide(b: Builder, op: Op, x: Value) -> Value:
    if x.type.dtype not in HALF:
        return x
    return b.call(op, aten._to_copy.default, Kind.POINTWISE, (x,), (torch.float32, tuple(x.type.shape)), dtype=torch.float32)


def _logarithms(b: Builder, op: Op, loss: Loss, wide: Value) -> dict[torch.dtype, Value]:
    """The logarithms with the roundings that eager makes: in the type of the softmax, and as float32 if they were cast."""
    shape, dtype = tuple(wide.type.shape), loss.softmax.results[0].type.dtype
    exact = b.call(op, aten.sub.Tensor, Kind.POINTWISE, (wide, loss.total), (wide.type.dtype, shape))
    if dtype is wide.type.dtype:
        return {dtype: exact}
    rounded = b.call(op, aten._to_copy.default, Kind.POINTWISE, (exact,), (dtype, shape), dtype=dtype)
    found = {dtype: rounded}
    for cast in loss.casts:
        to = cast.results[0].type.dtype
        found[to] = b.call(op, aten._to_copy.default, Kind.POINTWISE, (rounded,), (to, shape), dtype=to)
    return found
