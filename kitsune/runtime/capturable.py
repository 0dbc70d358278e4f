"""Which regions may be captured as a CUDA graph, and why others may not."""

import torch

from kitsune.ir import Graph, Kind, Op, Value, slots_in, storage_of
from kitsune.runtime.alignment import summed_inputs
from kitsune.runtime.places import Places

# Their results on the CPU are the seed and offset of a dropout, which go from the forward call to the backward call only.
_SEEDED = ("_scaled_dot_product_", "_flash_attention_", "_efficient_attention_", "_cudnn_attention_")
# Look at values on the host, whatever they return.
_READS = frozenset(
    "_linalg_check_errors nonzero _unique2 unique_dim unique_consecutive bincount histc _ctc_loss _cudnn_ctc_loss "
    "masked_select repeat_interleave _assert_scalar _local_scalar_dense is_nonzero equal _grouped_mm".split()
)
# Their library's handle is of no use any more once a capture has met it: "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED".
_BREAKS = frozenset({"_linalg_eigh", "linalg_pinv"})
_BY_MASK = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index_put _unsafe_index".split())
_WATCHED = _READS | _BREAKS | _BY_MASK
# Pointwise, but they copy a tensor of the host to the device where others give its number to their kernel.
_COPIES = frozenset("where copy copy_ _to_copy clone".split())


class GraphFacts:
    """What a capture on a device has to know of a graph, whatever its inputs are: found out when the region is made ready.

    `places` are given where they are known already. `inputs` are the numbers of those that it reads, writes or returns, but for
    `host_numbers`: tensors without dimensions on the host, whose values kernels are given (`tokens[:, 0] = 5` makes one);
    `n_values` is one more than the largest number of a value; `refusal` is a sentence saying why it cannot be captured, if so.
    `writers` has, by storage, the first op that writes it, and `shared` the storages of inputs in which results lie; `summed` are
    the inputs of which it may matter how they are aligned.
    """

    def __init__(self, graph: Graph, device: torch.device, places: Places | None = None) -> None:
        self.graph = graph
        self.places = places or Places(graph)
        self.n_values = 1 + max(self.places.root, default=-1)
        self.writers: dict[int, Op] = {}
        used = {v.id for v in graph.outputs}
        for op in graph.ops:
            used.update([v.id for v in op.inputs])
            for storage in op.effects.writes:
                self.writers.setdefault(storage, op)
        self.host_numbers = tuple(v.id for v in graph.inputs if v.id in used and is_host_number(v, graph, device.type))
        self.inputs = tuple(v.id for v in graph.inputs if v.id in used and v.id not in self.host_numbers)
        made = {root.storage for number, root in self.places.root.items() if number not in self.places.inputs}
        self.shared = made.intersection([v.storage for v in graph.inputs])
        self.summed = summed_inputs(graph, self.places)
        self.refusal = self._why_not_captured(device.type)

    def _why_not_captured(self, kind: str) -> str | None:
        graph, used = self.graph, {*self.inputs}
        for value in (*(v for v in graph.inputs if v.id in used), *graph.outputs):
            if value.type.device.type != kind:
                what = f"{_reader(graph, value)} reads" if value in graph.inputs else "The region leaves"
                return f"{what} a tensor on the {value.type.device.type.upper()}, which a CUDA graph does not see change."
        # Most graphs have one device; types are few.
        is_mixed = any(type_.device.type != kind for type_ in {root.type for root in self.places.root.values()})
        for op in graph.ops:
            if (is_mixed or op.target._opname in _WATCHED) and (reason := _why_not_op(op, kind)) is not None:
                return f"{op.target} at {op.site} {reason}."
        return None


def is_host_number(value: Value, graph: Graph, kind: str) -> bool:
    """Is an input a number on the host that is only given to kernels of a device of that kind?"""
    if value.type.device.type != "cpu" or kind == "cpu" or value.type.shape:
        return False
    # Versions that are written, and views, have its storage.
    readers = [op for op in graph.ops if any(v.storage == value.storage for v in (*op.inputs, *op.outputs))]
    takes = (op.kind is Kind.POINTWISE and op.target._opname not in _COPIES for op in readers)
    return all(takes) and not any(value.storage in op.effects.writes for op in readers)


def _reader(graph: Graph, value: Value) -> str:
    """Who reads an input, as a sentence may begin."""
    op = next((op for op in graph.ops if value in op.inputs), None)
    return "The region" if op is None else f"{op.target} at {op.site}"


def host_number_moves(graph: Graph, number: int) -> str:
    """Says so of an input, in a sentence."""
    value = next(v for v in graph.inputs if v.id == number)
    return f"{_reader(graph, value)} is given a number on the host that changes from run to run."


def _why_not_op(op: Op, kind: str) -> str | None:
    name = op.target._opname
    if name in _READS and not (name == "histc" and _has_bounds(op)) and not (name == "_grouped_mm" and _is_one_kernel(op)):
        return "looks at values on the host"
    if name in _BREAKS:
        return "calls a library that does not survive a capture"
    if name in _BY_MASK and any(v.type.dtype in (torch.bool, torch.uint8) for v in op.inputs[1:]):
        return "counts a mask on the host"
    if any(v.type.device.type != kind for v in op.outputs) and not name.startswith(_SEEDED):
        return "computes on another device, once for all replays"
    return None


def _has_bounds(op: Op) -> bool:
    """Without bounds that differ, the least and the largest value are looked for. (Mixtures of experts count their tokens so.)"""
    given = dict(op.kwargs)
    low, high = (op.args[k] if k < len(op.args) else given.get(name, 0) for k, name in ((2, "min"), (3, "max")))
    return low != high


def _is_one_kernel(op: Op) -> bool:
    """Products of groups of rows in another type than this are a product each, of rows from and to where the host looks."""
    return all(v.type.dtype is torch.bfloat16 for v in (*op.inputs[:2], *op.outputs))


def why_not_moving(facts: GraphFacts, number: int, tensor: torch.Tensor) -> str | None:
    """A sentence saying why an input that is at another address each time cannot be copied to one place first."""
    value = facts.places.root[number]
    if writer := facts.writers.get(value.storage):
        return f"An input of the region is at another address each time, and {writer.target} at {writer.site} writes it."
    if value.type.conj or value.type.neg:
        return "An input of the region is at another address each time, and conjugated or negated only in name."
    if not _is_dense(distinct(tensor)):
        return "An input of the region is at another address each time, and its elements share memory."
    if value.storage in facts.shared and _is_part(tensor):
        return "An input of the region is at another address each time, and the region takes views of the memory around it."
    return None


def _is_part(tensor: torch.Tensor) -> bool:
    """Is there more in a tensor's storage than the tensor? Views that count from the start of the memory could reach it."""
    begins = torch._C.TensorBase.storage_offset(tensor)
    return bool(begins) or storage_of(tensor).nbytes() != distinct(tensor).numel() * tensor.itemsize


def reader_of(graph: Graph, slot: int) -> Op | None:
    """The first op that takes a moving number."""
    return next((op for op in graph.ops if any(s.index == slot for s in slots_in((op.args, op.kwargs)))), None)


def distinct(tensor: torch.Tensor) -> torch.Tensor:
    """Each element once: an expanded dimension counts as one element."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and not stride:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _is_dense(tensor: torch.Tensor) -> bool:
    """Does no element lie where another one does?"""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += (size - 1) * stride
    return True
