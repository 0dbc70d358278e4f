"""Wrappers that nobody holds stand for the same value of the next step. Whoever holds, knows or marks one has it for good."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune
from kitsune.lazy import LazyTensor, used_again
from kitsune.pipeline import listeners

STEPS = 12


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many wrappers were given back each time."""
    counts: list[int] = []
    holds = used_again.counts_of

    def counting(wrappers: list[Any]) -> Any:
        counts.append(len(wrappers))
        return holds(wrappers)

    monkeypatch.setattr(used_again, "counts_of", counting)
    kitsune.reset()
    with kitsune.config.patch(gate=False, fuse=False):
        yield counts
    kitsune.reset()


Look = Callable[["Training", Tensor, Tensor, Tensor], Any]
Early = Callable[["Training", Tensor], Any]


class Training:
    """`look` is called in each step, with what the first layer gave, what it was made of it in place, and the loss."""

    def __init__(self, look: Look, after: Callable[[Training], Any], early: Early) -> None:
        torch.manual_seed(6)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.leaves = [*self.a.parameters(), *self.b.parameters()]
        self.optimizer = torch.optim.SGD(self.leaves, lr=0.05, foreach=True)
        self.xs = [torch.randn(4, 4) for _ in range(STEPS)]
        self.seen: list[Any] = []
        self.kept: dict[str, Any] = {}
        self.look, self.after, self.early, self.at = look, after, early, 0

    def run(self) -> Training:
        for self.at in range(STEPS):
            self.optimizer.zero_grad()
            h = self.a(self.xs[self.at].neg())
            self.early(self, h)
            out = self.b(h.sin()).mul_(2)
            loss = out.square().mean()
            self.look(self, h, out, loss)
            del h, out
            loss.backward()
            self.after(self)
            self.optimizer.step()
            del loss
        return self


def nothing(*ignored: Any) -> None:
    pass


