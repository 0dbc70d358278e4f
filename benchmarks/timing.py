"""How long a step takes, over a block of them."""

import time
from collections.abc import Callable
from typing import Any

import torch


def millis(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Milliseconds of a step, the last one's work on the device included."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps * 1e3
