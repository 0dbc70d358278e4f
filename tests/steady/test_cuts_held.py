"""A number is read while a backward is owed, and from step to step the program holds something else by then."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kitsune
from kitsune.lazy import cuts
from tests.runtime.repeated import graphs
from tests.steady.test_cuts import Loop, Step, as_in_eager, run

CASES: dict[str, Step] = {}


def case(step: Step) -> Step:
    CASES[step.__name__] = step
    return step


def _two_more(t: Loop, k: int) -> tuple[Tensor, Tensor, Tensor]:
    out = t.net(t.xs[k, 0])
    terms = [(f(t.net.hidden) * t.net.first.bias).mean() / 8 for f in (Tensor.exp, Tensor.sin)]
    return F.cross_entropy(out, t.ys[k, 0]), terms[0], terms[1]


def _stepped(t: Loop, loss: Tensor) -> None:
    loss.backward()
    t.update()


@case
def a_term_is_used_later_on(t: Loop, k: int) -> None:
    loss, term, _ = _two_more(t, k)
    if k < 5:
        del term
    t.found.append(loss.item())
    _stepped(t, loss if k < 5 else loss + term)


@case
def a_term_is_used_at_first(t: Loop, k: int) -> None:
    loss, term, _ = _two_more(t, k)
    if k >= 5:
        del term
    t.found.append(loss.item())
    _stepped(t, loss if k >= 5 else loss + term)


@case
def one_term_or_the_other_or_both(t: Loop, k: int) -> None:
    loss, one, other = _two_more(t, k)
    if k // 3 in (0, 2):
        del one
    if k // 3 in (1, 2):
        del other
    t.found.append(loss.item())
    if k // 3 in (1, 3):
        loss = loss + one
    if k // 3 in (0, 3):
        loss = loss + other * 2
    _stepped(t, loss)


@case
def a_value_in_the_middle_is_used_again(t: Loop, k: int) -> None:
    first = t.net.first(t.xs[k, 0]).exp()
    second = first.sin()
    loss = second.cos().mean()
    if k < 5:
        del first, second
    t.found.append(loss.item())
    _stepped(t, loss if k < 5 else loss + (second * first.tanh()).mean())


@case
def a_list_that_was_given_is_kept_later_on(t: Loop, k: int) -> None:
    parts = [t.net.first(t.xs[k, 0]).exp()]
    parts.append(parts[0].sin())
    loss = torch.cat(parts).cos().mean()
    kept = parts if k >= 5 else []
    del parts
    t.found.append(loss.item())
    _stepped(t, loss if k < 5 else loss + (kept[1] * kept[0].tanh()).mean())


@case
def a_tuple_that_was_given_is_kept_later_on(t: Loop, k: int) -> None:
    first = t.net.first(t.xs[k, 0]).exp()
    parts = (first, first.sin())
    del first
    loss = torch.mul(*parts).cos().mean()
    kept = parts if k >= 5 else ()
    del parts
    t.found.append(loss.item())
    _stepped(t, loss if k < 5 else loss + (kept[1] * kept[0].tanh()).mean())


@case
def one_is_given_where_another_was_and_kept(t: Loop, k: int) -> None:
    first = t.net.first(t.xs[k, 0]).sigmoid()
    again = first.view_as(first)
    loss = (again * (first if k >= 5 else again)).sin().mean()
    kept = again if k >= 5 else None
    del first, again
    t.found.append(loss.item())
    _stepped(t, loss if kept is None else loss + kept.tanh().mean())


@case
def one_is_known_weakly_later_on(t: Loop, k: int) -> None:
    first = t.net.first(t.xs[k, 0]).exp()
    loss = first.sin().mean()
    known = weakref.ref(first) if k >= 5 else None
    if k < 8:
        del first
    t.found.append(loss.item())
    _stepped(t, loss if k < 8 or known is None else loss + known().tanh().mean())  # type: ignore[union-attr]


@case
def the_graph_is_asked_for_between_two_reads(t: Loop, k: int) -> None:
    loss = t.loss(k)
    t.found.append(loss.item())
    if k == 6:
        t.found.append(loss.grad_fn.name())  # type: ignore[union-attr]
    loss = loss * loss
    t.found.append(loss.item())
    if k == 8:
        t.found.append(loss.grad_fn.name())  # type: ignore[union-attr]
    _stepped(t, loss)


@case
def a_number_is_written_between_reads(t: Loop, k: int) -> None:
    loss = t.loss(k)
    total = torch.zeros(())
    if k % 5 == 3:
        t.found.append(loss.item())
    total += loss.detach()
    t.found.append(total.item())
    total *= 0.5
    t.found.append(total.item())
    total += 1
    _stepped(t, loss * total.detach())


@case
def a_part_is_without_gradients_now_and_then(t: Loop, k: int) -> None:
    """The ops before the read are the same; what autograd saves of them is not."""
    with torch.set_grad_enabled(k // 3 % 2 == 0):
        hidden = F.gelu(t.net.first(t.xs[k, 0]))
    loss = F.cross_entropy(t.net.head(F.gelu(t.net.second(hidden))), t.ys[k, 0])
    del hidden
    t.found.append(loss.item())
    _stepped(t, loss)


@case
def another_question_is_asked_now_and_then(t: Loop, k: int) -> None:
    """It is new: what the calls before it, made again, leave with autograd is wanted behind its read, too."""
    loss = t.loss(k)
    t.found.append(loss.item())
    t.found.append((loss.sin() if k % 4 == 2 else loss * 2).item())
    _stepped(t, loss)


@pytest.mark.parametrize("way", ["op by op", "replayed"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_held_at_a_read_changes(name: str, way: str) -> None:
    assert as_in_eager(CASES[name], way)[1] == 1


def test_calls_are_taken_apart_where_something_else_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in a step that is like the one before."""
    apart: list[int] = []
    leave_results = cuts.leave_results
    monkeypatch.setattr(cuts, "leave_results", lambda region: (apart.append(at[0]), leave_results(region))[1])
    at = [0]

    def step(t: Loop, k: int) -> None:
        at[0] = k
        loss, *terms = _two_more(t, k)
        del terms[: 2 if k < 8 else 1]
        for _ in range(1 + (k >= 11)):
            t.found.append(loss.item())
        _stepped(t, loss)

    expected, _ = run(step, contextlib.nullcontext())
    got, _ = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected
    assert max(k for k in apart if k < 8) < 4 and [k for k in apart if k >= 8] == [8, 9]


