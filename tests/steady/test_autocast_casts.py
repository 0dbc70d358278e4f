"""Autocast keeps its casts of weights until a block is left. Who gets them is as in eager, though followed calls make none."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kitsune
from tests.chaos.counting import NO_BACKWARD_IN_FORKS
from tests.property.machine import apart
from tests.runtime.repeated import graphs
from tests.steady.test_cuts import Loop, Step, run

READER = ThreadPoolExecutor(1)
CASES: dict[str, Step] = {}
# Backwards that were followed in the last step; in the others nothing is known of that.
FOLLOWED: dict[str, int] = {}


def case(backwards: int | None = None) -> Callable[[Step], Step]:
    def add(step: Step) -> Step:
        CASES[step.__name__] = step
        if backwards is not None:
            FOLLOWED[step.__name__] = backwards
        return step

    return add


def block(**options: Any) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, **options)


def lost(t: Loop, k: int, n: int = 0) -> Tensor:
    return t.loss(k, n).float()


def twice(t: Loop, k: int, n: int = 0) -> Tensor:
    """Without what a second call writes anew."""
    return F.cross_entropy(t.net.head(t.net.second(t.xs[k, n])), t.ys[k, n])


@case()
def a_region_ends_inside(t: Loop, k: int) -> None:
    with block():
        out = t.net(t.xs[k, 1])
        t.found.append(out.detach().float().tolist())
        loss = (t.net(t.xs[k, 0]) + out).float().square().mean()
    loss.backward()
    t.update()


@case(3)
def regions_end_between_backwards(t: Loop, k: int) -> None:
    with block():
        for n in range(3):
            lost(t, k, n % 2).backward()
            t.found.append(t.net.head.weight.grad.tolist())  # type: ignore[union-attr]
    t.update()


@case(1)
def the_optimizer_steps_at_the_end(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        t.update()


@case(1)
def weights_are_looked_at_behind_an_update(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        t.update()
        with torch.no_grad():
            t.found.append(torch.stack([p.square().sum() for p in t.net.parameters()]))


@case()
def it_goes_on_behind_an_update(t: Loop, k: int) -> None:
    with block():
        for n in range(2):
            lost(t, k, n).backward()
            t.update()


@case()
def and_looks_without_gradients(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        t.update()
        with torch.no_grad():
            t.found.append(t.net(t.xs[k, 1]).float())


@case()
def the_optimizer_steps_where_autocast_is_off_inside(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        with torch.autocast("cpu", enabled=False):
            t.update()
        lost(t, k, 1).backward()
        t.update()


@case()
def weights_are_written_by_hand(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        with torch.no_grad():
            t.net.head.weight.mul_(0.5)
        lost(t, k, 1).backward()
    t.update()


@case()
def weights_are_written_through_an_alias(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        t.net.head.weight.data.mul_(0.5)
        lost(t, k, 1).backward()
    t.update()


@case()
def weights_are_written_together(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        with torch.no_grad():
            torch._foreach_mul_([p for p in t.net.parameters() if p.dim() == 2], 0.5)
        lost(t, k, 1).backward()
    t.update()


@case()
def weights_get_other_memory(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        t.net.head.weight.data = t.net.head.weight.data * 0.9
        lost(t, k, 1).backward()
    t.update()


@case(2)
def casts_are_forgotten_in_between(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        t.update()
        torch.clear_autocast_cache()
        lost(t, k, 1).backward()
        t.update()


@case()
def one_block_or_two(t: Loop, k: int) -> None:
    """With one cast, gradients of both are added up in bfloat16; with two, in float32."""
    with block():
        one = twice(t, k)
        if k % 2:
            other = twice(t, k, 1)
    if not k % 2:
        with block():
            other = twice(t, k, 1)
    (one + other).backward()
    t.update()


@case()
def casts_are_kept_or_not(t: Loop, k: int) -> None:
    with block(cache_enabled=k % 2 > 0):
        loss = twice(t, k) + twice(t, k, 1)
    loss.backward()
    t.update()


@case()
def casts_are_not_kept_and_the_graph_is_asked_for(t: Loop, k: int) -> None:
    with block(cache_enabled=False):
        loss = twice(t, k) + twice(t, k, 1)
    t.found.append(type(loss.grad_fn).__name__)
    loss.backward()
    t.update()


@case()
def the_first_pass_is_without_gradients(t: Loop, k: int) -> None:
    with block():
        with torch.no_grad():
            seen = t.net(t.xs[k, 1])
        loss = (t.net(t.xs[k, 0]) - seen).float().square().mean()
    if k % 3 == 2:
        t.found.append(type(loss.grad_fn).__name__)
    loss.backward()
    t.update()


@case()
def a_pass_behind_a_write_comes_later_on(t: Loop, k: int) -> None:
    """The first one behind a write that changes nothing: what casts were before a write is known from the second one on."""
    with block():
        lost(t, k).backward()
        with torch.no_grad():
            t.net.head.weight.mul_(0.5 if k > 4 else 1.0)
        if k >= 4:
            lost(t, k, 1).backward()
    t.update()


@case()
def another_thread_ends_a_region(t: Loop, k: int) -> None:
    with block(), torch.no_grad():
        seen = torch.mm(t.xs[k, 1], t.net.second.weight)
    with block():
        one = twice(t, k) + seen.float().sum()
        t.found.append(READER.submit(one.detach().tolist).result())
        if k % 2:
            other = twice(t, k, 1)
    if not k % 2:
        other = twice(t, k, 1)
    (one + other).backward()
    t.update()


@case()
def owed_in_a_block_and_made_again_in_another(t: Loop, k: int) -> None:
    with block():
        one = lost(t, k)
    with block():
        with torch.no_grad():
            t.found.append(torch.mm(t.xs[k, 1], t.net.second.weight).float())
        other = lost(t, k, 1)
    t.found.append(type((one + other).grad_fn).__name__)
    (one + other).backward()
    t.update()


@case()
def owed_in_a_block_and_made_again_at_the_begin_of_another(t: Loop, k: int) -> None:
    with block():
        one = twice(t, k)
    with block():
        t.found.append(type(one.grad_fn).__name__)
        other = twice(t, k, 1)
    (one + other).backward()
    t.update()


@case()
def owed_where_casts_are_kept_and_made_again_where_not(t: Loop, k: int) -> None:
    with block():
        one = twice(t, k)
        with block(cache_enabled=False):
            t.found.append(type(one.grad_fn).__name__)
            other = twice(t, k, 1)
    (one + other).backward()
    t.update()


@case(1)
def behind_a_region_of_many_lengths(t: Loop, k: int) -> None:
    with torch.no_grad():
        x = t.xs[k, 1]
        for _ in range(k):
            x = x * 0.5
        with block():
            x = torch.mm(x, t.net.second.weight)
        t.found.append(x.float().tolist())
    with block():
        loss = lost(t, k)
    loss.backward()
    t.update()


@case(1)
def looks_many_times_in_a_block(t: Loop, k: int) -> None:
    with block(), torch.no_grad():
        for n in range(2):
            t.found.append((t.net(t.xs[k, n]).argmax(1) == t.ys[k, n]).sum().item())
    lost(t, k).backward()
    t.update()


@case()
def a_number_is_read_between_three_passes(t: Loop, k: int) -> None:
    """The gradients of all three are added up in bfloat16, at one cast, also where the read has ended a region."""
    with block():
        losses = [twice(t, k, 0), twice(t, k, 1)]
        if k != 6:
            t.found.append(losses[1].item())
        losses.append(twice(t, k, 0) * 0.7)
    sum(losses).backward()  # type: ignore[union-attr]
    t.found.append(t.net.head.weight.grad.tolist())  # type: ignore[union-attr]
    t.update()


@case()
def regions_end_between_passes(t: Loop, k: int) -> None:
    with block():
        losses = [twice(t, k, 0), twice(t, k, 1)]
        t.found.append(losses[1].tolist())
        with torch.no_grad():
            t.found += [(t.xs[k, n] * 2).sum().item() for n in (0, 1)]
        losses.append(twice(t, k, 0) * 0.7)
    sum(losses).backward()  # type: ignore[union-attr]
    t.found.append(t.net.head.weight.grad.tolist())  # type: ignore[union-attr]
    t.update()


@case()
def a_new_call_has_the_cast_of_one_whose_backward_has_been(t: Loop, k: int) -> None:
    """In which order the gradients of a weight are added up depends on when it was cast."""
    with block():
        twice(t, k).backward()
        with torch.autocast("cpu", enabled=False):
            loss = twice(t, k, 1)
        if k % 2:
            with block(cache_enabled=False):
                loss = loss + twice(t, k, 1) * 0.7
        if k >= 6:
            loss = loss + F.linear(t.xs[k, 1], t.net.second.weight).float().sin().mean()
    loss.backward()
    t.found.append(t.net.second.weight.grad.tolist())  # type: ignore[union-attr]
    t.update()


@case(2)
def weights_are_written_between_blocks_and_the_graph_is_asked_for(t: Loop, k: int) -> None:
    """What the second block casts is not what the first one has cast."""
    with block():
        twice(t, k).backward()
    with torch.no_grad():
        t.net.head.weight.mul_(0.5)
    with block():
        loss = twice(t, k, 1)
    if k in (6, 9):
        t.found.append(type(loss.grad_fn).__name__)
    loss.backward()
    t.update()


@case()
def an_operator_ends_the_region_and_the_rest_is_cast_or_not(t: Loop, k: int) -> None:
    """While an operator is handled, torch has autocast switched off: what it is for the calls is not to be asked then."""
    with block():
        one = twice(t, k)
        t.found.append((t.xs[k, 0] > 0).nonzero())
        with torch.autocast("cpu", enabled=False) if k % 2 else contextlib.nullcontext():
            seen = torch.mm(t.xs[k, 1], t.net.second.weight)
    (one + seen.float().square().mean()).backward()
    t.update()


@case()
def another_thread_ends_the_region_between_three_passes(t: Loop, k: int) -> None:
    with block():
        losses = [twice(t, k, 0), twice(t, k, 1)]
        t.found.append(READER.submit(losses[1].detach().tolist).result())
        losses.append(twice(t, k, 0) * 0.7)
    sum(losses).backward()  # type: ignore[union-attr]
    t.found.append(t.net.head.weight.grad.tolist())  # type: ignore[union-attr]
    t.update()


def as_in_eager(step: Step, way: str) -> int:
    """Both runs are the same; returns how many backwards were followed in the last step."""
    with warnings.catch_warnings(), kitsune.config.patch(gate=False):
        warnings.simplefilter("ignore")
        expected, _ = run(step, contextlib.nullcontext())
        kitsune.reset()
        with graphs(kernels=False) if way == "replayed" else contextlib.nullcontext():
            got, counts = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected
    assert torch.is_autocast_cache_enabled()
    return counts[-1][1]


@pytest.mark.parametrize("way", ["op by op", "replayed"])
@pytest.mark.parametrize("name", CASES)
def test_casts_of_weights_are_eagers(name: str, way: str) -> None:
    followed = as_in_eager(CASES[name], way)
    assert name not in FOLLOWED or followed == FOLLOWED[name]


def a_new_call_comes(t: Loop, k: int) -> None:
    with block():
        out = t.net(t.xs[k, 0])
        with torch.no_grad():
            seen = t.net(t.xs[k, 1]) * (0.5 if k > 5 else 0.25)
            if k > 7:
                seen = seen + torch.mm(t.net.hidden.float(), t.net.second.weight)[:, :3]
        loss = (out - seen).float().square().mean()
    loss.backward()
    t.update()


def _told(step: Step) -> list[Any]:
    return [run(step, context)[0] for context in (contextlib.nullcontext(), kitsune.accelerate(device="cpu"))]


@pytest.mark.skipif(torch.cuda.is_available(), reason=NO_BACKWARD_IN_FORKS)
def test_a_new_call_while_others_are_owed_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast holds a lock while it casts a weight for it: the others cannot be made again meanwhile."""
    monkeypatch.setattr("tests.property.machine.SECONDS", 60)
    expected, got = apart(_told, a_new_call_comes) or (None, "nothing")
    assert got == expected
