"""Optimizers that step in the hook of a gradient, one for each parameter, as people do to save the gradients' memory: torch puts
the modes of a backward back after each node, whatever the hook has closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import kitsune

X = torch.linspace(-1, 1, 24).view(6, 4)
Made = tuple[nn.Module, dict[nn.Parameter, Any]]


@pytest.fixture(autouse=True)
def recorded() -> Iterator[None]:
    kitsune.reset()
    with kitsune.config.patch(gate=False, device="cpu"):
        yield
    assert not _get_current_dispatch_mode_stack() and not _get_current_function_mode_stack()
    assert not torch._C._is_view_replay_enabled()
    kitsune.reset()


def model_of(wrap: Callable[[Any], Any], closes: bool) -> Made:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
    optimizers = {p: wrap(torch.optim.SGD([p], 0.1, momentum=0.9)) for p in net.parameters()}

    def stepped(p: Any) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()
        if closes and isinstance(optimizers[p], kitsune.KitsuneOptimizer):
            optimizers[p].close()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(stepped)
    return net, optimizers


def trained(made: Made, n_steps: int) -> list[Any]:
    net, _ = made
    found: list[Any] = []
    for _ in range(n_steps):
        loss = net(X).square().mean()
        loss.backward()
        found += [loss.detach(), *(p.detach().clone() for p in net.parameters())]
        # What is drawn here is drawn at once, or before the state is asked for: steps are known by now.
        for _ in range(3):
            state = torch.get_rng_state()
            first = net[2](X)
            torch.set_rng_state(state)
            found += [first.detach(), net[2](X).detach(), torch.get_rng_state()]
    return [t.tolist() for t in found]


@pytest.mark.parametrize("n_steps", [1, 2, 12])
@pytest.mark.parametrize("closes", [False, True], ids=["", "closed in the hook"])
def test_all_that_follows_is_eagers(closes: bool, n_steps: int) -> None:
    expected = trained(model_of(lambda base: base, closes), n_steps)
    made = model_of(kitsune.KitsuneOptimizer, closes)
    assert trained(made, n_steps) == expected
    assert kitsune.counters()["recorded"] + kitsune.counters()["observed"] > 0
    for optimizer in made[1].values():
        optimizer.close()
    # A hook of C++ holds what holds it: no collection finds that.
    made[1].clear()


class Ended:
    """Ends a context as it is deleted, as a generator's `with` does."""

    def __init__(self) -> None:
        self.context = kitsune.accelerate()
        self.context.__enter__()

    def __del__(self) -> None:
        self.context.__exit__(None, None, None)


def test_a_context_that_ends_inside_of_a_backward_takes_nothing_any_more() -> None:
    """Its modes are there until one like it ends, and pass everything on."""
    expected = trained(model_of(lambda base: base, False), 12)
    for n_recorded in (1, 2, 6):
        made, held = model_of(lambda base: base, False), [Ended()]
        found = trained(made, n_recorded)
        made[0][3].weight.register_hook(lambda _, held=held: held.clear())  # type: ignore[operator, union-attr]
        found += trained(made, 1)
        before = taken()
        found += trained(made, 11 - n_recorded)
        assert found == expected
        assert taken() == before
    net = nn.Linear(4, 2)
    with kitsune.accelerate():
        for _ in range(6):
            net.zero_grad()
            net(X).square().mean().backward()
            kitsune.flush()
    assert taken()["backwards_followed"] > before["backwards_followed"]


def taken() -> dict[str, int]:
    return {name: kitsune.counters()[name] for name in ("recorded", "observed", "followed", "backwards_followed")}
