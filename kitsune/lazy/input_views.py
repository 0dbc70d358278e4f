"""Views of tensors that only come in, `x[:, :-1]` of a batch or `index.view(-1, 1)`: they are part of no region (see `views.py`),
and neither the lane nor the recorder has to hear of them. Through both of them one took 94 us, and takes 16 (a CPU host
that was busy)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kitsune.lazy.matcher_steps import MISS
from kitsune.lazy.tensor import LazyTensor

# By methods in C, of which each takes one view and does nothing else. `reshape` may copy.
VIEWS = frozenset(
    getattr(Tensor, name)
    for name in "expand expand_as narrow permute select squeeze t transpose unsqueeze view view_as __getitem__".split()
)
_LIKE_ANOTHER = frozenset({Tensor.expand_as, Tensor.view_as})
_GET: Any = Tensor.__getitem__
_NUMBERS, _SIZES = (int, type(None)), (tuple, list, torch.Size)


def view_of_input(lane: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """The view, if that is what a call makes; else MISS."""
    recorder, base = lane.recorder, args[0]
    if type(base) is not Tensor or base.requires_grad or kwargs or not _takes_a_view(func, *args[1:]):
        return MISS
    # A tensor of a transform has no memory that could be pending.
    if others_see(recorder) or recorder.is_pending(base):
        return MISS
    with torch._C._DisableTorchDispatch():
        return func(*args)


def others_see(recorder: Any) -> bool:
    """Are others to see what is made beside a region? Modes of the program's, a transform, a static function that is watched, and
    forward derivatives, of which a view is taken beside it and which may be results."""
    if recorder.watcher is not None or forward_ad._current_level >= 0 or not recorder.is_on_top():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _takes_a_view(func: Any, *rest: Any) -> bool:
    if func in _LIKE_ANOTHER:
        # Another class's function could be in Python.
        return len(rest) == 1 and type(rest[0]) in (Tensor, LazyTensor)
    if func is _GET:
        # A list in it names elements, which are copied.
        return len(rest) == 1 and all(map(is_plain, rest[0] if type(rest[0]) is tuple else rest))
    return all(all(type(n) is int for n in a) if type(a) in _SIZES else type(a) is int for a in rest)


def is_plain(part: Any) -> bool:
    """Is this a number or a slice, of which torch takes a view?"""
    if type(part) is slice:
        return all(type(n) in _NUMBERS for n in (part.start, part.stop, part.step))
    return part is Ellipsis or type(part) in _NUMBERS
