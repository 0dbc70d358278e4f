"""Ops that are not known at their place in the region: observed, inferred, or left to eager."""

from operator import attrgetter
from typing import Any, NamedTuple

import torch

from kitsune.ir import Barrier, Kind, Operand, OpRow, OutputSpec, TensorType, describe_result, type_of
from kitsune.lazy.at_once import call as call_at_once, flush_for, hand_out, pass_through
from kitsune.lazy.cell import Cell
from kitsune.lazy.growing import grow
from kitsune.lazy.rebuild import fill, replace_tensors, tensors_in, without_numbers
from kitsune.lazy.recording import PLAIN
from kitsune.lazy.region import is_strided
from kitsune.lazy.sites import user_site
from kitsune.lazy.trie import Node, agrees

MASKS = (torch.bool, torch.uint8)
COMMON = (torch.float32, torch.float64)
_device = attrgetter("device")
# From `Recorder.record` to `extend`.
OWN_FRAMES = 4
# New ops between two times that it is told how many there are.
GROWTH = 128
# Those that a program begins with tell it from others: the more there are, the later in its first step it is known.
FIRST = 32


class Call(NamedTuple):
    """One aten call on its way in: `tensors` are its operands in order."""

    row: OpRow
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: tuple[Any, ...]
    tensors: list[Any]


def first_sight(recorder: Any, call: Call, node: Node | None) -> Any:
    reason = why_not(recorder, call)
    if reason is None and recorder.on_new != "record":
        reason = at_new(recorder, call)
    if reason is not None:
        recorder.region.rollback()
        return pass_through(recorder, call.row, call.args, call.kwargs, reason)
    if recorder.region.observed_from is None:
        if recorder.lane is not None and recorder.lane.part_of_update and only_writes(recorder, call):
            return record_write(recorder, call, node)
        if not recorder.warmup:
            return record_new(recorder, call)
    return observe(recorder, call, node)


def why_not(recorder: Any, call: Call) -> Barrier | None:
    """Why a call cannot be part of a region."""
    region, named = recorder.region, call.kwargs.get("device")
    on_target = not recorder.targets.isdisjoint(map(_device, call.tensors))
    if region.odd is Barrier.OTHER_DEVICE and on_target:
        return Barrier.HOST_COPY
    if region.odd is not None:
        return region.odd
    if recorder.unstable and call.row.target in recorder.unstable:
        return Barrier.UNTRUSTED
    if call.row.counts_masks and any(t.dtype in MASKS for t in call.tensors[1:]):
        return Barrier.DATA_DEPENDENT
    if call.kwargs.get("pin_memory"):
        return Barrier.UNSUPPORTED
    # A factory with no device= makes a CPU tensor.
    here = on_target if call.tensors else named is not None or recorder.device.type == "cpu"
    return None if here else Barrier.OTHER_DEVICE


def at_new(recorder: Any, call: Call) -> Barrier:
    """What the stance says of an op that could be recorded and is not known: it is left to eager, or refused."""
    if recorder.on_new == "fail":
        raise RuntimeError(
            f"{call.row.target} at {user_site() or 'no line of Python'} is not known at its place, and would be recorded anew; "
            'the stance is "fail_on_recompile". Let the region be seen before that is set, or use "eager_on_recompile".'
        )
    return Barrier.STANCE


def observe(recorder: Any, call: Call, node: Node | None) -> Any:
    """Make the call now and record it with its real results."""
    region = recorder.region
    if region.observed_from is None:
        if region.node.depth:
            recorder.flush(Barrier.DIVERGED, end=False)
        region.observed_from, region.slow = region.node.depth, True
    try:
        result, reals = call_at_once(recorder, call.row, call.args, call.kwargs, call.tensors)
    except BaseException:
        region.rollback()
        raise
    if not _is_recordable(result):
        region.rollback()
        return hand_out(recorder, call.row, result, call.tensors, reals, Barrier.FOREIGN_LAYOUT)
    spec, new = describe_result(result, reals, type_of)
    if recorder.region is not region:
        # What ran inside has flushed (a finalizer, Python of another library): the op is done, and part of no region.
        return _settle(recorder, call, spec, new)
    if node is not None and not agrees(node, spec, region.cells(call.tensors)):
        recorder.unstable.add(call.row.target)
        node = None
    if node is None:
        node = extend(recorder, call, spec)
    node.sights += 1
    node.known = node.sights >= recorder.warmup
    if region.inputs:
        region.let_go()
    return recorder.emit(node, call.tensors, new)


def only_writes(recorder: Any, call: Call) -> bool:
    """Would making this call teach nothing: does it write to its operands, return nothing, and find nothing to object to?"""
    region = recorder.region
    if not region.node.known or not call.row.in_place or call.row.target._schema.returns:
        return False
    lists = [a for a in (*call.args, *call.kwargs.values()) if type(a) is list and a and isinstance(a[0], torch.Tensor)]
    types = [[region.cell(t).type for t in a] for a in lists]
    shapes = [[t.shape for t in of] for of in types]
    # All tensors are in lists, which are as long as each other and alike; but a count of steps is a single number.
    alike = all(of == shapes[0] or (len(of) == len(shapes[0]) and not any(of)) for of in shapes)
    known = sum(map(len, lists)) == len(call.tensors)
    return known and alike and _is_trusted(call, region.cells(call.tensors))


