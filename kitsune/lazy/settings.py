"""What a region depends on besides its ops and calls: defaults, and the libraries that torch may use. No call shows it."""

from typing import Any

import torch

# Switches that composite calls of torch (attention, recurrent and batch norm layers) choose their ops by.
_SWITCHES: Any = (
    torch._C._get_flash_sdp_enabled,
    torch._C._get_mem_efficient_sdp_enabled,
    torch._C._get_math_sdp_enabled,
    torch._C._get_cudnn_sdp_enabled,
    torch._C._get_overrideable_sdp_enabled,
    torch._C._get_mkldnn_enabled,
    torch._C._get_cudnn_enabled,
)


def settings() -> tuple[Any, ...]:
    """Equal while the same calls make the same ops with the same results. It takes 1 us."""
    # Results of factories and of int * float depend on the default dtype, and errors on whether algorithms must be
    # deterministic.
    defaults = (torch.get_default_dtype(), torch.get_deterministic_debug_mode())
    return (*defaults, *[switch() for switch in _SWITCHES])


def saves_through_python() -> bool:
    """Does what a call saves for its backward go through Python of the program's?"""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
