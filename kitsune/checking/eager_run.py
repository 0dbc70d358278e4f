"""The recorded operators, run one by one as eager runs them, beside a plan whose values they take over one after another.

What the plan has made is compared as soon as it is made here, too, and takes the place of eager's value: so the next difference
is that of the next operator, and not the first one's, grown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kitsune.checking.compare import difference, same_bits, too_far
from kitsune.checking.inputs import Draws
from kitsune.ir import Graph, Kind, Op, Result, Slot, Value
from kitsune.runtime import prepare
from kitsune.runtime.calls import call
from kitsune.scheduler import needed_ops

# What an op makes and does not compute: memory for others, workspaces that its backward alone understands.
MEMORY = ("empty", "new_empty")
WORKSPACES = {"_cudnn_rnn": 3, "mkldnn_rnn_layer": 3, "cudnn_batch_norm": 3, "miopen_batch_norm": 3}
ATTENTION = 2
# What these are called where they are given back; the library may write them, which torch declares nowhere.
GIVEN_BACK = frozenset({"workspace", "reserve", "reserveSpace"})


@dataclass(slots=True, eq=False)
class Origin:
    """How a value came about that no plan's value stands for: by an op, from tensors and from values of this kind."""

    op: Op
    sources: dict[int, Any]
    number: int
    # May it differ in the last bits?
    loose: bool


class Wrong(Exception):
    """A value of the plan's that is not eager's: the op that makes it, how it came about, and what is wrong with it."""

    def __init__(self, op: Op, value: Value, origin: Origin, sentence: str) -> None:
        super().__init__(sentence)
        self.op, self.value, self.origin, self.sentence = op, value, origin, sentence


def workspaces(op: Op) -> set[int]:
    """The numbers of results that hold nothing to be compared."""
    name = op.target._opname
    if name.startswith(MEMORY):
        return {v.id for v in op.results}
    keep = ATTENTION if "attention" in name and op.kind is Kind.EXTERN and "backward" not in name else WORKSPACES.get(name)
    return set() if keep is None else {v.id for v in op.results[keep:]}


def workspaces_of(op: Op) -> set[int]:
    """The numbers of operands that are workspaces."""
    arguments = zip(op.target._schema.arguments, op.args, strict=False)
    return {a.id for argument, a in arguments if argument.name in GIVEN_BACK and isinstance(a, Value)}


class EagerRun:
    """The run of a recorded graph from `values`. `awaited` are the numbers of values that a plan is going to make.

    `numerics`: in "bitwise" reductions in kernels must have eager's bits, too; in "fast" nothing must that is computed.
    `called` are numbers of values that a call of torch's makes in the plan, as here: where its bits differ, torch's own differ
    from run to run.
    """

    def __init__(
        self, graph: Graph, values: list[Any], scalars: list[float], device: torch.device, numerics: str = "bitwise"
    ) -> None:
        self.graph, self.values, self.scalars, self.numerics = graph, values, scalars, numerics
        self.awaited: set[int] = set()
        self.called: set[int] = set()
        self._given: dict[int, torch.Tensor] = {}
        self._origins: dict[int, Origin] = {}
        self._draws = Draws(device)
        self.state = self._draws.now()
        self._needed = {id(op) for op in needed_ops(graph)}
        self._written = {storage for op in graph.ops for storage in op.effects.writes}
        self._position, self._instructions = 0, prepare(graph).instructions

    def run(self) -> list[Any]:
        """Go to the end by itself; returns the values by number."""
        self.advance()
        return self.values

    def give(self, value: Value, tensor: torch.Tensor | None) -> None:
        """What the plan has made of a value that is awaited; None if it has made nothing after all."""
        if tensor is None:
            self.awaited.discard(value.id)
        elif value.id in self.awaited:
            self._given[value.id] = tensor.clone()

    @property
    def next(self) -> Op | None:
        """The op that waits for the plan; None at the end."""
        return self._instructions[self._position].op if self._position < len(self._instructions) else None

    def advance(self) -> None:
        """Go on as far as the plan has come. Raises Wrong at the first value that is not eager's."""
        while self._position < len(self._instructions):
            op, drops = self._instructions[self._position].op, self._instructions[self._position].drops
            if any(v.id in self.awaited and v.id not in self._given for v in op.outputs):
                return
            self._position += 1
            self._one(op)
            for number in drops:
                self.values[number] = None
                self._origins.pop(number, None)
                self._given.pop(number, None)

    def _one(self, op: Op) -> None:
        sources = self._sources(op) if self.awaited else {}
        if not self._call(op) or not self.awaited:
            return
        for _, after in op.rewritten:
            # Other values on this memory are what it holds now.
            for number in [n for n, origin in self._origins.items() if self._on(origin, n, after.storage)]:
                self._origins.pop(number)
        # What is drawn is the same, whatever it is drawn by.
        rounds = op.kind is Kind.VIEW or (op.kind is Kind.POINTWISE and self.numerics != "fast")
        sums = not rounds and not op.effects.random
        loose = sums or any(isinstance(s, Origin) and s.loose for s in sources.values())
        for value in op.outputs:
            origin = Origin(op, sources, value.id, loose)
            if value.id in self._given:
                self._take_over(op, value, origin)
            else:
                self._origins[value.id] = origin

    def _on(self, origin: Origin, number: int, storage: int) -> bool:
        return any(v.id == number and v.storage == storage for v in origin.op.outputs)

    def _sources(self, op: Op) -> dict[int, Any]:
        """What an op reads, as it is before."""
        found: dict[int, Any] = {}
        for value in op.inputs:
            origin = self._origins.get(value.id)
            tensor = self.values[value.id]
            found[value.id] = origin if origin is not None else tensor.clone() if value.storage in self._written else tensor
        return found

    def _call(self, op: Op) -> bool:
        if op.effects.random:
            before = self._draws.now()
            self._draws.set(self.state)
        try:
            call(op, self.values, self.scalars)
        except Exception:
            if id(op) in self._needed:
                raise
            return False
        finally:
            if op.effects.random:
                self.state = self._draws.now()
                self._draws.set(before)
        return True

    def _take_over(self, op: Op, value: Value, origin: Origin) -> None:
        got, eager = self._given.pop(value.id), self.values[value.id]
        if value.id in workspaces(op) or same_bits(got, eager):
            return
        may_differ = origin.loose and (self.numerics != "bitwise" or value.id in self.called)
        if may_differ and self.numerics == "fast" and not got.is_floating_point():
            # A choice between numbers that were not rounded alike may fall out otherwise.
            eager.copy_(got)
            return
        sentence = far_from(got, eager, origin, self.scalars, self.numerics) if may_differ else difference(got, eager)
        if sentence is not None:
            raise Wrong(op, value, origin, sentence)
        eager.copy_(got)