def test_two_terms_in_turn_are_followed() -> None:
    def step(t: Loop, k: int) -> None:
        loss, *terms = _two_more(t, k)
        del terms[k % 2]
        t.found.append(loss.item())
        (loss + terms.pop()).backward()
        t.update()

    expected, _ = run(step, contextlib.nullcontext())
    got, counts = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected and [backwards for _, backwards, *_ in counts[-4:]] == [1] * 4


def test_memory_that_others_may_write_is_not_read_later_than_in_eager() -> None:
    """Whoever has been let in ends the region: what comes next is not to wait."""

    def step(t: Loop, k: int) -> None:
        x = t.xs[k, 0].clone()
        loss = F.cross_entropy(t.net(x), t.ys[k, 0])
        shared = x.numpy()
        doubled = x * 2
        shared[:] = 0
        t.found.append(doubled)
        _stepped(t, loss)

    expected, _ = run(step, contextlib.nullcontext())
    got, _ = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected


def test_memory_of_a_result_from_before_a_read_is_let_out_when_all_has_read_it() -> None:
    def step(t: Loop, k: int) -> None:
        loss = t.loss(k)
        with torch.no_grad():
            held = t.net.hidden.sin()
        t.found.append(loss.item())
        with torch.no_grad():
            doubled = held * 2
        held.numpy()[:] = 0
        t.found += [doubled, held]
        _stepped(t, loss)

    expected, _ = run(step, contextlib.nullcontext())
    got, _ = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected


def test_a_static_function_that_reads_is_run_as_in_eager() -> None:
    def step(t: Loop, k: int) -> None:
        loss = t.loss(0)
        t.found.append(loss.item())
        _stepped(t, loss)

    expected, _ = run(step, contextlib.nullcontext())
    kitsune.reset()
    with graphs(kernels=False):
        got, _ = run(kitsune.accelerate(static=True, device="cpu")(step), contextlib.nullcontext())
    assert got == expected


@pytest.mark.parametrize("look", ["give_back", "are_held"])
def test_an_interrupt_while_it_is_looked_who_holds_what(monkeypatch: pytest.MonkeyPatch, look: str) -> None:
    def interrupted(_: list[Tensor]) -> list[Tensor]:
        raise KeyboardInterrupt

    def grads(context: contextlib.AbstractContextManager[object], interrupt: bool) -> list[list[float]]:
        t = Loop()
        with context:
            for k in range(4):
                loss = t.loss(k)
                if interrupt and k == 3:
                    # It is looked, since one more holds it than in the steps before.
                    held = loss
                    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                        patch.setattr(cuts, look, interrupted)
                        held.item()
                    del held
                loss.item()
                # The calls are made again for it, and the loss is to have their graph.
                loss.backward(retain_graph=True)
                found = [p.grad.clone() for p in t.net.parameters() if p.grad is not None]
                t.update()
        return [g.tolist() for g in found]

    expected = grads(contextlib.nullcontext(), False)
    kitsune.reset()
    assert grads(kitsune.accelerate(device="cpu"), True) == expected


def regions() -> list[Any]:
    return [pipeline.recorder.region for pipeline in kitsune.contexts.here.depth]


def test_a_number_that_is_read_behind_the_backward_ends_the_region() -> None:
    """Nothing is owed any more that could be kept from being made again."""
    t = Loop()
    with kitsune.accelerate(device="cpu"):
        for k in range(4):
            loss = t.loss(k)
            loss.item()
            loss.backward()
            t.net.head.weight.grad.sum().item()  # type: ignore[union-attr]
            assert [region.node.depth for region in regions()] == [0]
            t.update()
