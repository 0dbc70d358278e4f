"""A weight is written in an autocast block: the first pass behind it has eager's casts of before, though calls were followed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kitsune
from tests.steady.test_autocast_casts import READER, as_in_eager, block, lost
from tests.steady.test_cuts import STEPS, Loop, Step

# The first step that goes on behind a write.
LATE = 5
CASES: dict[str, Step] = {}


def case(step: Step) -> Step:
    CASES[step.__name__] = step
    return step


def first(t: Loop, k: int) -> None:
    """What each step begins with: its casts are left with nobody, since its backward is followed."""
    lost(t, k).backward()
    t.update()


def looked(t: Loop, k: int) -> Tensor:
    with torch.no_grad():
        out: Tensor = t.net(t.xs[k, 1]).float()
    return out


# What comes in the same block behind the update, late.
BEHIND: dict[str, Callable[[Loop, int], Any]] = {
    "a pass": lambda t, k: lost(t, k, 1).backward(),
    "a pass without gradients": looked,
    "plain PyTorch": kitsune.disable(lambda t, k: lost(t, k, 1).backward()),
    "a graph of before": lambda t, k: checkpoint(lambda x: lost(t, k, 1), t.xs[k, 1], use_reentrant=False).backward(),
    "another thread's pass": lambda t, k: READER.submit(lambda: in_a_block(t, k)).result(),
    "a library's function": lambda t, k: librarys(t.xs[k, 1], t.net.second.weight).float().sum(),
    "a function of the program's own": lambda t, k: Own.apply(t.xs[k, 1], t.net.second.weight).float().sum(),
}


def in_a_block(t: Loop, k: int) -> None:
    with block():
        lost(t, k, 1).backward()


def librarys(x: Tensor, weight: Tensor) -> Tensor:
    """A function that asks as torch's do; of what it calls then nobody hears."""
    if torch.overrides.has_torch_function((x, weight)):
        return torch.overrides.handle_torch_function(librarys, (x, weight), x, weight)  # type: ignore[no-any-return]
    return F.linear(x, weight)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, weight)


@pytest.mark.parametrize("way", ["op by op", "replayed"])
@pytest.mark.parametrize("behind", BEHIND)
def test_behind_an_update(behind: str, way: str) -> None:
    def step(t: Loop, k: int) -> None:
        with block():
            first(t, k)
            if k >= LATE:
                t.found.append(BEHIND[behind](t, k))
        t.update()

    as_in_eager(step, way)


def scaled(t: Loop) -> None:
    with torch.no_grad():
        t.net.head.weight.mul_(0.5)


def replaced(t: Loop) -> None:
    t.net.head.weight.data = t.net.head.weight.data * 0.5


def replaced_where_nothing_is_cast(t: Loop) -> None:
    with torch.autocast("cpu", enabled=False):
        replaced(t)


def averaged(t: Loop) -> None:
    weights = list(t.net.parameters())
    with torch.no_grad():
        torch._foreach_lerp_(weights, [p * 0.5 for p in weights], 0.5)


def loaded(t: Loop) -> None:
    t.net.load_state_dict({name: value * 0.9 for name, value in t.net.state_dict().items()})


def seen_by_others(t: Loop) -> None:
    with FlopCounterMode(display=False):
        scaled(t)


WRITES: dict[str, Callable[[Loop], Any]] = {
    "by hand": scaled,
    "other memory": replaced,
    "an alias": lambda t: t.net.head.weight.data.mul_(0.5),
    "many": averaged,
    "loaded": loaded,
    "by its name": lambda t: torch._foreach_mul_(self=[t.net.head.weight.detach()], scalar=0.5),
    "made anew": lambda t: nn.init.normal_(t.net.head.weight, generator=torch.Generator().manual_seed(1)),
    "numpy": lambda t: t.net.head.weight.detach().numpy().fill(0.5),
    "its storage": lambda t: t.net.head.weight.untyped_storage().copy_((t.net.head.weight * 0.5).untyped_storage()),
    "another storage": lambda t: t.net.head.weight.detach().set_(t.net.head.weight.detach() * 0.5),
    "plain PyTorch": kitsune.disable(scaled),
    "other memory in plain PyTorch": kitsune.disable(replaced_where_nothing_is_cast),
    "a mode of others": seen_by_others,
}


