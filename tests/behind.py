"""Tensors that begin in the middle of their memory, as batches that are cut from a data set and parameters of one buffer do."""

from __future__ import annotations

import torch

# Elements before and after: as aligned as memory of its own.
BESIDE = 64


def behind(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in the same order in memory, with others before and after them: NaN, or ones."""
    if tensor.is_conj() or tensor.is_neg() or not tensor.numel():
        return tensor
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    other = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 1
    memory = torch.full((2 * BESIDE + last + 1,), other, dtype=tensor.dtype, device=tensor.device)
    memory.as_strided((last + 1,), (1,), BESIDE).copy_(tensor.as_strided((last + 1,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride(), BESIDE)
