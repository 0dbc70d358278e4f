"""`AMPConfig`: in which precision the forward runs, and how the scale of its gradients moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kitsune.accepts import Accepts, accepted, flag, number, whole

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def _check_precision(value: object) -> torch.dtype:
    if isinstance(value, torch.dtype) and value in PRECISIONS.values():
        return value
    raise ValueError


precision = Accepts("torch.float16 or torch.bfloat16", _check_precision)
ACCEPTS = {
    "dtype": precision,
    "enabled": flag,
    "growth_interval": whole(1),
    "backoff_factor": number(0, 1),
    "growth_factor": number(1),
    "init_scale": number(0),
}


@dataclass(frozen=True)
class AMPConfig:
    """Mixed precision of a `KitsuneOptimizer`, whose `enable_amp=True` it needs beside its own `enabled`.

    `dtype` is torch.float16 or torch.bfloat16. The other four are those of `torch.amp.GradScaler` and are used with float16
    only: gradients are computed times `init_scale` at first, times `backoff_factor` of that after one that is not finite,
    whose step is skipped, and times `growth_factor` of it after `growth_interval` steps in a row without one.
    """

    dtype: torch.dtype = torch.float16
    enabled: bool = True
    growth_interval: int = 2000
    backoff_factor: float = 0.5
    growth_factor: float = 2.0
    init_scale: float = 65536.0

    def __post_init__(self) -> None:
        for name, accepts in ACCEPTS.items():
            object.__setattr__(self, name, accepted(name, getattr(self, name), accepts))
