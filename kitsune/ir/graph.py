"""A flushed region: a straight list of typed ops on values. Program order, which is always a legal order to run."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch._ops import OpOverload

from kitsune.ir.barrier import Barrier, Site
from kitsune.ir.tensor_type import TensorType


class Kind(enum.Enum):
    """What the planner may do with an op."""

    POINTWISE = enum.auto()
    REDUCTION = enum.auto()
    VIEW = enum.auto()
    # Reads neighbours of each element. Recorded as EXTERN; a planner says so of those that a kernel is written for.
    WINDOW = enum.auto()
    GEMM = enum.auto()
    EXTERN = enum.auto()


# Values and Ops are never changed, and yet not frozen: an Op takes 0.1 us to make so, and 0.9 if it is frozen (CPU host). The
# first step of a BERT of 6 layers makes 4,000 of both.
@dataclass(slots=True, unsafe_hash=True)
class Value:
    """A tensor at one moment. A write makes a new Value on the same storage, one version later."""

    id: int
    type: TensorType
    storage: int
    version: int = 0

    def __str__(self) -> str:
        return f"${self.id}"


def values_in(argument: Any) -> list[Value]:
    """The Values among an op's arguments, in their order; lists and tuples are looked into."""
    if type(argument) is Value:
        return [argument]
    found: list[Value] = []
    if isinstance(argument, (tuple, list)):
        for a in argument:
            if type(a) is Value:
                found.append(a)
            elif isinstance(a, (tuple, list)):
                found += values_in(a)
    return found


@dataclass(frozen=True, slots=True)
class Slot:
    """A Python float that may differ each time the region comes back (a learning rate): read from the region's scalars."""

    index: int

    def __str__(self) -> str:
        return f"%{self.index}"


def slots_in(argument: Any) -> Iterator[Slot]:
    """The Slots among an op's arguments; lists and tuples are looked into."""
    if isinstance(argument, Slot):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for a in argument:
            yield from slots_in(a)


@dataclass(frozen=True, slots=True)
class Result:
    """New tensor number `index` in the structure of a return value."""

    index: int


@dataclass(frozen=True, slots=True)
class Operand:
    """Tensor number `index` among a call's arguments."""

    index: int


@dataclass(frozen=True, slots=True)
class Effects:
    """What an op does besides making results: storages that it writes, and whether it draws random numbers."""

    writes: tuple[int, ...] = ()
    random: bool = False


PURE = Effects()

# Random operators that have all of their memory before they draw. cuDNN's attention, for one, takes a workspace afterwards.
DRAWS_LAST = {"native_dropout", "bernoulli", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like"}
DRAWS_LAST |= {"_scaled_dot_product_flash_attention"}


def may_have_drawn(target: OpOverload, random: bool) -> bool:
    """Of a call for which memory runs out: may it have drawn random numbers, so that it cannot be made again?"""
    return random and target._opname not in DRAWS_LAST


# The first operand is overwritten, or asked for its shape only, and not read.
OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "ones_like", "zeros_like", "full_like"}

# cuDNN makes an execution plan for each shape of these, for the thread they run in: a backward's for autograd's. (Attention's
# forward is not among them: it may draw random numbers.)
BACKWARDS_WITH_PLANS = frozenset({"convolution_backward", "_scaled_dot_product_cudnn_attention_backward"})
FORWARDS_WITH_PLANS = frozenset({"convolution"})
WITH_PLANS = BACKWARDS_WITH_PLANS | FORWARDS_WITH_PLANS

# Number of an operand that no kernel of ours reads: a buffer that torch's CPU kernels leave, and that is empty elsewhere.
UNREAD = {"log_sigmoid_backward": 2}


