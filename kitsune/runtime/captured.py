"""A region as one graph: what it was captured with, when that still holds, and how it is replayed."""

import contextlib
import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kitsune.ir import Value, storage_of
from kitsune.runtime.alignment import alignment, place_like
from kitsune.runtime.answers import Answers
from kitsune.runtime.calls import call
from kitsune.runtime.capturable import GraphFacts, reader_of
from kitsune.runtime.cuda_graph import GraphRecorder, Recorded, Sending
from kitsune.runtime.lent_outputs import Lent, small_results
from kitsune.runtime.page_reader import PageReader
from kitsune.runtime.passing import Passing
from kitsune.runtime.slots import SlotTable, WatchedNumbers, host_bits
from kitsune.runtime.tail import Tail

data_ptr = torch._C.TensorBase.data_ptr


class NotCaptured(Exception):
    """Says in a sentence why a region is not captured."""


@dataclass(slots=True)
class Work:
    """What is captured: `run(values, scalars, send)` does all of a region's work once, `finish` what had to wait for its end.

    In between `run` calls `send` once with the tensors of the values `sent`, whose numbers the program waits for, if any.
    `keep` is what the work refers to by address; `tail` is work that follows each replay. `nbytes` of memory are in use at most,
    arenas aside.
    """

    run: Callable[[list[Any], list[float], Sending], None]
    finish: Callable[[], None] = lambda: None
    keep: list[Any] = field(default_factory=list)
    tail: Tail | None = None
    sent: tuple[int, ...] = ()
    nbytes: int = 0


class Miss(Exception):
    """Why a captured region does not fit this time; nothing has happened yet."""


class InputsMoved(Miss):
    """Inputs are not where they were: `numbers`."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__("an input is at another address")
        self.numbers = numbers


class NumberChanged(Miss):
    """A moving number that is baked in is another one: `number`."""

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.number = number


class HostNumberChanged(Miss):
    """A tensor of the host, whose value kernels were given, has another one."""


class Misaligned(Miss):
    """An input that is copied begins elsewhere within 16 bytes: eager might add it up in another order."""


class OutputsHeld(Miss):
    """Somebody holds a tensor on the outputs' memory who cannot be told to move."""


class TailFailed(Exception):
    """What follows the graph has failed, as it might in eager: the graph has run, so that the region cannot be run again."""


