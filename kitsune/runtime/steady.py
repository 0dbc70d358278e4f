"""Steady state: which regions have come back often enough to be captured, and the graphs that are kept."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kitsune.ir import Kind, Pending, lent_memory
from kitsune.runtime.capturable import GraphFacts, host_number_moves, why_not_moving
from kitsune.runtime.captured import Captured, HostNumberChanged, InputsMoved, Miss, NotCaptured, NumberChanged, TailFailed
from kitsune.runtime.cuda_graph import GraphRecorder, waits_unwatched
from kitsune.runtime.page_reader import PageReader
from kitsune.runtime.slots import SlotTable, bits_of, changed
from kitsune.runtime.steady_region import MakeWork, Outcome, Steady, Told

data_ptr = torch._C.TensorBase.data_ptr
# Ordinary runs before a capture, in which libraries choose. With one more, MLP's third step takes 1.9 ms, eager's 1.3 (H200).
RUNS = 1
# Passes that an input may take until it stays where it is (another region is to be captured), or until it is back where it was.
PATIENCE = 8
# A region that does not stay captured, or is pushed out again and again, costs more than it saves.
MAX_CAPTURES = 6
# Replays after which a capture has paid.
WORTH = 100


class SteadyState:
    """The graphs of one thread and device. `limits()` are how many may be kept and their bytes, `reader()` what they begin with;
    `relieve(hard)` frees what is kept for other runs, if `hard` torch's too; `report(sentence)` hears what was mended."""

    def __init__(
        self,
        device: torch.device,
        recorder: GraphRecorder,
        limits: Callable[[], tuple[int, int]],
        reader: Callable[[], PageReader | None],
        relieve: Callable[[bool], None],
        report: Callable[[str], None],
        told: Told,
    ) -> None:
        self.device, self.recorder, self.limits, self.told = device, recorder, limits, told
        self.reader, self.relieve, self.report = reader, relieve, report
        # The least recently replayed first.
        self._kept: OrderedDict[Steady, Captured] = OrderedDict()

    def region(
        self,
        facts: GraphFacts,
        make_work: MakeWork,
        provisional: bool = False,
        before: Steady | None = None,
        first: Steady | None = None,
    ) -> Steady:
        """What is to be passed to `run` with each run of a region. `before` was passed until now, when it was run in another way:
        its graph is dropped, and what is known of its inputs stays known. `first` is the region that it takes results of, under
        the numbers that these have there."""
        region = Steady(facts, make_work, provisional)
        if before is not None:
            self._take_over(region, before, first)
        if all(op.kind is Kind.VIEW for op in facts.graph.ops):
            # Nothing is lost, and nobody needs to hear of it.
            region.refusal = "The region starts nothing on the device."
        elif facts.refusal is not None:
            self._refuse(region, facts.refusal)
        return region

    def _take_over(self, region: Steady, before: Steady, first: Steady | None) -> None:
        if before.captured is None:
            region.numbers, addresses = before.numbers, dict(zip(before.inputs, before.addresses or (), strict=False))
        else:
            addresses = before.captured.fixed()
        if first is not None and first.captured is not None:
            addresses = {**addresses, **first.captured.fixed(), **first.captured.results()}
        region.on_host = before.on_host
        self._drop(before)
        # Where it ran, nothing but kernels is new, and those are loaded: an ordinary run of MLP's takes 6 ms, where eager's step
        # takes 1.5, and one of BERT's 46 to 67, 10 more than by operators (H200). Else there is one, and then the capture.
        region.at_once = bool(addresses) and {*region.inputs} <= addresses.keys() | before.moving
        region.addresses = [addresses.get(n, 0) for n in region.inputs] if region.at_once else None
        region.n_runs = min(before.n_runs, RUNS - 1)
        region.moving, region.changes, region.moved = before.moving, before.changes, before.moved

    def run(self, region: Steady, values: list[Any], scalars: Sequence[float]) -> Captured | None:
        """Replay the region, or capture it first where it is time. None if it has to be run in the ordinary way."""
        if not self.recorder.follow_stream() or region.refusal is not None:
            return None
        outcome = Outcome.OBSERVE if region.captured is None else self._replay(region, values, scalars)
        if outcome is Outcome.OBSERVE and region.refusal is None and self._agrees(region, values, scalars):
            # A step after an evaluation has its gradients elsewhere, once.
            fits = region.captured is not None and region.captured.n_replays >= PATIENCE
            region.n_elsewhere += fits
            outcome = Outcome.OBSERVE if fits and region.n_elsewhere <= PATIENCE else Outcome.CAPTURE
        if outcome is Outcome.CAPTURE and self._capture(region, values, scalars):
            outcome = self._replay(region, values, scalars)
        return region.captured if outcome is Outcome.DONE else None

    def forget(self, has_room: bool = True) -> None:
        """Destroy every graph. Results that are held are moved: where there is no room for that, what the graphs work in goes
        first."""
        if not has_room:
            for captured in self._kept.values():
                captured.free_arena()
            self.relieve(True)
        for region in [*self._kept]:
            self._forget(region)

    def stay(self) -> None:
        """Replay none of the graphs again, and leave their results where they are. Any thread may say so."""
        for captured in list(self._kept.values()):
            captured.stay()

    def _forget(self, region: Steady) -> None:
        region.n_captures -= 1  # to be captured again, once it comes back, is no sign that it does not fit
        self._drop(region)

    @property
    def nbytes(self) -> int:
        """Memory that the graphs keep."""
        return sum(captured.nbytes for captured in self._kept.values())

    def _replay(self, region: Steady, values: list[Any], scalars: Sequence[float]) -> Outcome:
        assert region.captured is not None
        try:
            region.captured.replay(values, scalars)
        except Miss as miss:
            self.told.missed(str(miss))
            if isinstance(miss, InputsMoved):
                return self._inputs_moved(region, values, miss.numbers)
            if isinstance(miss, NumberChanged):
                return self._number_changed(region, miss)
            if isinstance(miss, HostNumberChanged):
                region.n_captures -= region.captured.n_replays >= WORTH
                self._drop(region)
                return Outcome.OBSERVE
            if region.captured.stays:
                self._forget(region)
            return Outcome.ORDINARY
        except TailFailed as failed:
            self._drop(region)
            assert failed.__cause__ is not None
            raise failed.__cause__ from None
        except torch.OutOfMemoryError:
            self.told.missed("there is no memory for results that are still held")
            self._drop(region)
            return Outcome.ORDINARY
        except Exception as error:
            self._drop(region)
            self._refuse(region, f"A replay failed ({type(error).__name__}: {_first_line(error)}).", mended=True)
            return Outcome.ORDINARY
        self.was_replayed(region)
        return Outcome.DONE

    def was_replayed(self, region: Steady) -> None:
        """Its graph is the one that was used last."""
        self._kept.move_to_end(region)
        region.addresses, region.n_elsewhere = None, 0
        self.told.replayed()

    def _inputs_moved(self, region: Steady, values: list[Any], numbers: list[int]) -> Outcome:
        foreign = [n for n in numbers if lent_memory(values[n]) is None]
        region.changes.update(foreign)
        movable = all(region.changes[n] > 1 and why_not_moving(region.facts, n, values[n]) is None for n in numbers)
        if movable:
            region.moving.update(numbers)
        return Outcome.CAPTURE if movable else Outcome.OBSERVE

    def _number_changed(self, region: Steady, miss: NumberChanged) -> Outcome:
        assert region.captured is not None
        # A schedule that changes it once in a while is worth a capture each time; otherwise who takes it runs after the graph.
        rare = region.captured.n_replays >= WORTH
        known = miss.number in region.moved
        self._drop(region)
        if region.provisional or not rare:
            region.moved.add(miss.number)
        if region.provisional:
            return Outcome.OBSERVE
        region.n_baked_changes = 1 if rare else region.n_baked_changes + known
        region.n_captures -= rare
        if region.n_baked_changes > 1:
            self._refuse(region, str(miss))
        return Outcome.OBSERVE

    def _agrees(self, region: Steady, values: list[Any], scalars: Sequence[float]) -> bool:
        """Have there been enough ordinary runs, and are the inputs where they were at the last one, or may be elsewhere?"""
        before, region.addresses = region.addresses, [data_ptr(values[n]) for n in region.inputs]
        region.n_runs += 1
        numbers, region.numbers = region.numbers, bits_of(scalars)
        moved_on_host = region.moved_on_host(values)
        if before is None:
            return False
        if moved_on_host is not None:
            # A capture has one value of each.
            region.n_waits += 1
            if region.n_waits > PATIENCE:
                self._refuse(region, host_number_moves(region.facts.graph, moved_on_host))
            return False
        if numbers and numbers != region.numbers:
            region.moved.update(changed(numbers, region.numbers))
        if region.n_runs <= RUNS and not region.at_once:
            return False
        apart = [n for n, a, b in zip(region.inputs, before, region.addresses, strict=True) if a != b and n not in region.moving]
        if not apart:
            return True
        reasons = [why_not_moving(region.facts, n, values[n]) for n in apart]
        reason = next((r for r in reasons if r is not None), None)
        # What another region's graph returns will be at one address, as soon as both are captured.
        if reason is not None or any(lent_memory(values[n]) is not None for n in apart):
            region.n_waits += 1
            if region.n_waits <= PATIENCE:
                return False
            if reason is not None:
                self._refuse(region, reason)
                return False
        region.moving.update(apart)
        return True

    def _capture(self, region: Steady, values: list[Any], scalars: Sequence[float]) -> bool:
        if region.captured is not None:
            self._drop(region)
        if region.n_captures >= MAX_CAPTURES:
            self._refuse(region, f"The region was captured {MAX_CAPTURES} times, and never fitted for long.")
            return False
        region.n_captures += 1
        region.moving.update(region.copies_to_come(values))
        max_graphs, max_bytes = self.limits()
        while self._kept and len(self._kept) >= max_graphs:
            self._drop(next(iter(self._kept)))
        try:
            captured = self._record_twice(region, values, scalars)
        except Pending:
            # A variant that no run has needed so far: later.
            region.n_captures -= 1
            return False
        except NotCaptured as refusal:
            self._refuse(region, str(refusal))
            return False
        except Exception as error:
            if not region.at_once:
                self._refuse(region, f"The capture failed ({type(error).__name__}: {_first_line(error)}).", mended=True)
            # It may want an ordinary run.
            region.at_once = False
            return False
        region.captured = self._kept[region] = captured
        while self.nbytes > max_bytes and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))
        if self.nbytes > max_bytes:
            self._drop(region)
            self._refuse(region, f"Its graph needs {captured.nbytes / 2**20:.0f} MiB, more than `graph_memory` allows.")
            return False
        self.told.captured(len(region.facts.graph.ops), captured.nbytes)
        return True

    @waits_unwatched()
    def _record_twice(self, region: Steady, values: list[Any], scalars: Sequence[float]) -> Captured:
        # What ran in the ordinary way so far has its arenas in memory that the graph may need.
        self.relieve(False)
        try:
            return self._record(region, values, scalars)
        except torch.OutOfMemoryError:
            pass
        # Outside of the handler: the error would keep alive what the capture had allocated.
        self.relieve(True)
        return self._record(region, values, scalars)

    def _record(self, region: Steady, values: list[Any], scalars: Sequence[float]) -> Captured:
        table = SlotTable(len(scalars), self.device)
        work = region.make_work(table, frozenset(region.moved))
        if region.provisional and region.moved and work.tail is None:
            raise NotCaptured("Numbers that move would be baked in, and kernels that can read them are on their way.")
        moving = frozenset(region.moving)
        return Captured(region.facts, work, table, self.recorder, values, scalars, moving, self.told.moved, self.reader())

    def _drop(self, region: Steady) -> None:
        captured = self._kept.pop(region, None)
        region.captured = region.addresses = None
        if captured is not None:
            captured.destroy(self.recorder.follow_stream())

    def _refuse(self, region: Steady, reason: str, mended: bool = False) -> None:
        region.refusal, region.addresses = reason, None
        if region.provisional:
            return
        self.told.refused(reason)
        if mended:
            what = f"A region of {len(region.facts.graph.ops)} operators cannot be replayed as a CUDA graph"
            self.report(f"{what}, so it is launched operator by operator. {reason}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")
