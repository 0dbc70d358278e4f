"""Doors of functions whose C++ does with an argument what the dispatcher does not show."""

import functools
from typing import Any

import torch

from kitsune.ir import Barrier
from kitsune.lazy.door_makers import listening
from kitsune.lazy.rebuild import replace_tensors


def lengths_door(original: Any) -> Any:
    """On a CPU, the mean of torch.ctc_loss makes a tensor of a list of lengths, and fills its memory from C++."""

    @functools.wraps(original)
    def door(log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, *args: Any, **kwargs: Any) -> Any:
        given = (input_lengths, target_lengths)
        mean = (args[1] if len(args) > 1 else kwargs.get("reduction", 1)) == 1
        if mean and log_probs.device.type == "cpu" and all(isinstance(lengths, (list, tuple)) for lengths in given):
            input_lengths, target_lengths = (torch.tensor(lengths, dtype=torch.int64) for lengths in given)
        return original(log_probs, targets, input_lengths, target_lengths, *args, **kwargs)

    return door


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


def packing_door(original: Any) -> Any:
    """Under autocast on CUDA, C++ casts a recurrent network's weights into one tensor, which it has the dispatcher make and then
    writes where its memory should be: recorded, it has none."""

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        packs = torch.is_autocast_enabled("cuda") and args[0].is_cuda
        recorders = list(listening()) if packs else []
        for recorder in recorders:
            recorder.flush(Barrier.DOOR)
            recorder.pause()
        try:
            return original(*args, **kwargs)
        finally:
            for recorder in recorders:
                recorder.resume()

    return door
