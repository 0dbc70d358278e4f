"""Bit-exact comparison of tensors: values, geometry, flags and who shares memory with whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Comparison = Callable[[torch.Tensor, torch.Tensor], str | None]
INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def value_difference(a: torch.Tensor, b: torch.Tensor) -> str | None:
    """None when both hold the same bits; NaNs count as equal whatever their payload, -0.0 and 0.0 do not."""
    with torch.no_grad():
        a, b = _plain(a), _plain(b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
        if a.numel() == 0:
            return None
        wrong = _bits(a) != _bits(b)
        if a.dtype.is_floating_point:
            wrong &= ~(a.isnan() & b.isnan())
        if not bool(wrong.any()):
            return None
        where = wrong.nonzero()[0].tolist()
        return (
            f"{int(wrong.sum())} of {wrong.numel()} elements differ, first at {where}: "
            f"{b[tuple(where)].item()!r} instead of {a[tuple(where)].item()!r}"
        )


def metadata(t: torch.Tensor) -> dict[str, Any]:
    """What a program can see of a tensor apart from its values."""
    seen: dict[str, Any] = {"shape": tuple(t.shape), "dtype": t.dtype, "device": str(t.device), "layout": t.layout}
    seen |= {"requires_grad": t.requires_grad, "history": history(t)}
    seen["is_leaf"] = seen["history"] == "leaf"
    if t.layout is torch.strided:
        seen |= {"stride": t.stride(), "offset": t.storage_offset(), "conj": t.is_conj(), "neg": t.is_neg()}
    return seen


def rounding_difference(a: torch.Tensor, b: torch.Tensor) -> str | None:
    """None when both are equal to within the rounding of a sum in another order."""
    try:
        torch.testing.assert_close(_plain(b), _plain(a), equal_nan=True)
    except AssertionError as told:
        return str(told)
    return None


def difference(a: Any, b: Any, *, values: Comparison | None = value_difference, skip: Sequence[str] = ()) -> str | None:
    """What tells b from a, in words; None if nothing does."""
    if not isinstance(a, torch.Tensor):
        return None if type(a) is type(b) and a == b else f"{b!r} instead of {a!r}"
    if not isinstance(b, torch.Tensor):
        return f"{type(b).__name__} instead of a tensor"
    there, here = metadata(a), metadata(b)
    for key, expected in there.items():
        if key not in skip and here.get(key) != expected:
            return f"{key}: {here.get(key)} instead of {expected}"
    return values(a, b) if values else None


def alias_sets(tensors: Sequence[torch.Tensor]) -> list[int]:
    """For each tensor, the index of the first one that it shares memory with."""
    first: dict[int, int] = {}
    return [first.setdefault(_storage(t, i), i) for i, t in enumerate(tensors)]


def _storage(t: torch.Tensor, index: int) -> int:
    own = -1 - index
    if t.layout is not torch.strided or t.device.type == "meta" or t._is_zerotensor():
        return own
    return t.untyped_storage().data_ptr() or own


def history(t: torch.Tensor) -> str:
    """How autograd says that the tensor came about."""
    try:
        if t.is_leaf:
            return "leaf"
        # reshape() calls _reshape_alias for plain tensors and view for every wrapper subclass,
        # and ctc_loss() its overload for tensors of lengths.
        return type(t.grad_fn).__name__.replace("ReshapeAlias", "View").replace("CtcLossBackward1", "CtcLossBackward0")
    except RuntimeError as refused:  # autograd refuses to tell for some views that were made without grad mode
        return str(refused)


def _plain(t: torch.Tensor) -> torch.Tensor:
    t = t.detach()
    if t.layout is not torch.strided:
        t = t.to_dense()
    if t.is_quantized:
        t = t.int_repr()
    t = t.resolve_conj().resolve_neg().cpu()
    return torch.view_as_real(t) if t.dtype.is_complex else t


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(INT[t.element_size()])
