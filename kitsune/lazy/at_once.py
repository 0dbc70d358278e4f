"""Calls that are made at once, on real tensors: what eager would do, with what it needs flushed first."""

import contextlib
from typing import Any

import torch

from kitsune.ir import Barrier, OpRow, list_writes_counted, may_have_drawn, own, type_of
from kitsune.lazy.aliases import for_inference
from kitsune.lazy.casts import lets_out
from kitsune.lazy.cell import serial_of
from kitsune.lazy.early_reads import memory_changed
from kitsune.lazy.rebuild import replace_tensors, tensors_in
from kitsune.lazy.recording import PLAIN, Recording
from kitsune.lazy.region import is_strided
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trie import written_operands

_NOTHING: Any = contextlib.nullcontext()


def call(recorder: Any, row: OpRow, args: Any, kwargs: Any, tensors: list[Any]) -> tuple[Any, list[Any]]:
    """Make a call on real tensors, its writes counted; returns the result and the operands."""
    func = row.target
    reals = [t if type(t) is not LazyTensor else real if (real := t.cell.real) is not None else _real(t) for t in tensors]
    if row.is_view or row.moves_metadata or row.works_aside:
        # A graph hands the same tensors out at every replay, with the geometry that they were left with; and it moves those that
        # are held, behind what it knows to be under way.
        for tensor, real in zip(tensors, reals, strict=True):
            if type(tensor) is LazyTensor:
                own(real)
    by_id = dict(zip(map(id, tensors), reals, strict=True))
    real_args, real_kwargs = replace_tensors(args, by_id), replace_tensors(kwargs, by_id) if kwargs else kwargs
    foreign = row.is_foreign or not PLAIN.issuperset(map(type, reals))
    if row.writes or foreign:
        memory_changed()
    # By the table, since the list kernels of a CPU count none where they are called below autograd.
    written = [list(written_operands(row, *given)) for given in ((args, kwargs), (real_args, real_kwargs)) if row.bumps]
    counted = list_writes_counted(*written) if written else _NOTHING
    if foreign:
        # Python of others may run inside, which is to see its own dispatch modes and subclasses.
        with recorder.with_bits(), counted:
            return func(*real_args, **real_kwargs), reals
    try:
        return _made(recorder, row, real_args, real_kwargs, counted), reals
    except torch.OutOfMemoryError:
        # Of several operands it may have written one. And an operand has its new geometry by now, without memory for it: torch,
        # asked once more, would find nothing to do, and write beyond the end.
        begun = row.moves_metadata or may_have_drawn(func, row.random) or len(list(written_operands(row, args, kwargs))) > 1
        if begun or recorder.let_go is None:
            raise
    # Outside of the handler: the error would keep alive what the call had allocated.
    with recorder.below_autograd():
        recorder.let_go()
    return _made(recorder, row, real_args, real_kwargs, list_writes_counted(*written) if written else _NOTHING), reals


def _made(recorder: Any, row: OpRow, args: Any, kwargs: Any, counted: Any) -> Any:
    with recorder.below_autograd(recorder.casts_inside(row), row.bumps), torch._C.DisableTorchFunction():
        if not row.bumps:
            # What the overload itself calls, and nothing else.
            return row.target._op(*args, **kwargs)
        with counted:
            return row.target(*args, **kwargs)


def pass_through(recorder: Recording, row: OpRow, args: Any, kwargs: Any, reason: Barrier | None) -> Any:
    """Run an op as eager does, outside of any region; what it needs is flushed first."""
    assert reason is not None
    tensors = tensors_in((args, kwargs))
    flush_for(recorder, row, args, kwargs, tensors, reason)
    counts = bool(recorder.counting) and _only_counts(recorder.counting, row, args, tensors)
    if row.moves_metadata and tensors:
        lets_out(recorder, tensors[0])
    if reason not in (Barrier.INPUT_VIEW, Barrier.PROFILER) and not counts:
        recorder.n_unrecorded += 1
    early = recorder.early.answer(row, tensors[0]) if reason is Barrier.ITEM and tensors else None
    try:
        result, reals = call(recorder, row, args, kwargs, tensors) if early is None else (early, tensors)
    except RuntimeError:
        _take_geometry(recorder, row, tensors)
        raise
    if recorder.watcher is not None and not counts:
        recorder.watcher.passed(row, args, kwargs, reason)
    return hand_out(recorder, row, result, tensors, reals, reason)


def _only_counts(counting: frozenset[int], row: OpRow, args: Any, tensors: list[Any]) -> bool:
    """Does an op of an update count its steps on the host, or read such a count? Of both the update's numbers tell."""
    written = list(written_operands(row, args, {})) if row.writes else tensors
    return bool(written) and all(id(t) in counting for t in written)


def flush_for(recorder: Recording, row: OpRow, args: Any, kwargs: Any, tensors: list[Any], reason: Barrier) -> None:
    """Flush if an op that is to run now reads what is pending, writes what the region uses, or draws random numbers in turn."""
    touched = written_operands(row, args, kwargs)
    if (
        # What another library's Python reads, writes and draws is not known.
        reason in (Barrier.FOREIGN_NAMESPACE, Barrier.FOREIGN_TENSOR)
        or (row.random and recorder.region.node.random)
        or any(recorder.is_pending(t) for t in tensors)
        or any(recorder.takes_part(t) for t in touched)
    ):
        recorder.flush(reason)


def hand_out(recorder: Recording, row: OpRow, result: Any, tensors: list[Any], reals: list[Any], reason: Barrier) -> Any:
    if reason not in (Barrier.PROFILER, Barrier.INPUT_VIEW):
        recorder.tally.passed_through[(reason, str(row.target))] += 1
    back: dict[int, torch.Tensor] = {id(real): t for real, t in zip(reals, tensors, strict=True) if type(t) is LazyTensor}
    _take_geometry(recorder, row, tensors)
    if torch.is_inference_mode_enabled() or any(t.is_inference() for t in tensors):
        back |= _made_for_inference(result, tensors, reals)
    return replace_tensors(result, back) if back else result


def _made_for_inference(result: Any, tensors: list[Any], reals: list[Any]) -> dict[int, torch.Tensor]:
    """The inference tensors that stand for results: kernels run outside of the mode, where they make none. What is on the memory
    of an operand is of its kind."""
    operands = {serial_of(real): t.is_inference() for t, real in zip(tensors, reals, strict=True) if _is_plain(real)}
    infers = torch.is_inference_mode_enabled()
    mine = {*map(id, tensors), *map(id, reals)}
    made = [t for t in tensors_in(result) if id(t) not in mine and _is_plain(t) and not t.is_inference()]
    return {id(t): for_inference(t) for t in made if operands.get(serial_of(t), infers)}


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in PLAIN and is_strided(tensor)


def _take_geometry(recorder: Recording, row: OpRow, tensors: list[Any]) -> None:
    """The op may have given its operands another geometry, also if it was refused then."""
    if row.moves_metadata:
        recorder.known.forget()
        for wrapper in tensors:
            if type(wrapper) is LazyTensor and type_of(real := _real(wrapper)) is not wrapper.cell.type:
                recorder.stand_for(wrapper, real)


def _real(tensor: LazyTensor) -> Any:
    cell = tensor.cell
    return cell.real if cell.real is not None else cell.region.recorder.materialize(cell, Barrier.OUTSIDE)
