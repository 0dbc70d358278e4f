"""Storages that a program holds: what it asks of them by C++ comes by no door of a tensor's, and by no operator."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from kitsune.lazy.door_makers import memory_door
from kitsune.lazy.recorders import listening

# They look at the memory, write it or give it back at once. (One that reads or sets an element, copies or fills makes a tensor.)
NAMES = "data_ptr resize_ byteswap _write_file share_memory_ _share_cuda_ _share_fd_cpu_ _share_filename_cpu_"


def storage_door(original: Callable[..., Any]) -> Callable[..., Any]:
    """As for a tensor of the same memory."""
    opened = memory_door(functools.wraps(original)(lambda tensor: None))

    @functools.wraps(original)
    def door(storage: Any, *args: Any, **kwargs: Any) -> Any:
        if listening():
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                tensor = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            opened(tensor)
            # No more than the program itself may hold the memory, which might be moved then.
            del tensor
        return original(storage, *args, **kwargs)

    return door
