"""A view of a leaf is one behind a followed backward, too: autograd refuses to have it written, and goes through it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune


def looked_at(t: Tensor) -> None:
    raise RuntimeError(f"{type(t.grad_fn).__name__} {t.is_leaf} {t.requires_grad} {t._is_view()}")


def told_of(t: Tensor) -> None:
    assert t.grad_fn is not None and t.requires_grad


View = Callable[[Tensor], Tensor]
VIEWS: dict[str, View] = {
    "diagonal": lambda w: w.diagonal(),
    "of a view": lambda w: w[0][1:],
    "one of many": lambda w: w.unbind(0)[2],
    "of one of many": lambda w: w.split([1, 3])[1][1:],
    "transposed": lambda w: w.t(),
    "of a result": lambda w: (w * 2)[1],
}
ACTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "added to": lambda t, w: t.add_(1),
    "zeroed": lambda t, w: t.zero_(),
    "indexed": lambda t, w: t.__setitem__(0, 1),
    "copied to": lambda t, w: t.copy_(t * 2),
    "as out": lambda t, w: torch.add(t, 1, out=t),
    "many": lambda t, w: torch._foreach_add_([t], 1),
    "inplace": lambda t, w: nn.functional.relu(t, inplace=True),
    "with no gradients": lambda t, w: torch.no_grad()(t.mul_)(2),
    "behind a write": lambda t, w: (torch.no_grad()(t.mul_)(2), t.add_(1)),
    "behind a look": lambda t, w: (torch.no_grad()(t.mul)(2).tolist(), t.add_(1)),
    "behind two looks": lambda t, w: (torch.no_grad()(t.mul)(2).tolist(), torch.no_grad()(t.mul)(3).tolist(), t.add_(1)),
    "of a leaf that is frozen": lambda t, w: (w.requires_grad_(False), told_of(t), w.requires_grad_()),
    "resized": lambda t, w: t.resize_(1),
    "through data": lambda t, w: t.data.add_(1),
    "used again": lambda t, w: (t * 3).sum().backward(),
    "asked": lambda t, w: torch.autograd.grad(t.sin().sum(), w),
    "looked at": lambda t, w: looked_at(t),
}
# Of a result, its graph is used up: what eager says of that is Kitsune's to say of all.
USED_UP = {"used again", "asked", "looked at"}


def told(view: View, act: Callable[[Tensor, Tensor], Any], context: Callable[[], Any], reads: bool) -> list[Any]:
    w, found = nn.Parameter(torch.arange(16.0).view(4, 4)), list[Any]()
    for _ in range(5):
        with context():
            w.grad = None
            t = view(w)
            (t * t).mean().backward()
            if reads:
                found.append(w.grad.tolist())  # type: ignore[union-attr]
            try:
                act(t, w)
            except RuntimeError as error:
                found.append(str(error))
            found += [w.grad.tolist(), w.tolist(), t.tolist(), w._version]  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("reads", [False, True], ids=["", "in a region that has ended"])
@pytest.mark.parametrize(("name", "act"), [(n, act) for n in VIEWS for act in ACTS if n != "of a result" or act not in USED_UP])
def test_a_view_of_a_leaf_is_one_behind_a_followed_backward(name: str, act: str, reads: bool) -> None:
    expected = told(VIEWS[name], ACTS[act], contextlib.nullcontext, reads)
    kitsune.reset()
    with kitsune.config.patch(gate=False):
        before = kitsune.counters()["backwards_followed"]
        assert told(VIEWS[name], ACTS[act], lambda: kitsune.accelerate(device="cpu"), reads) == expected
        assert kitsune.counters()["backwards_followed"] > before


def test_of_two_leaves_in_one_memory_none_is_taken_for_the_other() -> None:
    memory, found = torch.arange(8.0), []
    for context in (contextlib.nullcontext, lambda: kitsune.accelerate(device="cpu")):
        leaves = [nn.Parameter(memory[k : k + 4]) for k in (0, 4)]
        for _ in range(4):
            leaves[0].grad = leaves[1].grad = None
            with context():
                total = leaves[0].sum()
                t = leaves[1][1:3]
                (total + (t * t).sum()).backward()
                with contextlib.suppress(RuntimeError):
                    (t * 3).sum().backward()
            found.append(leaves[0].grad.tolist())  # type: ignore[union-attr]
    assert found[:4] == found[4:]


def used_again(view: View, context: Callable[[], Any]) -> list[Any]:
    """A view is kept from the step before, and the graph of what is calculated from it is asked for."""
    torch.manual_seed(0)
    w, found = nn.Parameter(torch.arange(16.0).view(4, 4) / 16), list[Any]()
    for _ in range(6):
        with context():
            w.grad = None
            t = view(w)
            (t * t).mean().backward()
            h = nn.functional.dropout((t * 3).exp(), 0.5)
            h.add_(1)
            told_of(h)
            h.sum().backward()
            found += [h.tolist(), w.grad.tolist(), torch.get_rng_state().tolist()]  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "of a result"])
def test_calls_behind_a_view_that_is_used_again_are_made_once(name: str) -> None:
    expected = used_again(VIEWS[name], contextlib.nullcontext)
    kitsune.reset()
    with kitsune.config.patch(gate=False):
        assert used_again(VIEWS[name], lambda: kitsune.accelerate(device="cpu")) == expected
        followed, realized = kitsune.counters()["backwards_followed"], kitsune.counters()["realized"]
    assert followed and realized
