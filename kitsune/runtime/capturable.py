"""Which regions may be captured as a CUDA graph, and why others may not."""

import torch

from kitsune.ir import Graph, Op, TensorType, slots_in, storage_of

# Their results on the CPU are the seed and offset of a dropout, which go from the forward call to the backward call only.
_SEEDED = ("_scaled_dot_product_", "_flash_attention_", "_efficient_attention_", "_cudnn_attention_")
# Look at values on the host, whatever they return.
_READS = frozenset(
    "_linalg_check_errors nonzero _unique2 unique_dim unique_consecutive bincount histc _ctc_loss _cudnn_ctc_loss "
    "masked_select repeat_interleave _assert_scalar _local_scalar_dense is_nonzero equal".split()
)
# Their library's handle is of no use any more once a capture has met it: "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED".
_BREAKS = frozenset({"_linalg_eigh", "linalg_pinv"})
_BY_MASK = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index_put _unsafe_index".split())
_LOOKED_AT = _READS | _BREAKS | _BY_MASK


def why_not_captured(graph: Graph, device: torch.device) -> str | None:
    """A sentence saying why a region of a device cannot be captured, whatever its inputs are; None if it may be tried."""
    used = set(used_inputs(graph))
    for value in (*(v for v in graph.inputs if v.id in used), *graph.outputs):
        if value.type.device.type != device.type:
            what = "reads a tensor on" if value in graph.inputs else "leaves a tensor on"
            return f"The region {what} the {value.type.device.type.upper()}, which a CUDA graph does not see change."
    # A step of BERT with 6 layers has 60 types and 2,500 values.
    elsewhere = {type_ for type_ in {v.type for op in graph.ops for v in op.outputs} if type_.device.type != device.type}
    for op in graph.ops:
        if (elsewhere or op.target._opname in _LOOKED_AT) and (reason := _why_not_op(op, elsewhere)) is not None:
            return f"{op.target} at {op.site} {reason}."
    return None


def _why_not_op(op: Op, elsewhere: set[TensorType]) -> str | None:
    """`elsewhere` are the types of results on other devices."""
    name = op.target._opname
    if name in _READS:
        return "looks at values on the host"
    if name in _BREAKS:
        return "calls a library that does not survive a capture"
    if name in _BY_MASK and any(v.type.dtype in (torch.bool, torch.uint8) for v in op.inputs[1:]):
        return "counts a mask on the host"
    if elsewhere and any(v.type in elsewhere for v in op.outputs) and not name.startswith(_SEEDED):
        return "computes on another device, once for all replays"
    return None


def why_not_moving(graph: Graph, number: int, tensor: torch.Tensor) -> str | None:
    """A sentence saying why an input that is at another address each time cannot be copied to one place first."""
    value = next(v for v in graph.inputs if v.id == number)
    if writer := writer_of(graph, value.storage):
        return f"An input of the region is at another address each time, and {writer.target} at {writer.site} writes it."
    if value.type.conj or value.type.neg:
        return "An input of the region is at another address each time, and conjugated or negated only in name."
    if not _is_dense(distinct(tensor)):
        return "An input of the region is at another address each time, and its elements share memory."
    if any(v.storage == value.storage for op in graph.ops for v in op.outputs) and _is_part(tensor):
        return "An input of the region is at another address each time, and the region takes views of the memory around it."
    return None


def _is_part(tensor: torch.Tensor) -> bool:
    """Is there more in a tensor's storage than the tensor? Views that count from the start of the memory could reach it."""
    begins = torch._C.TensorBase.storage_offset(tensor)
    return bool(begins) or storage_of(tensor).nbytes() != distinct(tensor).numel() * tensor.itemsize


def writer_of(graph: Graph, storage: int) -> Op | None:
    """The first op that writes a storage."""
    return next((op for op in graph.ops if storage in op.effects.writes), None)


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


def used_inputs(graph: Graph) -> tuple[int, ...]:
    """The numbers of the inputs that the graph reads, writes or returns."""
    used = {v.id for op in graph.ops for v in op.inputs} | {v.id for v in graph.outputs}
    return tuple(v.id for v in graph.inputs if v.id in used)
