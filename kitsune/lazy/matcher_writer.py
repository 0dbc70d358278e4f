"""Writes how a matcher compares what a call brings with what is expected there."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from kitsune.ir import TensorType
from kitsune.lazy.call_keys import AGAIN, BESIDE, LONG
from kitsune.lazy.cell import Ref, ref, serial_of
from kitsune.lazy.recorder import CONSTANTS
from kitsune.lazy.tensor import LazyTensor

_requires_grad = torch._C.TensorBase.requires_grad.__get__  # type: ignore[attr-defined]


class Unsuited(Exception):
    """No matcher is made for this call."""


class Fresh(NamedTuple):
    """The names of a tensor that is new to the region, of its cell and of its storage's serial; what tells its id, if it is no
    wrapper of another region."""

    tensor: str
    cell: str
    serial: str
    number: str | None


def example_of(argument: Any) -> tuple[type, Any]:
    """What is written of an argument: its type, and what it consists of; of a tensor, which is not held, the type alone."""
    cls = type(argument)
    if cls is slice:
        return cls, (example_of(argument.start), example_of(argument.stop), example_of(argument.step))
    if isinstance(argument, (tuple, list)):
        return cls, tuple(map(example_of, argument)) if len(argument) < LONG else None
    return cls, None if cls is LazyTensor or isinstance(argument, Tensor) else argument


class Writer:
    """Writes a matcher's text. The text depends on the form of the call alone, so that equal layers share its compilation."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self._n = self._n_calls = 0
        # The fresh tensors of the calls before this one.
        self.before: list[Fresh] = []
        # How many calls are owed by them, and what counts their writes: the edge, how many were owed by then, the names of the
        # tensors and of the first one's cell.
        self.n_debts = 0
        self.counts: list[tuple[Any, int, list[str], str]] = []
        self.fresh: list[Fresh] = []
        self.begin()

    def begin(self) -> None:
        """What comes next is about another call."""
        self._n_calls += 1
        self.before += self.fresh
        # The names of the call's tensors, of their cells, of its floats; and the fresh ones among the tensors.
        self.flat: list[str] = []
        self.cells: list[str] = []
        self.floats: list[str] = []
        self.fresh = []

    def bind(self, value: Any) -> str:
        """A name for a constant."""
        name = f"K{len(self.constants)}"
        self.constants[name] = value
        return name

    def name(self, expression: str) -> str:
        """A local name for what an expression gives."""
        self._n += 1
        self.lines.append(f"a{self._n} = {expression}")
        return f"a{self._n}"

    def new_names(self, n: int) -> list[str]:
        """Names for what a call makes."""
        return [f"w{self._n_calls}_{k}" for k in range(n)]

    def unless(self, condition: str) -> None:
        """Another call, unless this holds."""
        self.lines.append(f"if not ({condition}): return MISS")

    def part(self, a: str, example: tuple[type, Any], key: Any) -> None:
        """Compare the argument named `a` with one of which this is the example, and whose part of the key is `key`."""
        cls, value = example
        if cls is LazyTensor:
            self.unless(f"type({a}) is LazyTensor")
            self._wrapper(a, key)
        elif cls is Tensor or cls is Parameter:
            self.unless(f"type({a}) is {'Tensor' if cls is Tensor else 'Parameter'}")
            self.plain(a, key)
        elif cls is type(None) or cls is bool or value is Ellipsis:
            self.unless(f"{a} is {value}")
        elif cls is float:
            self.unless(f"type({a}) is float")
            self.floats.append(a)
        elif cls in CONSTANTS:
            self.unless(f"type({a}) is {self.bind(cls)} and {a} == {self.bind(value)}")
        elif cls is slice:
            self.unless(f"type({a}) is {self.bind(cls)}")
            for name, item, part in zip(("start", "stop", "step"), value, key[1:], strict=True):
                self.part(self.name(f"{a}.{name}"), item, part)
        elif issubclass(cls, (tuple, list)) and isinstance(key, tuple) and value is not None:
            self.unless(f"type({a}) is {self.bind(cls)} and len({a}) == {len(value)}")
            for k, (item, part) in enumerate(zip(value, key[1:], strict=True)):
                self.part(self.name(f"{a}[{k}]"), item, part)
        else:
            raise Unsuited

    def _wrapper(self, a: str, key: Any) -> None:
        cell = self.name(f"{a}.cell")
        self.flat.append(a)
        self.cells.append(cell)
        if isinstance(key, tuple) and key and isinstance(key[0], TensorType):
            self._of_before(a, cell, *key)
            return
        value, graded = value_in(key)
        owes = f"{cell}.owed is not None" if graded else f"{cell}.owed is None and {cell}.spent is False"
        self.unless(f"{cell}.ref is {self.bind(value)} and {cell}.region is region and {owes}")

    def _of_before(self, a: str, cell: str, type_: TensorType, where: Any, graded: bool) -> None:
        """The result of another region: a gradient that is clipped after a loss was read."""
        if where is not None or graded:
            raise Unsuited
        serial = self.name(f"serial_of_result(region, {a}, {self.bind(type_)})")
        self.unless(f"{serial} is not None")
        self.enters(Fresh(a, cell, serial, None))

    def enters(self, new: Fresh) -> None:
        """Its memory is not known in the region, nor does another tensor of the calls bring it along."""
        others = [f"{new.serial} != {other.serial}" for other in (*self.before, *self.fresh) if self.may_share(new, other)]
        self.unless(" and ".join([f"{new.serial} not in storages", *others]))
        self.fresh.append(new)

    def may_share(self, new: Fresh, other: Fresh) -> bool:
        """May two tensors that come in have the same memory?"""
        return True

    def plain(self, a: str, key: Any) -> None:
        """Compare a plain tensor."""
        self.flat.append(a)
        number = self.name(f"id({a})")
        if isinstance(key, Ref) or key[0] == "graded":
            value, graded = value_in(key)
            cell = self.name(f"plain.get({number})")
            self.unless(f"{cell} is not None and {cell}.ref is {self.bind(value)} and {a}.requires_grad is {graded}")
            self.cells.append(cell)
            return
        if key[0] is AGAIN or key[0] is BESIDE:
            raise Unsuited
        # Of a view that is made each time there is nothing known yet.
        inside = key[1] is not None
        seen = self.name(f"arrival(region, {a})" if inside else f"arrivals.get({number}) or arrival(region, {a})")
        self.unless(f"{seen} is not None and {seen}[2] {'==' if inside else 'is'} {self.bind(key)}")
        new = Fresh(a, f"{a}_cell", self.name(f"{seen}[1]"), number)
        if inside:
            # It shares its memory with what came in before.
            self.fresh.append(new)
        else:
            self.enters(new)
        self.cells.append(f"{a}_cell")


def value_in(key: Any) -> tuple[Ref, bool]:
    """The value that a part of a key names, and has it a place in the autograd graph."""
    if isinstance(key, Ref):
        return key, False
    if isinstance(key, tuple) and key and key[0] == "graded":
        return ref(key[1]), True
    raise Unsuited


def serial_of_result(region: Any, wrapper: Any, type_: TensorType) -> int | None:
    """What the storage of another region's result is known by; None if this is none of that type, or has a graph."""
    cell = wrapper.cell
    real = cell.real
    if (
        cell.region is region
        or real is None
        or cell.owed is not None
        or (cell.type is not type_ and cell.type.at_start() != type_)
    ):
        return None
    # Who asks may be torch's module, with the lane in between.
    with torch._C.DisableTorchFunction():
        return None if _requires_grad(wrapper) or region.oddness(real) is not None else serial_of(real)