@pytest.mark.parametrize("way", ["op by op", "replayed"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_was_never_seen_in_a_block(write: str, way: str) -> None:
    def step(t: Loop, k: int) -> None:
        with block():
            lost(t, k).backward()
            if k >= LATE:
                WRITES[write](t)
                lost(t, k, 1).backward()
        t.update()

    as_in_eager(step, way)


@case
def a_region_ends_in_between(t: Loop, k: int) -> None:
    """Before the write, and behind it: when weights change, the casts are of an earlier region."""
    with block():
        t.found.append(looked(t, k).sum().tolist())
        lost(t, k).backward()
        t.found.append(t.net.head.weight.grad.tolist())  # type: ignore[union-attr]
        t.update()
        t.found.append(t.net.head.weight.tolist())
        if k >= LATE:
            lost(t, k, 1).backward()
    t.update()


@case
def a_number_is_read_in_between(t: Loop, k: int) -> None:
    with block():
        loss = lost(t, k)
        t.found.append(loss.item())
        loss.backward()
        t.update()
        if k >= LATE:
            lost(t, k, 1).backward()
    t.update()


@case
def weights_are_written_before_the_block(t: Loop, k: int) -> None:
    """That is still to be done when those of the block are."""
    with block():
        lost(t, k).backward()
    scaled(t)
    with block():
        first(t, k)
        if k >= LATE:
            lost(t, k, 1).backward()
    t.update()


@case
def weights_are_updated_by_hand(t: Loop, k: int) -> None:
    """Nothing ends a region at that: what is cast in the block is still to be written by the update before it."""
    with block():
        lost(t, k).backward()
        if k >= LATE:
            scaled(t)
            lost(t, k, 1).backward()
    with torch.no_grad():
        for p in t.net.parameters():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
                p.grad = None


@case
def a_weight_is_written_before_it_is_known(t: Loop, k: int) -> None:
    """As long as nothing has been cast before, what comes behind the write casts its own."""
    if k >= LATE:
        lost(t, k)
        kitsune.flush()
    with block():
        if k >= LATE:
            t.found.append(looked(t, k).tolist())
        t.net.head.weight.data.mul_(0.5)
        t.found.append(looked(t, k).sum())
    t.update()


def used_behind_a_write_in_a_second_block(t: Loop, k: int, in_the_first: Callable[[Loop, int], Any]) -> None:
    with block():
        in_the_first(t, k)
        lost(t, k).backward()
    with block():
        if k >= LATE:
            scaled(t)
            lost(t, k, 1).backward()
    t.update()


@case
def another_block_had_cast_them(t: Loop, k: int) -> None:
    used_behind_a_write_in_a_second_block(t, k, lambda t, k: None)


@case
def another_block_had_cast_them_in_another_region(t: Loop, k: int) -> None:
    used_behind_a_write_in_a_second_block(t, k, lambda t, k: t.found.append(looked(t, k).sum().tolist()))


@case
def a_known_pass_comes_behind_what_others_have_seen(t: Loop, k: int) -> None:
    with block():
        if k >= LATE:
            lost(t, k).backward()
            seen_by_others(t)
        t.found.append(looked(t, k).sum())
    t.update()


@case
def others_write_where_nothing_is_cast(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        if k >= LATE:
            with torch.autocast("cpu", enabled=False):
                seen_by_others(t)
            lost(t, k, 1).backward()
    t.update()


@case
def casts_are_not_kept_behind(t: Loop, k: int) -> None:
    with block():
        first(t, k)
        if k >= LATE:
            with block(cache_enabled=False):
                lost(t, k, 1).backward()
            lost(t, k, 1).backward()
    t.update()


def odd_weight(t: Loop, k: int, make: Callable[[Tensor], Tensor], use: Callable[[Tensor, Tensor], Tensor]) -> None:
    """One of which autocast keeps no cast, or made none."""
    if not k:
        t.last = make(torch.linspace(-1, 1, 64))
    with block():
        use(t.xs[k, 0], t.last).float().square().mean().backward()
        with torch.no_grad():
            t.last.mul_(0.9)
        if k >= LATE:
            t.found.append(F.linear(t.xs[k, 1], t.last).sum())
    t.last.grad = None
    t.update()


@case
def a_weight_that_is_a_view(t: Loop, k: int) -> None:
    odd_weight(t, k, lambda w: w.view(8, 8).requires_grad_(), F.linear)


@case
def a_weight_of_another_type(t: Loop, k: int) -> None:
    odd_weight(t, k, lambda w: nn.Parameter(w.view(8, 8).half()), F.linear)


@case
def an_operator_was_told_a_type(t: Loop, k: int) -> None:
    odd_weight(t, k, lambda w: nn.Parameter(w.view(8, 8)), lambda x, w: F.softmax(w, -1, dtype=torch.bfloat16))


@case
def only_some_weights_were_cast_before(t: Loop, k: int) -> None:
    with block():
        F.linear(t.xs[k, 0], t.net.second.weight).float().square().mean().backward()
        t.update()
        if k >= LATE:
            lost(t, k, 1).backward()
    t.update()


@case
def the_program_had_cast_them_itself(t: Loop, k: int) -> None:
    with block():
        torch.mm(t.xs[k, 0].bfloat16(), t.net.second.weight.bfloat16()).float().square().mean().backward()
        t.update()
        if k >= LATE:
            lost(t, k, 1).backward()
    t.update()


@case
def casts_were_not_kept(t: Loop, k: int) -> None:
    with block():
        with block(cache_enabled=False):
            first(t, k)
        if k >= LATE:
            lost(t, k, 1).backward()
    t.update()


def halved(weight: Tensor) -> None:
    weight.data.mul_(0.5)


@case
def hooks_write_in_a_backward(t: Loop, k: int) -> None:
    """As of programs that step in the backward."""
    with block():
        t.found.append(looked(t, k))
        weight = t.net.second.weight
        hook = weight.register_post_accumulate_grad_hook(halved)
        F.linear(t.xs[k, 0], weight).float().square().mean().backward()
        hook.remove()
        if k >= LATE:
            t.found.append(looked(t, k))
    t.update()


@case
def autocast_is_off_in_between(t: Loop, k: int) -> None:
    with block():
        lost(t, k).backward()
        with torch.autocast("cpu", enabled=False):
            t.update()
            if k >= LATE:
                lost(t, k, 1).backward()
        if k >= LATE:
            lost(t, k, 1).backward()
    t.update()


@case
def no_gradients_were_wanted_before(t: Loop, k: int) -> None:
    lost(t, k).backward()
    with block():
        t.found.append(looked(t, k))
        t.update()
        if k >= LATE:
            lost(t, k, 1).backward()
    t.update()


@pytest.mark.parametrize("way", ["op by op", "replayed"])
@pytest.mark.parametrize("name", CASES)
def test_what_was_cast_before(name: str, way: str) -> None:
    as_in_eager(CASES[name], way)


def updated_inside(t: Loop, k: int, context: Callable[[], Any]) -> None:
    with context():
        first(t, k)
    if k >= LATE:
        lost(t, k, 1).backward()


def updated_outside(t: Loop, k: int, context: Callable[[], Any]) -> None:
    with context():
        lost(t, k).backward()
    t.update()
    if k >= LATE:
        lost(t, k, 1).backward()


def another_context(t: Loop, k: int, context: Callable[[], Any]) -> None:
    with context():
        lost(t, k).backward()
    t.update()
    with context():
        if k >= LATE:
            lost(t, k, 1).backward()


def an_update_between_contexts(t: Loop, k: int, context: Callable[[], Any]) -> None:
    """Known calls come behind a write that nobody has seen: as long as nothing had cast weights before, they were followed."""
    with context():
        if k >= LATE:
            lost(t, k).backward()
    if k >= LATE:
        t.update()
    with context():
        t.found.append(looked(t, k).tolist())


def a_pass_between_contexts(t: Loop, k: int, context: Callable[[], Any]) -> None:
    """Its graph and that of the next one meet at the casts."""
    with context():
        one: Any = lost(t, k).detach() if k >= LATE else 0.0
    if k >= LATE:
        one = lost(t, k, 1)
    with context():
        (one + lost(t, k) * 0.7).backward()


INSIDE = [updated_inside, updated_outside, another_context, an_update_between_contexts, a_pass_between_contexts]


@pytest.mark.parametrize("inside", INSIDE, ids=lambda f: f.__name__)
def test_a_context_ends_in_the_block(inside: Any) -> None:
    found = []
    for context in (contextlib.nullcontext, lambda: kitsune.accelerate(device="cpu")):
        kitsune.reset()
        t = Loop()
        with kitsune.config.patch(gate=False):
            for k in range(STEPS):
                with block():
                    inside(t, k, context)
                t.update()
        found.append([t.found, [p.tolist() for p in t.net.parameters()]])
    assert found[0] == found[1]


def test_a_static_function_leaves_no_casts_with_the_block_around_it() -> None:
    found = []
    for way in (lambda f: f, kitsune.accelerate(static=True, device="cpu")):
        kitsune.reset()
        t, seen = Loop(), list[Any]()

        def train(x: Tensor, y: Tensor, t: Loop = t) -> None:
            F.cross_entropy(t.net(x), y).backward()
            t.update()

        step = way(train)
        with kitsune.config.patch(gate=False):
            for k in range(STEPS):
                with block():
                    step(t.xs[k, 0], t.ys[k, 0])
                    if k >= LATE:
                        seen.append(looked(t, k).tolist())
        found.append([seen, [p.tolist() for p in t.net.parameters()]])
    assert found[0] == found[1]
    assert "autocast keeps its casts for the block around the call" in str(kitsune.explain())