def far_from(
    got: torch.Tensor, eager: torch.Tensor, origin: Origin, scalars: list[float], numerics: str = "strict"
) -> str | None:
    """Why a value with sums in another order is too far from eager's; None if it is not."""
    several = sum(op.kind not in (Kind.POINTWISE, Kind.VIEW) for op in chain(origin)) > 1
    exact = exactly(origin, scalars)
    told = too_far(got, eager, exact, coarsest(origin), several)
    if told is None or exact is None:
        return told
    # Where terms cancel, as in the gradient of a bias before a batch norm, nothing is left but their rounding: eager's own, which
    # may be small by chance, says little. Then the distance counts that another rounding of the operands makes.
    again = exactly(origin, scalars, lambda a: rounded_otherwise(a, numerics))
    return too_far(got, eager, exact, coarsest(origin), several, again)


def coarsest(origin: Origin) -> torch.dtype | None:
    """The dtype of least precision that a value has gone through on its way; None if there is none of floats."""
    dtypes = {v.type.dtype for op in chain(origin) for v in (*op.inputs, *op.outputs)}
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def chain(origin: Origin) -> list[Op]:
    """The ops that lead to a value from values of the plan's, in order."""
    return list(dict.fromkeys(one.op for one in _origins_of(origin)))


def leaves(origin: Origin) -> dict[int, torch.Tensor]:
    """The tensors that they begin with, by number."""
    sources = [pair for one in _origins_of(origin) for pair in one.sources.items()]
    return {number: source for number, source in sources if not isinstance(source, Origin)}


def _origins_of(origin: Origin) -> list[Origin]:
    done: dict[int, Origin] = {}
    waiting: list[Any] = [(origin, False)]
    while waiting:
        one, ready = waiting.pop()
        if id(one) in done:
            continue
        if ready:
            done[id(one)] = one
        else:
            waiting.append((one, True))
            waiting += [(source, False) for source in one.sources.values() if isinstance(source, Origin)]
    return list(done.values())


def exactly(origin: Origin, scalars: list[float], given: Callable[[Any], Any] | None = None) -> torch.Tensor | None:
    """A value in float64, from the tensors that its ops begin with, each as `given` makes it (as it is, if None); None where one
    of them cannot be had so."""
    known: dict[int, Any] = {}
    given = given or wide
    for one in _origins_of(origin):
        operands = {n: known[id(source)] if isinstance(source, Origin) else given(source) for n, source in one.sources.items()}
        try:
            known[id(one)] = _in_double(one, operands, scalars)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return None
    found: torch.Tensor | None = known[id(origin)]
    return found


def wide(a: Any) -> Any:
    """Floats in float64; everything else as it is."""
    if isinstance(a, torch.Tensor):
        return a.double() if a.is_floating_point() else a
    if isinstance(a, torch.dtype):
        return torch.float64 if a.is_floating_point else a
    return a


def rounded_otherwise(a: Any, numerics: str) -> Any:
    """Floats in float64, each off by the epsilon of what eager adds it up in, up or down at random: the same each time. In "fast"
    a kernel may have had it before it was rounded to 16 bits."""
    if not isinstance(a, torch.Tensor) or not a.is_floating_point():
        return a
    eps = torch.finfo(a.dtype if numerics == "fast" else torch.promote_types(a.dtype, torch.float32)).eps
    signs = torch.randint(0, 2, a.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return a.double() * (1 + eps * (2 * signs - 1).to(a.device))


def _in_double(one: Origin, operands: dict[int, Any], scalars: list[float]) -> Any:
    op = one.op
    if op.effects.random:
        raise NotImplementedError
    written = {before.id for before, _ in op.rewritten}
    operands = {n: t.clone() if n in written else t for n, t in operands.items()}

    def bound(a: Any) -> Any:
        if isinstance(a, Value):
            return operands[a.id]
        if isinstance(a, Slot):
            return scalars[a.index]
        return [bound(x) for x in a] if isinstance(a, tuple) else wide(a)

    args = [bound(a) for a in op.args]
    if op.target._opname in ("_softmax", "_log_softmax"):
        # Whether 16 bits are to become float32: in float64 they have become something better already.
        args[2] = False
    result = op.target(*args, **{name: bound(a) for name, a in op.kwargs})
    for before, after in op.rewritten:
        if after.id == one.number:
            return operands[before.id]
    places = zip(_flat(op.structure), _flat(result), strict=True)
    return wide(
        next(tensor for where, tensor in places if isinstance(where, Result) and op.results[where.index].id == one.number)
    )


def _flat(structure: Any) -> Iterator[Any]:
    if isinstance(structure, (list, tuple)):
        for part in structure:
            yield from _flat(part)
    else:
        yield structure
