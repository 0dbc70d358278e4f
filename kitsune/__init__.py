"""Kitsune makes an unmodified PyTorch training loop faster.

with kitsune.accelerate():
    for x, y in loader:
        train_step(x, y)
"""

import kitsune.fusing  # noqa: F401 - gives kitsune.fusion.FusionEngine its stages
from kitsune.config import KitsuneWarning, config
from kitsune.optimizer import KitsuneOptimizer
from kitsune.scheduler import StreamConfig
from kitsune.session import accelerate, counters, disable, explain, flush, last_plan, reset, wait_for_kernels
from kitsune.stance import set_stance
from kitsune.verifying import verify

__version__ = "0.1.0"

__all__ = [
    "KitsuneOptimizer",
    "KitsuneWarning",
    "StreamConfig",
    "accelerate",
    "config",
    "counters",
    "disable",
    "explain",
    "flush",
    "last_plan",
    "reset",
    "set_stance",
    "verify",
    "wait_for_kernels",
]