def assert_same(
    look: Look, after: Callable[[Training], Any] = nothing, early: Callable[[Training, Tensor], Any] = nothing
) -> None:
    eager = Training(look, after, early).run()
    with kitsune.accelerate(device="cpu"):
        found = Training(look, after, early).run()
    assert len(found.seen) == len(eager.seen)
    for a, b in zip([*found.seen, *found.leaves], [*eager.seen, *eager.leaves], strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b


def test_they_are_used_again(used: list[int]) -> None:
    ids: list[int] = []
    made: list[int] = []
    listeners.append(lambda graph: made.append(len(graph.outputs)))

    def after(t: Training) -> None:
        ids.extend([id(t.leaves[0].grad), id(t.leaves[-1].grad)])

    try:
        assert_same(lambda t, h, out, loss: ids.append(id(h)), after)
    finally:
        listeners.pop()
    # As many values as in eager outlive a step: none because its wrapper waits for the next.
    assert len(set(ids[-9:])) == 3 and used and len(set(made[-5:-1])) == 1 and made[-2] < 12


def test_so_they_are_behind_a_read(used: list[int]) -> None:
    alive: list[set[int]] = []

    def look(t: Training, h: Tensor, out: Tensor, loss: Tensor) -> None:
        del h, out
        t.seen.append(loss.item())
        alive.append({id(it) for it in gc.get_objects() if type(it) is LazyTensor})

    assert_same(look)
    assert alive[-1] == alive[-2] == alive[-3] and len(alive[-1]) > 4


def test_the_graph_of_one_that_is_held_at_a_read_is_used_up_by_the_backward(used: list[int]) -> None:
    def look(t: Training, h: Tensor, out: Tensor, loss: Tensor) -> None:
        t.kept["h"] = h if t.at % 4 else None
        del h, out
        t.seen.append(loss.item())

    def after(t: Training) -> None:
        if t.kept["h"] is not None:
            with pytest.raises(RuntimeError, match="a second time"):
                t.kept["h"].sum().backward()

    assert_same(look, after)


def test_one_that_is_held_keeps_its_value(used: list[int]) -> None:
    assert_same(lambda t, h, out, loss: t.seen.append(h if t.at % 2 else out), lambda t: t.seen.append(t.leaves[t.at % 4].grad))


def test_one_that_c_holds_keeps_its_value(used: list[int]) -> None:
    def look(t: Training, h: Tensor, out: Tensor, loss: Tensor) -> None:
        if t.at == 8:
            t.kept["owner"] = owner = torch.zeros(4, 4)
            owner.grad = h

    def after(t: Training) -> None:
        if t.at == 9:
            t.seen.append(t.kept["owner"].grad.detach().clone())

    assert_same(look, after)


def test_a_weak_reference_dies_with_its_tensor(used: list[int]) -> None:
    def look(t: Training, h: Tensor, out: Tensor, loss: Tensor) -> None:
        t.kept["h"] = weakref.ref(h)

    assert_same(look, lambda t: t.seen.append(t.kept["h"]() is None))


def test_an_attribute_goes_with_its_tensor(used: list[int]) -> None:
    def look(t: Training, h: Tensor, out: Tensor, loss: Tensor) -> None:
        t.seen += [hasattr(h, "mark"), hasattr(out, "mark")]
        if t.at % 3 == 0:
            h.mark = out.mark = t.at  # type: ignore[attr-defined]

    def after(t: Training) -> None:
        grad: Any = t.leaves[0].grad
        t.seen.append(hasattr(grad, "mark"))
        grad.mark = t.at

    assert_same(look, after)


def test_counts_of_writes_begin_at_nothing(used: list[int]) -> None:
    def look(t: Training, h: Tensor, out: Tensor, loss: Tensor) -> None:
        if t.at == STEPS - 1:
            t.seen += [h._version, out._version]

    def after(t: Training) -> None:
        grad: Any = t.leaves[0].grad
        t.seen.append(grad._version)
        grad.mul_(0.5)

    assert_same(look, after)


def test_counts_of_gradients_begin_at_nothing(used: list[int]) -> None:
    """Also where nobody has asked for them before: who asks for one keeps it."""

    def after(t: Training) -> None:
        grad: Any = t.leaves[0].grad
        if t.at == STEPS - 1:
            t.seen.append(grad._version)
        grad.mul_(0.5)

    assert_same(nothing, after)


def test_one_that_waits_is_as_it_was_made(used: list[int]) -> None:
    """After it was part of another region, too."""

    def after(t: Training) -> None:
        t.seen.append(t.leaves[0].sum().item())
        for leaf in t.leaves:
            leaf.grad.mul_(0.5)  # type: ignore[union-attr]
        if t.at == STEPS - 1:
            t.optimizer.step()
            t.optimizer.zero_grad()

    with kitsune.accelerate(device="cpu"):
        Training(nothing, after, nothing).run()
        cells = [t.cell for t in gc.get_objects() if type(t) is LazyTensor and t.cell.region is None and t.cell.home is not None]
    assert cells
    for cell in cells:
        assert (cell.ref, cell.storage, cell.external) == (cell.home.ref, cell.home.storage, False)


def aliased(tensor: Any, where: str) -> Any:
    """An alias of a tensor, made in one way or another."""
    found: list[Any] = []

    def alias() -> None:
        found.append(tensor.detach())

    if where == "in a thread":
        thread = threading.Thread(target=alias)
        thread.start()
        thread.join()
        return found[0]
    with {
        "here": contextlib.nullcontext,
        "past the API": torch._C.DisableTorchFunction,
        "paused": kitsune.disable,
        "in a context that does not follow": unfollowed,
    }[where]():
        alias()
    return found[0]


@contextlib.contextmanager
def unfollowed() -> Iterator[None]:
    with kitsune.config.patch(follow=False), kitsune.accelerate(device="cpu", numerics="bitwise"):
        yield


WAYS = ["here", "past the API", "paused", "in a thread", "in a context that does not follow"]


def test_an_alias_has_no_part_in_later_writes(used: list[int]) -> None:
    def early(t: Training, h: Tensor) -> None:
        if t.at == 7:
            t.kept["alias"] = h.detach()
        if t.at > 7:
            h.mul_(1.5)

    assert_same(nothing, lambda t: t.seen.append(t.kept["alias"]._version if t.at > 7 else 0), early)


@pytest.mark.parametrize("where", WAYS)
def test_an_alias_of_a_gradient_has_no_part_in_later_writes(used: list[int], where: str) -> None:
    def after(t: Training) -> None:
        grad: Any = t.leaves[0].grad
        if t.at == 7:
            t.kept["alias"] = aliased(grad, where)
        if t.at > 7:
            grad.mul_(0.5)
            t.seen.append(t.kept["alias"]._version)

    assert_same(nothing, after)


@pytest.mark.parametrize("early", [True, False])
def test_one_that_got_a_history_with_others_is_not_used_as_one_without(used: list[int], early: bool) -> None:
    """Nobody has asked for its own: before its backward for that of another, behind it for that of all."""

    def look(t: Training, h: Tensor, out: Tensor, loss: Tensor) -> None:
        if t.at == 8:
            t.kept["h"] = h
            if early:
                t.seen.append(out.grad_fn is not None)
        elif t.at > 8:
            t.seen += [h.is_leaf, h.requires_grad]

    def after(t: Training) -> None:
        if t.at == 8:
            if not early:
                with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
                    pass
            t.leaves[2].grad = t.kept.pop("h")
            t.optimizer.zero_grad()
        elif t.at > 8:
            t.seen.append([(leaf.grad.is_leaf, leaf.grad.requires_grad) for leaf in t.leaves if leaf.grad is not None])

    assert_same(look, after)


@pytest.mark.parametrize("early", [True, False], ids=["before its backward", "behind it"])
def test_one_with_a_history_is_not_used_as_one_without(used: list[int], early: bool) -> None:
    def look(t: Training, h: Tensor, out: Tensor, loss: Tensor) -> None:
        if t.at == 8:
            t.kept["h"] = h
            if early:
                t.seen.append(str(h.grad_fn).partition(" ")[0])
        else:
            t.seen += [h.is_leaf, h.requires_grad]

    def after(t: Training) -> None:
        if t.at == 8:
            h = t.kept.pop("h")
            t.seen.append(str(h.grad_fn).partition(" ")[0] if early else h.grad_fn is None)
            t.leaves[2].grad = h
            del h
            t.optimizer.zero_grad()

    assert_same(look, after)


def test_a_gradient_of_a_result_goes_with_it(used: list[int]) -> None:
    def look(t: Training, h: Tensor, out: Tensor, loss: Tensor) -> None:
        if t.at == 8:
            h.grad = torch.ones(4, 4)
            t.seen.append(h.grad)

    def after(t: Training) -> None:
        grad: Any = t.leaves[0].grad
        t.seen.append(grad.grad is None)
        grad.grad = torch.ones(4, 4)

    with warnings.catch_warnings():
        # Of what is no leaf.
        warnings.simplefilter("ignore", UserWarning)
        assert_same(look, after)


@pytest.mark.parametrize("where", ["here", "paused", "in a thread"])
def test_a_gradient_that_asks_for_one_is_no_other_ones(used: list[int], where: str) -> None:
    def asks(grad: Any) -> None:
        grad.requires_grad_()

    def after(t: Training) -> None:
        grad: Any = t.leaves[0].grad
        t.seen.append(grad.requires_grad)
        if t.at == 7 and where == "here":
            asks(grad)
        elif t.at == 7 and where == "paused":
            with kitsune.disable():
                asks(grad)
        elif t.at == 7:
            thread = threading.Thread(target=asks, args=(grad,))
            thread.start()
            thread.join()
        if t.at == 7:
            t.leaves[0].grad = None

    assert_same(nothing, after)


def test_gradients_let_go_of_their_memory(used: list[int]) -> None:
    def after(t: Training) -> None:
        if t.at == STEPS - 1:
            t.optimizer.step()
            t.optimizer.zero_grad()

    with kitsune.accelerate(device="cpu"):
        training = Training(nothing, after, nothing).run()
        waiting = [t for t in gc.get_objects() if type(t) is LazyTensor and t.cell.region is None]
    assert len(waiting) > len(training.leaves) and all(wrapper.cell.real is None for wrapper in waiting)
