"""Four sights of a sample: observed, recorded, followed, followed with other data. Each is to leave behind what eager does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import kitsune
from tests import _opinfo
from tests.parity.outcomes import differences, is_as_under_any_mode, run

SIGHTS = ("observed", "recorded", "followed", "followed with other data")
# How much of an error's text is compared for inputs that are to raise.
PREFIX = 60


@dataclass(frozen=True)
class Verdict:
    """What was seen of one sample: differences from eager, and how far Kitsune took part."""

    differences: tuple[str, ...] = ()
    unstable: tuple[str, ...] = ()  # in what eager differs from itself
    took_part: str = "followed"  # or "recorded", "no operator", or why it did neither
    of_any_mode: tuple[str, ...] = ()  # in what torch differs from eager under any mode, and Kitsune does not differ from that
    left_out: str = ""  # why nothing is shown: torch itself refuses the sample while any mode is on


def four_sights(sample: Any, device: str = "cpu", warmup: int = 1) -> Verdict:
    """Run a sample four times under Kitsune, whose counters are to say that it did take part."""
    kitsune.reset()
    gains: list[Counter[str]] = []
    found: list[str] = []
    unstable: list[str] = []
    of_any_mode: list[str] = []
    left_out = ""
    eager = {moved: run(sample.fresh(moved), nullcontext()) for moved in (False, True)}
    for sight in SIGHTS:
        moved = sight is SIGHTS[-1]
        expected = eager[moved]
        before = _counts()
        got = run(sample.fresh(moved), kitsune.accelerate(warmup=warmup, device=device))
        gains.append(_counts() - before)
        told = list(differences(sample.name, expected, got))
        if not told:
            continue
        if again := list(differences(sample.name, expected, run(sample.fresh(moved), nullcontext()))):
            unstable += again
        elif is_as_under_any_mode(sample.fresh(moved), got):
            of_any_mode += told
            left_out = left_out or got.error
        else:
            found += [f"{sight}: {difference}" for difference in told]
    return Verdict(tuple(found), tuple(unstable), _took_part(gains, warmup), tuple(of_any_mode), "" if found else left_out)


def raised_alike(sample: Any, device: str = "cpu") -> Verdict:
    """The same for a call that is to raise: the same type of error and the same beginning of its text, four times."""
    kitsune.reset()
    expected = run(sample.fresh(), nullcontext()).error
    found = []
    for sight in SIGHTS:
        got = run(sample.fresh(), kitsune.accelerate(warmup=1, device=device)).error
        if got[:PREFIX] != expected[:PREFIX]:
            found.append(f"{sight}: raised {got!r} instead of {expected!r}")
    return Verdict(tuple(found), (), "raised" if expected else "did not raise")


def checked_gradients(sample: Any, order: int) -> Verdict:
    """``gradcheck`` (order 1) or ``gradgradcheck`` (order 2) in a context that has seen the function: as in eager."""
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    said = []
    for context in (kitsune.accelerate(warmup=1, device="cpu"), nullcontext()):
        kitsune.reset()
        before = _counts()
        function, tensors, nondet_tol = _opinfo.checked_function(sample.fresh())
        _opinfo.reseed()
        try:
            with context:
                check(function, tensors, fast_mode=True, nondet_tol=nondet_tol)
            return Verdict(took_part="recorded" if (_counts() - before)["recorded"] else "observed")
        except Exception as caught:
            said.append(f"{type(caught).__name__}: {caught}"[:200])
    if said[0][:PREFIX] == said[1][:PREFIX]:
        return Verdict(took_part="fails in eager")
    return Verdict((f"{said[0]} instead of {said[1]}",))


def _counts() -> Counter[str]:
    counts = kitsune.counters()
    named = ("observed", "recorded", "followed", "updates_followed")
    return Counter({name: counts[name] for name in named}) + Counter(counts["passed_through"])


def _took_part(gains: list[Counter[str]], warmup: int) -> str:
    """How far each sight of a sample got."""
    if warmup and gains[0]["recorded"] and not gains[0]["observed"]:
        return "recorded when it was to be observed"
    if all(gain["recorded"] for gain in gains[warmup:]):
        followed = all(gain["followed"] or gain["updates_followed"] for gain in gains[2:])
        return "followed" if followed else "recorded"
    reasons = {name for gain in gains for name in gain if name.isupper()}
    if not reasons and not any(gain["observed"] for gain in gains):
        return "no operator"
    return " ".join(sorted(reasons)) or "observed"


def samples(name: str, dtype: torch.dtype, device: str = "cpu") -> Iterator[Any]:
    from tests import _moduleinfo

    kind = name.partition("/")[0]
    source = {"module": _moduleinfo.module_samples, "optimizer": _moduleinfo.optimizer_samples}.get(kind, _opinfo.samples)
    return iter(source(name, device, dtype))  # type: ignore[operator]
