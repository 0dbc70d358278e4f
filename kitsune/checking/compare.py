"""When a value counts as eager's: bit for bit or, where numerics allow another order, as near to float64 as eager is."""

from typing import Any

import torch

# How much farther from float64 than eager a value may be that was summed in another order: in units of the dtype's epsilon and
# of the largest value. Both round each result once, and eager may be exact by chance. Of float64 there is no better: there, eager
# is what is compared with.
OTHERWISE, OF_DOUBLES = 4.0, 256.0
# Where several such ops come one after another, by which the distance grows: in eager's own.
AS_FAR = 2.0
# Units where float64 cannot be had, and eager is all that there is to compare with.
UNKNOWN = 64.0


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Do two tensors of one shape hold the same bits? All NaNs are the same here, and 0.0 is not -0.0."""
    if not a.numel():
        return True
    return not bool(_unequal(plain(a), plain(b)).any())


def plain(t: torch.Tensor) -> torch.Tensor:
    """Real and dense, for bits to be looked at."""
    t = t.resolve_conj().resolve_neg()
    if t.is_floating_point() and t.itemsize == 1:
        # Eight bits have few operators.
        return t.view(torch.uint8)
    return torch.view_as_real(t) if t.is_complex() else t


def _unequal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not a.is_floating_point():
        return a != b
    different = (a != b) | ((a == 0) & (torch.signbit(a) != torch.signbit(b)))
    return different & ~(a.isnan() & b.isnan())


def difference(got: torch.Tensor, eager: torch.Tensor) -> str:
    """How two tensors of one shape differ, in words."""
    got, eager = plain(got), plain(eager)
    wrong = _unequal(eager, got)
    where = tuple(wrong.nonzero()[0].tolist())
    text = f"{int(wrong.sum())} of {wrong.numel()} elements differ, the first at {list(where)}: "
    text += f"{got[where].item()!r} instead of {eager[where].item()!r}"
    if eager.is_floating_point():
        both = got.isfinite() & eager.isfinite()
        if bool(both.any()):
            text += f"; the largest difference is {float((got - eager)[both].double().abs().max()):.3g}"
    return text


def too_far(
    got: torch.Tensor,
    eager: torch.Tensor,
    exact: Any,
    dtype: torch.dtype | None = None,
    several: bool = False,
    rounded: torch.Tensor | None = None,
) -> str | None:
    """Why a value that may be summed in another order is no such value; None if it may be. `exact` is eager's in float64, None
    where that cannot be had; `dtype` is that of coarser steps on the way, of which there may be `several`; `rounded` is `exact`
    of operands that were rounded otherwise."""
    got, eager = plain(got), plain(eager)
    if not got.is_floating_point():
        return None if torch.equal(got, eager) else difference(got, eager)
    if not torch.equal(got.isnan(), eager.isnan()) or not torch.equal(got.isinf(), eager.isinf()):
        return f"{difference(got, eager)}; NaN or infinity is elsewhere"
    known = exact is not None and exact.shape == eager.shape and exact.is_floating_point()
    precise = exact if known else eager.double()
    finite = eager.isfinite() & precise.isfinite()
    near, there, here = (t[finite].double() for t in (eager, precise, got))
    if not here.numel():
        return None
    dtype = dtype or got.dtype
    scale = float(there.abs().max())
    units = UNKNOWN if not known else OF_DOUBLES if dtype is torch.float64 else OTHERWISE
    off, allowed = float((here - there).abs().max()), float((near - there).abs().max()) * (AS_FAR if several else 1.0)
    allowed += units * torch.finfo(dtype).eps * max(scale, 1.0 if dtype is torch.float64 else 0.0)
    if known and rounded is not None:
        allowed += units * float((rounded[finite] - precise[finite]).abs().max())
    if off <= allowed:
        return None
    return f"{difference(got, eager)}; it is {off:.3g} from {'float64' if known else 'eager'}, where {allowed:.3g} is allowed"
