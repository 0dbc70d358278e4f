"""What the libraries' results depend on besides their operands: a captured graph has the choice of its day baked in."""

from typing import Any

import torch

_precision = torch._C._get_fp32_precision_getter  # type: ignore[attr-defined]
_fp16_sums, _bf16_sums = (
    torch._C._get_cublas_allow_fp16_reduced_precision_reduction,
    torch._C._get_cublas_allow_bf16_reduced_precision_reduction,
)
_fp16_accumulation: Any = torch._C._get_cublas_allow_fp16_accumulation  # type: ignore[attr-defined]
_cudnn, _benchmark = torch._C._get_cudnn_enabled, torch._C._get_cudnn_benchmark
_cudnn_deterministic, _deterministic = torch._C._get_cudnn_deterministic, torch._C._get_deterministic_algorithms
_attention_sums: Any = torch._C._get_math_sdp_allow_fp16_bf16_reduction  # type: ignore[attr-defined]


def numeric_settings() -> tuple[Any, ...]:
    """Equal while the libraries would choose the same kernels for the same operands."""
    # The switches that are called allow_tf32 raise where a program has used the newer ones, and these two never.
    return _precision("cuda", "matmul"), _fp16_sums(), _bf16_sums(), _deterministic(), library_switches()


def library_switches() -> tuple[Any, ...]:
    """Those of them that torch keeps apart from its own modes."""
    return (
        _precision("cuda", "conv"),
        _fp16_accumulation(),
        _cudnn(),
        _benchmark(),
        _cudnn_deterministic(),
        _attention_sums(),
    )
