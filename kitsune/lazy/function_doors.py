"""Functions of torch's that read a tensor, or ask for its address, from C++ before any dispatcher: what they get instead."""

import functools
import threading
from typing import Any

import torch

from kitsune.ir import Barrier
from kitsune.lazy.rebuild import replace_tensors, tensors_in
from kitsune.lazy.recorders import listening


def places_door(original: Any) -> Any:
    """torch.tensor_split reads a tensor of places from C++."""

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        name = "tensor_indices_or_sections"
        places: Any = args[1] if len(args) > 1 else kwargs.get(name)
        # Any other tensor makes it raise, in words of its own.
        fits = isinstance(places, torch.Tensor) and places.dtype is torch.int64 and places.dim() < 2
        if fits and places.device.type == "cpu" and listening():
            numbers = places.tolist()
            args, kwargs = replace_tensors((args, {**kwargs}), {id(places): numbers})
            if name in kwargs:
                kwargs["indices" if isinstance(numbers, list) else "sections"] = kwargs.pop(name)
        return original(*args, **kwargs)

    return door


def lengths_door(original: Any) -> Any:
    """On a CPU, the mean of torch.ctc_loss makes a tensor of a list of lengths, and fills its memory from C++.

    Elsewhere torch reads a tensor of lengths, but not where a dispatch mode is on: then it asks for it on the device.
    """

    @functools.wraps(original)
    def door(log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, *args: Any, **kwargs: Any) -> Any:
        given = (input_lengths, target_lengths)
        mean = (args[1] if len(args) > 1 else kwargs.get("reduction", 1)) == 1
        if mean and log_probs.device.type == "cpu" and all(isinstance(lengths, (list, tuple)) for lengths in given):
            input_lengths, target_lengths = (torch.tensor(lengths, dtype=torch.int64) for lengths in given)
        elif log_probs.device.type != "cpu" and all(isinstance(t, torch.Tensor) for t in given) and listening():
            input_lengths, target_lengths = (lengths.tolist() for lengths in given)
        return original(log_probs, targets, input_lengths, target_lengths, *args, **kwargs)

    return door


def recurrent_door(original: Any) -> Any:
    """Under autocast, weights for cuDNN are cast into one piece of memory, in which C++ asks for places: as in `disable()`."""

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        on_cuda = any(t.device.type == "cuda" for t in tensors_in((args, kwargs)))
        recorders = _of_this_thread() if on_cuda and torch.is_autocast_enabled("cuda") else []
        for recorder in recorders:
            recorder.flush(Barrier.DOOR)
            recorder.pause()
        try:
            return original(*args, **kwargs)
        finally:
            for recorder in recorders:
                recorder.resume()

    return door


def _of_this_thread() -> list[Any]:
    return [recorder for recorder in listening() if recorder.lane is not None and recorder.lane.thread == threading.get_ident()]