@dataclass(slots=True, eq=False)
class Op:
    """One call of an aten overload.

    `args` and `kwargs` hold Values where the call had tensors and Slots where it had moving floats. `structure` is the return
    value with a Result for each new tensor, which `results` lists, and an Operand for a tensor that came in. `rewritten` pairs
    each operand that the call writes, before and after.
    """

    target: OpOverload
    kind: Kind
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    inputs: tuple[Value, ...]
    structure: Any
    results: tuple[Value, ...]
    rewritten: tuple[tuple[Value, Value], ...] = ()
    effects: Effects = PURE
    # Grad mode when it was recorded, where the kernel may ask for it (mkldnn's LSTM keeps its workspace only then).
    grad_enabled: bool | None = None
    site: Site | None = None
    # Put in by the planner for memory that other ops fill: starts nothing, and the plan may place it.
    allocates: bool = False
    # Put in by a planner for the ops that follow: cheaper made again there than kept from what came before.
    late: bool = False
    # A view put in by a planner, whose offset counts from where its operand's does. That of a view of an input that was recorded
    # counts from the start of the memory.
    derived: bool = False

    @property
    def outputs(self) -> tuple[Value, ...]:
        """Every Value that this op defines."""
        return self.results + tuple([after for _, after in self.rewritten]) if self.rewritten else self.results

    @property
    def starts_nothing(self) -> bool:
        """A view, or memory that others fill: made on the host when its result is first asked for."""
        return self.kind is Kind.VIEW or self.allocates

    @property
    def nbytes(self) -> int:
        """Bytes that it must move by itself: each operand once, each result once; none for a view."""
        if self.starts_nothing:
            return 0
        read = self.inputs[1:] if self.target._opname in OVERWRITES else self.inputs
        return sum(v.type.nbytes for v in read) + sum(v.type.nbytes for v in self.outputs)


def reads_slots(op: Op) -> bool:
    """Does the op take a moving number?"""
    return any(map(_has_slot, op.args)) or any(_has_slot(a) for _, a in op.kwargs)


def _has_slot(argument: Any) -> bool:
    cls = type(argument)
    return cls is Slot or (cls in (tuple, list) and any(map(_has_slot, argument)))


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """One flushed region. `outputs` are the values that somebody could still read when it was flushed.

    `awaited` are the numbers of outputs whose numbers the program reads as soon as it can: they are computed before all that they
    do not need.
    """

    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]
    awaited: tuple[int, ...] = ()

    def __str__(self) -> str:
        from kitsune.ir.text import graph_text

        return graph_text(self)


def n_values(graph: Graph) -> int:
    """One more than the largest number of a value."""
    return 1 + max((v.id for v in (*graph.inputs, *(v for op in graph.ops for v in op.outputs))), default=-1)


@dataclass(frozen=True, slots=True, eq=False)
class OpRow:
    """A row of the op table: what is known of an overload before it is called."""

    target: OpOverload
    kind: Kind
    writes: tuple[tuple[int, str], ...] = ()
    random: bool = False
    barrier: Barrier | None = None
    scalars_move: bool = False
    trusted: bool = False
    in_place: bool = False
    # Made of other operators, and seen as a whole where autograd does not take it apart: in inference mode.
    composite: bool = False
    # Has a barrier, or may be a host counter: look twice before it is recorded.
    detour: bool = False
    # A view: of a tensor that only comes in, it is made at once.
    is_view: bool = False
    # The kernel may ask whether gradients are on, so that this is part of what was called.
    sees_grad_mode: bool = False
    # Eager counts the write up only inside the op, so that recording it must do so: torch has no ADInplaceOrView kernel for it.
    bumps: bool = False
    # The view that an in-place op on a tensor's geometry amounts to: squeeze for squeeze_.
    functional: OpOverload | None = None
    # The result's shape depends on values if an operand is a mask.
    counts_masks: bool = False
    # It may give an operand another geometry, or other memory.
    moves_metadata: bool = False
    # An operator of another library, inside of which Python may run.
    is_foreign: bool = False
    # A collective, which goes on with its operands on a stream of its own.
    works_aside: bool = False
    # It leaves a plan in autograd's thread.
    makes_plans: bool = False


class OutputSpec(NamedTuple):
    """What a call returns: `results` are (type, alias) of each new tensor; `structure` is the return value with numbers for them.

    An alias k >= 0 is the operand whose storage the result shares, k < 0 the result number -k-1, None new memory. In
    `structure` a Result stands for a new tensor and an Operand for a tensor that came in.
    """

    results: tuple[tuple[TensorType, int | None], ...]
    structure: Any