def record_write(recorder: Any, call: Call, node: Node | None) -> Any:
    """Record a call that only writes. An update that is new, as the second one of a momentum is, does not end its region: what
    was recorded before it need be neither run nor prepared for a run without it."""
    node = node or extend(recorder, call, OutputSpec((), None))
    node.known = True
    return recorder.emit(node, call.tensors)


def record_new(recorder: Any, call: Call) -> Any:
    """warmup=0: the results' types come from the same call seen elsewhere, from meta tensors, or from making it now."""
    cells = recorder.region.cells(call.tensors)
    spec_key = (torch.get_default_dtype(), without_numbers(call.key, cells))
    spec = recorder.specs.get(spec_key)
    if spec is None and _is_trusted(call, cells):
        places = {id(t): Operand(k) for k, t in reversed(list(enumerate(call.tensors)))}
        args, kwargs = replace_tensors((call.args, call.kwargs), places)
        recorder.inferring = True
        try:
            spec = recorder.infer(call.row.target, args, kwargs, [(c.type, c.storage) for c in cells], recorder.device)
        finally:
            recorder.inferring = False
        if spec is not None:
            recorder.specs[spec_key] = spec
    if spec is not None:
        node = extend(recorder, call, spec)
        node.known = True
        return recorder.emit(node, call.tensors)
    recorder.region.rollback()
    flush_for(recorder, call.row, call.args, call.kwargs, call.tensors, Barrier.UNTRUSTED)
    result, reals = call_at_once(recorder, call.row, call.args, call.kwargs, call.tensors)
    recorder.tally.observed += 1
    if not _is_recordable(result):
        return hand_out(recorder, call.row, result, call.tensors, reals, Barrier.FOREIGN_LAYOUT)
    spec, new = describe_result(result, reals, type_of)
    recorder.specs[spec_key] = spec
    return _settle(recorder, call, spec, new)


def _settle(recorder: Any, call: Call, spec: OutputSpec, new: list[torch.Tensor]) -> Any:
    return fill(spec.structure, [recorder.settled(real) for real in new], call.tensors)


def _is_trusted(call: Call, cells: list[Cell]) -> bool:
    """Would meta tensors give the layout that the kernel gives, and raise where it raises?

    They do not know which dtypes a kernel lacks (subtracting a bool, a float written into an int), which memory overlaps, nor
    the strides of results on empty or strided operands (of 9,500 calls, all that differed had such an operand; one element
    expanded by a sum's backward is no harm). What they do not know is made for real once.
    """
    row, types = call.row, [c.type for c in cells]
    if row.target is torch.ops.aten.as_strided.default:
        return _stays_inside(call, types[0])
    if not row.trusted or row.kind is Kind.VIEW:
        return row.trusted
    if row.scalars_move and any(type(a) is bool for a in call.args):
        return False
    if any(type(a) is complex for a in (*call.args, *call.kwargs.values())):
        return False
    # Of one dtype: mixtures are promoted by some kernels and refused by others (matrix products).
    if len({t.dtype for t in types}) > 1 or any(t.dtype not in COMMON for t in types):
        return False
    if any(isinstance(k, torch.dtype) and k not in COMMON for k in call.key):
        return False
    if row.writes:
        overlapping = any(stride == 0 and n > 1 for t in types for n, stride in zip(t.shape, t.stride, strict=True))
        return not overlapping and len({c.storage for c in cells}) == len(cells)
    plain = all(t.nbytes and (t.canonical or (t.expanded and row.kind is Kind.POINTWISE)) for t in types)
    return _fits(types) if row.kind is Kind.GEMM else plain


def _stays_inside(call: Call, type_: TensorType) -> bool:
    """Does as_strided show no more memory than its operand? How much more there is, a type does not tell."""
    size, stride, offset = (*call.args[1:], type_.offset)[:3]
    last = type_.offset + sum((n - 1) * s for n, s in zip(type_.shape, type_.stride, strict=True))
    return type_.nbytes > 0 and (offset or 0) + sum((n - 1) * s for n, s in zip(size, stride, strict=True) if n) <= last


def _fits(types: list[TensorType]) -> bool:
    """Can the tensor that a matrix product is added to be expanded to the product? Meta tensors do not ask."""
    if len(types) < 3:
        return True
    added, left, right = (t.shape for t in types)
    product = (*left[:-1], right[-1]) if len(right) > 1 else left[:-1]
    return len(added) <= len(product) and all(a in (1, n) for a, n in zip(reversed(added), reversed(product), strict=False))


def extend(recorder: Any, call: Call, spec: OutputSpec) -> Node:
    region = recorder.region
    cells = region.cells(call.tensors)
    node = grow(region, call.row, call.args, call.kwargs, cells, call.tensors, spec, user_site(OWN_FRAMES))
    if node.depth >= recorder.max_ops or node.nbytes > recorder.max_bytes:
        node.full = Barrier.BOUND
    region.node.children[call.key] = node
    recorder.n_nodes += 1
    if not recorder.n_nodes % GROWTH:
        recorder.on_growth(GROWTH)
    if call.row.makes_plans:
        recorder.on_plans(node.op)
    if recorder.n_nodes == FIRST and recorder.begins is not None:
        recorder.begins([one.op for one in node.path()])
    return node


def _is_recordable(result: Any) -> bool:
    if type(result) is torch.Tensor:
        return is_strided(result)
    return all(type(t) in PLAIN and is_strided(t) for t in tensors_in(result))
