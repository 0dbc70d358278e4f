"""Views that are no ordinary ops of a region: of what only comes in, and of what is older than the inference mode that is on."""

from typing import Any

import torch
from torch import Tensor

from kitsune.ir import Barrier, OpRow
from kitsune.lazy.at_once import pass_through
from kitsune.lazy.derived import take_again
from kitsune.lazy.hands_off import WHOLE_VIEWS
from kitsune.lazy.tensor import LazyTensor

# What `take_view` says of a view that is an op like others.
RECORD = object()
infers = torch.is_inference_mode_enabled


def take_view(recorder: Any, row: OpRow, args: Any, kwargs: Any) -> Any:
    """Take a view; returns it, or RECORD."""
    base = args[0] if args else None
    if recorder.walk is not None and type(base) is Tensor and not base.requires_grad and not recorder.walk.comes(row, base):
        # As it was taken when the call was followed, also if it has been written since.
        with torch._C._DisableTorchDispatch():
            view = row.target(*args, **kwargs)
        take_again(recorder.region, recorder.walk.views, view)
        return view
    if _only_comes_in(recorder, base) and not _is_seen_as_matrix(recorder, row, base):
        return pass_through(recorder, row, args, kwargs, Barrier.INPUT_VIEW)
    if not infers() or not isinstance(base, Tensor) or base.is_inference():
        return RECORD
    # It shares its base's count of writes, which an inference tensor has none of: torch would refuse the wrapper.
    with torch.inference_mode(False), torch.no_grad():
        return recorder.record(row.target, (), args, kwargs)


def _only_comes_in(recorder: Any, tensor: Any) -> bool:
    """Is this a tensor from outside the region, which the region has not written and which needs no gradient?"""
    region = recorder.region
    if type(tensor) is LazyTensor:
        cell = tensor.cell
        outside = cell.region is not region or cell.external
        return outside and cell.real is not None and not tensor.requires_grad and not recorder.is_pending(tensor)
    return type(tensor) is Tensor and not tensor.requires_grad and not recorder.is_pending(tensor)


def _is_seen_as_matrix(recorder: Any, row: OpRow, tensor: Any) -> bool:
    """Is it viewed by the product that it is an operand of? A view says where it is in its memory, so that batches that begin
    elsewhere each time would make regions of their own."""
    if not recorder.making or row.target not in WHOLE_VIEWS:
        return False
    return recorder.walk.comes(row, tensor) if recorder.walk is not None else not tensor.storage_offset()
