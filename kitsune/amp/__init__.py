"""Mixed precision for `KitsuneOptimizer(enable_amp=True)`; `autocast` and `GradScaler` are torch's own."""

from torch.amp import GradScaler, autocast

from kitsune.amp.config import AMPConfig
from kitsune.amp.forward import HalfForward, scales_in_use
from kitsune.amp.scale import LossScale, smallest, unscale

__all__ = ["AMPConfig", "GradScaler", "HalfForward", "LossScale", "autocast", "scales_in_use", "smallest", "unscale"]
