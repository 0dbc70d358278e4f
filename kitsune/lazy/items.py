"""Parts of tensors that torch reads or sets in ways which no region can have: `y[:, 0] = 0`, `boxes[:, [0, 2]]`,
`loss[mask].mean()`, `weights[mask] = 0` of what has no history. Each is made of other calls of torch's API, which say the same.

For a number torch makes a tensor on the CPU, and has a view filled with that, and of a list it makes one and copies it to the
device: no call could bring such a tensor along the next time. And what a mask names is counted on the host, for which the region
would have to end.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kitsune.ir import Barrier
from kitsune.lazy.at_once import pass_through
from kitsune.lazy.cell import may_defer
from kitsune.lazy.early_reads import last_change
from kitsune.lazy.input_views import VIEWS, is_plain, others_see, view_of_input
from kitsune.lazy.matcher_steps import MISS
from kitsune.lazy.recording import PLAIN
from kitsune.lazy.region import is_strided
from kitsune.lazy.settings import saves_through_python
from kitsune.lazy.tensor import LazyTensor

_GET: Any = Tensor.__getitem__
_SET: Any = Tensor.__setitem__
_ITEMS = frozenset({_GET, _SET})
PARTS = VIEWS | _ITEMS
_fill: Any = Tensor.fill_
_masked_fill: Any = Tensor.masked_fill_
_nonzero: Any = Tensor.nonzero
_NONZERO = torch.ops.aten.nonzero.default
# How many places masks have named here, or to how many numbers a part was set. Where it is another number each time, what
# follows is another region each time: of a mask, what comes before is to be one of its own, and a number comes in as a tensor.
MANY = 4
# Elements of a mask beyond which the backward is to keep the mask, and not the places: each takes eight bytes a dimension.
LARGE = 1 << 20
_NUMBERS = (int, type(None))
# Places in a list, and lists and numbers that are known: a program that counts up has no end of them.
LISTED, MOST_CONSTANTS = 64, 256
# Of these torch refuses a number beyond the largest one alone, and no sign, zero or infinity.
_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
_base_of: Any = torch._C.TensorBase._base.__get__  # type: ignore[union-attr]


def part(lane: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """What a view, or reading or setting a part of a tensor, returns, if it is made in another way; else MISS."""
    found = view_of_input(lane, func, args, kwargs) if func in VIEWS else MISS
    return _item(lane, func, *args) if found is MISS and func in _ITEMS else found


def _item(lane: Any, func: Any, tensor: Any, index: Any = MISS, value: Any = None) -> Any:
    parts = index if type(index) is tuple else (index,)
    k = next((k for k, part in enumerate(parts) if isinstance(part, Tensor) and part.dtype is torch.bool), None)
    if k is not None:
        fits = _is_recorded(lane, tensor) and _is_recorded(lane, parts[k]) and _is_mask_of(tensor, parts, k)
        return _of_mask(lane, func, tensor, parts, k, value) if fits else MISS
    if func is _SET and type(tensor) is LazyTensor and _may_be_filled(tensor, value) and _is_part(parts):
        recorder, node = lane.recorder, lane.recorder.region.node
        node.named |= {_key_of(value)}
        if len(node.named) > MANY:
            return lane.call(_SET, (), (tensor, index, _constant(recorder, value, tensor.dtype, tensor.device)))
        lane.call(_fill, (), (lane.call(_GET, (), (tensor, index)), value))
        return None
    return _by_tensors(lane, func, tensor, parts, value)


def _by_tensors(lane: Any, func: Any, tensor: Any, parts: tuple[Any, ...], value: Any) -> Any:
    """By tensors that are the same ones each time, in place of lists of places, and of a number that is set at places."""
    recorder = lane.recorder
    lists = [k for k, part in enumerate(parts) if type(part) is list]
    is_set = func is _SET and type(tensor) is LazyTensor and _may_be_filled(tensor, value)
    if not lists and not (is_set and any(isinstance(part, Tensor) for part in parts)):
        return MISS
    if not _is_recorded(lane, tensor) or others_see(recorder) or not all(map(_is_places, (parts[k] for k in lists))):
        return MISS
    if len(lists) < len(parts) and not all(is_plain(p) or type(p) is list or _is_recorded(lane, p) for p in parts):
        return MISS
    parts = tuple(_constant(recorder, p, None, tensor.device) if type(p) is list else p for p in parts)
    if func is _GET:
        return lane.call(func, (), (tensor, parts))
    return lane.call(func, (), (tensor, parts, _constant(recorder, value, tensor.dtype, tensor.device) if is_set else value))


def _is_places(part: Any) -> bool:
    return 0 < len(part) <= LISTED and all(type(n) is int for n in part)


def _key_of(value: Any) -> Any:
    """Tells numbers apart, which compare as 0.0 == -0.0 and 1 == True, and lists of whole ones."""
    return tuple(value) if type(value) is list else value.hex() if type(value) is float else (type(value), value)


def _constant(recorder: Any, value: Any, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """The tensor of a number or a list of places."""
    constants, key = recorder.known.constants, (_key_of(value), dtype, device)
    if key not in constants:
        if len(constants) >= MOST_CONSTANTS:
            constants.clear()
        with torch.inference_mode(False), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            constants[key] = torch.tensor(value, dtype=dtype, device=device)
    return constants[key]  # type: ignore[no-any-return]


def _of_mask(lane: Any, func: Any, tensor: Any, parts: tuple[Any, ...], k: int, value: Any) -> Any:
    recorder, mask = lane.recorder, parts[k]
    owns = torch.is_grad_enabled() and tensor.requires_grad
    if func is _SET and len(parts) == 1 and type(tensor) is LazyTensor and _may_be_filled(tensor, value) and not owns:
        # As torch does it below autograd, which has another name for it.
        deeper = tensor.dim() - mask.dim()
        mask = lane.call(_GET, (), (mask, (Ellipsis, *[None] * deeper))) if deeper else mask
        lane.call(_masked_fill, (), (tensor, mask, value))
        return None
    # Who is shown what a backward keeps, or makes it again behind our back (a checkpoint), is to find the mask.
    # And torch refuses to keep one that was made for inference.
    if torch.is_grad_enabled() and (saves_through_python() or mask.is_inference()):
        return MISS
    node = recorder.region.node
    if (func is _SET and not (isinstance(value, Tensor) and value.dim())) or len(node.named) > MANY or mask.numel() > LARGE:
        return MISS
    if recorder.is_pending(mask):
        # As a number is read of what is computed so far.
        recorder.flush(Barrier.ITEM)
    places = _places_of(lane, mask)
    node.named |= {len(places[0])}
    index = (*parts[:k], *places, *parts[k + 1 :])
    return lane.call(func, (), (tensor, index) if func is _GET else (tensor, index, value))


def _places_of(lane: Any, mask: Any) -> list[torch.Tensor]:
    """The places that a mask names, those of each dimension. Eager asks for these as well, and waits as long."""
    recorder, region = lane.recorder, lane.recorder.region
    if others_see(recorder):
        return _each(recorder, lane.made(_nonzero, (mask,)), mask.dim())
    real: Any = mask.cell.real if type(mask) is LazyTensor else mask
    # Of outputs and targets the same mask is asked for in turn: as other inputs of the region, it is what it was when it came.
    # (Those that were counted for inference no backward may keep.)
    known = (id(real), 0 if mask.is_inference() else mask._version, last_change(), torch.is_inference_mode_enabled())
    if region.places is not None and region.places[0] == known and may_defer(real):
        return region.places[1]
    with recorder.lock:
        places = pass_through(recorder, recorder.describe(_NONZERO), (mask,), {}, Barrier.DATA_DEPENDENT)
    each = _each(recorder, places, mask.dim())
    region.places = known, each, real
    return each


def _each(recorder: Any, places: torch.Tensor, n: int) -> list[torch.Tensor]:
    with recorder.below_autograd():
        # Each dimension's in memory of its own: what comes in is known by its memory.
        return [places.view(-1)] if n == 1 else [numbers.clone() for numbers in places.unbind(1)]


def _is_recorded(lane: Any, tensor: Any) -> bool:
    """Is this a tensor that regions have to do with?"""
    if type(tensor) is LazyTensor:
        return True
    return type(tensor) in PLAIN and tensor.device in lane.recorder.targets and is_strided(tensor)


def _is_mask_of(tensor: Any, parts: tuple[Any, ...], k: int) -> bool:
    """Does part `k` name elements of all dimensions that it has, as torch has it, with numbers and slices beside it?"""
    if not all(type(part) is slice or type(part) in _NUMBERS for n, part in enumerate(parts) if n != k):
        return False
    first, mask = sum(part is not None for part in parts[:k]), parts[k]
    return mask.dim() > 0 and tensor.shape[first : first + mask.dim()] == mask.shape


def _may_be_filled(tensor: Any, value: Any) -> bool:
    """May a result, or a part of it, be filled with this, which is a number of its dtype?

    A view of a parameter, taken without gradients, would leave the backward of a region that writes it unknown.
    """
    # Torch says at once of a number that the dtype has no room for it, of what has several elements in one place, and of a leaf,
    # or a view that was taken without gradients, that they may not be written.
    if type(value) not in (int, float, bool) or not _has_room(tensor.dtype, value) or 0 in tensor.stride():
        return False
    return not torch.is_grad_enabled() or not (tensor.is_leaf if tensor.requires_grad else _base_of(tensor) is not None)


def _has_room(dtype: torch.dtype, value: Any) -> bool:
    if dtype not in _FLOATS:
        if dtype in _INTEGERS and type(value) is int:
            return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max
        return dtype is torch.bool and type(value) is bool
    if type(value) is int and not -(2**63) <= value < 2**63:
        return False
    return not math.isfinite(value) or abs(value) <= torch.finfo(dtype).max


def _is_part(parts: tuple[Any, ...]) -> bool:
    """Do they name a part, of which torch takes a view, by numbers and slices?"""
    return all(map(is_plain, parts)) and any(map(_takes_part, parts))


def _takes_part(part: Any) -> bool:
    return any(n is not None for n in (part.start, part.stop, part.step)) if type(part) is slice else part is not Ellipsis
