"""What the libraries' results depend on besides their operands: a captured graph has the choice of its day baked in."""

from typing import Any

import torch

_precision = torch._C._get_fp32_precision_getter  # type: ignore[attr-defined]
_getters: Any = (
    torch._C._get_cublas_allow_fp16_reduced_precision_reduction,
    torch._C._get_cublas_allow_bf16_reduced_precision_reduction,
    torch._C._get_cublas_allow_fp16_accumulation,
    torch._C._get_cudnn_enabled,
    torch._C._get_cudnn_benchmark,
    torch._C._get_cudnn_deterministic,
    torch._C._get_deterministic_algorithms,
    torch._C._get_math_sdp_allow_fp16_bf16_reduction,
)


def numeric_settings() -> tuple[Any, ...]:
    """Equal while the libraries would choose the same kernels for the same operands."""
    # The switches that are called allow_tf32 raise where a program has used the newer ones, and these two never.
    return (_precision("cuda", "matmul"), _precision("cuda", "conv"), *[getter() for getter in _getters])