class Captured:
    """A region that was captured with its inputs at certain addresses.

    Inputs in `moving` are copied to one place first; the others are used where they are. `moved(n)` hears of results of an
    earlier replay that were moved because somebody still holds them.
    """

    def __init__(
        self,
        facts: GraphFacts,
        work: Work,
        table: SlotTable,
        recorder: GraphRecorder,
        values: list[Any],
        scalars: Sequence[float],
        moving: frozenset[int],
        moved: Callable[[int], None],
        reader: PageReader | None = None,
    ) -> None:
        self.graph, self.moving = facts.graph, moving
        self._work, self._recorder = work, recorder
        self._places, used = facts.places, facts.inputs
        # The graph of a plan may have more than those that were recorded.
        self._n_values = max(len(values), facts.n_values)
        self._fixed = tuple(n for n in used if n not in moving)
        self._on_host = {n: host_bits(values[n]) for n in facts.host_numbers}
        # Guards cost 0.05 us for each input where nothing is done in Python for each.
        self._take: Callable[[list[Any]], Any] = operator.itemgetter(*self._fixed) if len(self._fixed) > 1 else self._take_few
        self._addresses = [data_ptr(values[n]) for n in self._fixed]
        self._copied = tuple(n for n in used if n in moving)
        self._statics = {n: place_like(values[n], n in facts.summed) for n in self._copied}
        self._alignments = [(n, alignment(values[n])) for n in self._copied if n in facts.summed]
        self._passing = Passing(self._statics, table, reader)
        self.n_replays, self.stays = 0, False
        self.has_tail = work.tail is not None
        # The numbers that were found to be those that are baked in.
        self._fitting: Sequence[float] | None = None
        self._aliases = tuple(v for v in self.graph.outputs if self._from_outside(v))
        needs = work.tail.needs if work.tail is not None else ()
        # Is a replay nothing but copies of bytes and the graph's start? Then no operator of torch sees the modes that are on.
        self.is_bare = not self.has_tail and not self._aliases and self._passing.is_bare
        self._needed_aliases = tuple(v for v in needs if self._from_outside(v))
        # What the tail reads of the graph's own memory.
        self._kept: dict[int, Any] = dict.fromkeys(v.id for v in needs if not self._from_outside(v))
        self._record(values, scalars, moved)

    def _from_outside(self, value: Value) -> bool:
        return self._places.root[value.id].id in self._places.inputs

    def _record(self, values: list[Any], scalars: Sequence[float], moved: Callable[[int], None]) -> None:
        numbers, numbers_on_host = WatchedNumbers(scalars), [(n, values[n]) for n in self._on_host]
        aliases = {v.id for v in self._aliases}
        made = tuple(dict.fromkeys(v.id for v in self.graph.outputs if v.id not in aliases))

        def work(inputs: Sequence[torch.Tensor], send: Sending) -> list[torch.Tensor]:
            inside: list[Any] = [None] * self._n_values
            self._passing.read()
            for n, tensor in (*zip(self._fixed, inputs, strict=True), *self._statics.items()):
                inside[n] = tensor
            for n, tensor in numbers_on_host:
                inside[n] = tensor
            self._work.run(inside, numbers, send)
            results = [self._last(n, inside) for n in (*made, *self._kept)]
            # The tail may write them once more.
            self._n_copies = 0 if self.has_tail else self._passing.copy_out(small_results(results[: len(made)]))
            return results

        inputs = [values[n] for n in self._fixed]
        self._recorded: Recorded = self._recorder.record(work, inputs, len(self._work.sent), self._work.nbytes)
        self._passing.restart()
        self.baked = {n: struct.pack("d", scalars[n]) for n in numbers.read}
        self._kept = dict(zip(self._kept, self._recorded.outputs[len(made) :], strict=True))
        outputs = dict(zip(made, self._recorded.outputs, strict=False))
        taken = {storage_of(t)._cdata for t in (*(values[n] for n in self._fixed), *self._statics.values())}
        if any(storage_of(tensor)._cdata in taken for tensor in (*outputs.values(), *self._kept.values())):
            self._recorded.destroy()
            raise NotCaptured("An operator of the region returned its operand instead of a new tensor.")
        self._lent = Lent(outputs, moved, self._n_copies)
        self._recorded.outputs = []
        self._work.finish()

    @property
    def nbytes(self) -> int:
        """Memory that it keeps."""
        return self._recorded.nbytes + self._passing.nbytes

    def replay(self, values: list[Any], scalars: Sequence[float]) -> None:
        """Run the region: `values` has the inputs by number and receives the outputs. Raises Miss where it does not fit."""
        if not self.fits(values):
            raise InputsMoved([n for n, a in zip(self._fixed, self._addresses, strict=True) if data_ptr(values[n]) != a])
        self.again(values, scalars)

    def fits(self, values: list[Any]) -> bool:
        """Are the inputs that must be where they were there?"""
        return list(map(data_ptr, self._take(values))) == self._addresses

    def again(self, values: list[Any], scalars: Sequence[float]) -> None:
        """The same, where the inputs are known to be where they were."""
        if self._alignments and any(alignment(values[n]) != behind for n, behind in self._alignments):
            raise Misaligned("an input begins elsewhere within 16 bytes, where a library may add up in another order")
        if self._on_host and any(host_bits(values[n]) != bits for n, bits in self._on_host.items()):
            raise HostNumberChanged("a tensor of the host has another value")
        if scalars is not self._fitting:
            self._fit(scalars)
        if not self._lent.release():
            who = "a graph of the program's may refer to" if self.stays else "somebody holds a view of"
            raise OutputsHeld(f"{who} a result of the replay before")
        # Before the launch: what fails from there on could not be run again.
        for value in self._aliases:
            self._alias(value, values, scalars)
        inside = self._for_tail(values, scalars) if self.has_tail else []
        self._passing.send(values, scalars, self._lent.copies_at)
        self._recorded.replay()
        self._passing.started()
        self.n_replays += 1
        if self.has_tail:
            self._finish(inside, scalars)
        self._lent.hand_out(values)

    def _fit(self, scalars: Sequence[float]) -> None:
        for n, bits in self.baked.items():
            if struct.pack("d", scalars[n]) != bits:
                raise NumberChanged(self._sentence(n), n)
        # What is in a tuple stays as it is; of a list nobody can say.
        self._fitting = scalars if type(scalars) is tuple else None

    def answers(self, values: list[Any]) -> Answers | None:
        """The numbers of a replay that can be read before its end, for the tensors that it has put into `values`."""
        if not self._work.sent:
            return None
        n_replays, recorded = self.n_replays, self._recorded
        return Answers([values[n] for n in self._work.sent], lambda k: recorded.sent(k) if self.n_replays == n_replays else None)

    def fixed(self) -> dict[int, int]:
        """The inputs that must be where they were, by number, and where that is."""
        return dict(zip(self._fixed, self._addresses, strict=True))

    def results(self) -> dict[int, int]:
        """Where each replay leaves its results, by number."""
        return self._lent.addresses()

    def _finish(self, inside: list[Any], scalars: Sequence[float]) -> None:
        """What follows the graph."""
        assert self._work.tail is not None
        try:
            self._work.tail.run(inside, list(scalars))
        except Exception as error:
            raise TailFailed from error
        finally:
            # Views that the tail has made must not count as held by somebody.
            inside.clear()

    def _last(self, number: int, inside: list[Any]) -> torch.Tensor:
        """The tensor of a value, which the tail may be the last to write."""
        while inside[number] is None:
            number = self._places.before[number].id
        tensor: torch.Tensor = inside[number]
        return tensor

    def _for_tail(self, values: list[Any], scalars: Sequence[float]) -> list[Any]:
        """The values that the tail begins with."""
        inside: list[Any] = [None] * self._n_values
        for n in (*self._fixed, *self._on_host):
            inside[n] = values[n]
        for n, tensor in (*self._statics.items(), *self._kept.items()):
            inside[n] = tensor
        for value in self._needed_aliases:
            self._alias(value, inside, scalars)
        return inside

    def _take_few(self, values: list[Any]) -> list[Any]:
        return [values[n] for n in self._fixed]

    def stay(self) -> None:
        """To be replayed no more; what was handed out last stays where it is. Any thread may say so."""
        self.stays = True
        self._lent.stay()

    def free_arena(self) -> None:
        """To be replayed no more: what it works in is not needed. Whoever knows a short way to it does not hold that either."""
        self._work = Work(lambda values, scalars, send: None)

    def destroy(self, may_move: bool) -> None:
        """Let go of the graph. What others hold of its outputs stays; it is moved to other memory if it may be, and can be."""
        # The outputs first: the memory goes back to the device with the graph only if nobody refers to it any more. Gradients
        # that were held, 98 MiB, kept 2.3 GiB of ResNet-50's (H200).
        if may_move:
            with contextlib.suppress(Exception), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                self._lent.release()
        self._lent.forget()
        self._kept.clear()
        self.free_arena()
        self._recorded.destroy()

    def _alias(self, value: Value, values: list[Any], scalars: Sequence[float]) -> None:
        """The tensor of an output that lies in an input's memory."""
        if values[value.id] is not None:
            return
        before, op = self._places.before.get(value.id), self._places.view_op.get(value.id)
        if before is not None:
            self._alias(before, values, scalars)
            values[value.id] = values[before.id]
        elif op is not None:
            self._alias(op.inputs[0], values, scalars)
            call(op, values, list(scalars))

    def _sentence(self, slot: int) -> str:
        op = reader_of(self.graph, slot)
        where = f"{op.target} at {op.site}" if op is not None else "An operator"
        return f"{where} takes a number that changes from run to run, and is no kernel that could read it from memory."
