"""The short ways of a step that repeats (backward, update, replay): something is otherwise in one step, the way it matters to is
not taken there, and numbers stay eager's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune
from kitsune.lazy.backward_matchers import BackwardMatcher
from kitsune.lazy.matcher_steps import MISS
from kitsune.lazy.update_matchers import UpdateMatcher
from kitsune.standing import Replays
from tests.runtime.repeated import graphs

STEPS, AT = 14, 10
pytestmark = pytest.mark.usefixtures("repeatable")


class Crossing(torch.optim.AdamW):
    """Updates two parameters by each other's gradient and state when it is told to."""

    crossed = False

    def _init_group(self, group: Any, params: Any, *others: Any) -> Any:
        returned = super()._init_group(group, params, *others)
        if self.crossed:
            params[0], params[2] = params[2], params[0]
        return returned


class Loop:
    """A training of two equal layers with two losses; `otherwise` has what is done in another way in step AT."""

    def __init__(self, otherwise: dict[str, Callable[[Loop], Any]], schedule: bool = False, sgd: bool = False) -> None:
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.leaves = [*self.a.parameters(), *self.b.parameters()]
        self.optimizer: Any = Crossing(self.leaves, lr=0.01, weight_decay=0.1, fused=True)
        if sgd:
            # It writes no gradient, not even by its schema.
            self.optimizer = torch.optim.SGD(self.leaves, lr=0.01, momentum=0.9, foreach=True)
        self.xs = list(torch.randn(STEPS, 4, 6).unbind())
        # Of a number that moves, only a kernel could be replayed.
        self.schedule = schedule
        self.otherwise, self.at = otherwise, -1
        self.losses: list[Any] = []
        self.kept: list[Any] = []
        self.held: list[Any] = []
        self.nodes: list[Any] = []

    def do(self, what: str, usual: Callable[[Loop], Any] = lambda loop: None) -> Any:
        return (self.otherwise.get(what, usual) if self.at == AT else usual)(self)

    def step(self) -> None:
        if self.schedule:
            self.optimizer.param_groups[0]["lr"] = 0.01 + 0.001 * self.at
        with self.do("around first", lambda loop: contextlib.nullcontext()):
            # Nothing here saves a result, which autograd detaches: the operators are the same without a graph.
            h = self.a(self.xs[self.at])
        out = self.b(h)
        self.losses = [out.square().mean(), (out * 2).abs().mean()]
        self.do("backward", lambda loop: loop.losses[0].backward())
        self.kept.append(self.losses[0].detach())
        self.do("update")
        self.optimizer.step()
        # The gradients of the step before the other one outlive it.
        self.held = [leaf.grad for leaf in self.leaves]
        self.optimizer.zero_grad()


def run(otherwise: dict[str, Callable[[Loop], Any]], context: Callable[[], Any], **options: bool) -> Loop:
    loop = Loop(otherwise, **options)
    for loop.at in range(STEPS):
        loop.do("before")
        with loop.do("around", lambda _: contextlib.nullcontext()), context():
            loop.step()
    return loop


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[bool]]]:
    """Whether each short way was taken, each time that it was there."""
    found: dict[str, list[bool]] = {"backward": [], "update": [], "replay": []}

    def watch(owner: Any, name: str, way: str, was: Callable[[Any], bool]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any) -> Any:
            result = original(*args)
            found[way].append(was(result))
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(BackwardMatcher, "__call__", "backward", lambda result: result is not MISS)
    watch(UpdateMatcher, "match", "update", lambda result: result is not None)
    watch(Replays, "replay", "replay", lambda result: result is not None)
    with graphs(kernels=False), kitsune.config.patch(gate=False):
        yield found


def twice(loop: Loop) -> None:
    loop.losses[0].backward(retain_graph=True)
    loop.losses[0].backward()


def node_hook(loop: Loop) -> None:
    node: Any = loop.a.weight.view_as(loop.a.weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    loop.nodes.append((node, node.register_prehook(lambda grads: tuple(g * 0.5 for g in grads))))


def later_hook(loop: Loop) -> None:
    def halve(leaf: Tensor) -> None:
        assert leaf.grad is not None
        leaf.grad *= 0.5

    loop.a.weight.register_post_accumulate_grad_hook(halve)


def grads_swapped(loop: Loop) -> None:
    loop.a.weight.grad, loop.b.weight.grad = loop.b.weight.grad, loop.a.weight.grad


def state_replaced(loop: Loop) -> None:
    state = loop.optimizer.state[loop.a.weight]
    state["exp_avg"] = torch.ones_like(state["exp_avg"])


def batch_is_state(loop: Loop) -> None:
    loop.xs[AT] = loop.optimizer.state[loop.a.weight]["exp_avg"][:4]


def flag_of_state(loop: Loop) -> Any:
    loop.optimizer.state[loop.a.weight]["exp_avg"].requires_grad_()
    return contextlib.nullcontext()


def layers_swapped(loop: Loop) -> None:
    loop.a, loop.b = loop.b, loop.a


def option(name: str, value: Any) -> Callable[[Loop], Any]:
    return lambda loop: loop.optimizer.param_groups[0].update({name: value})


def before(change: Callable[[Loop], Any]) -> dict[str, Callable[[Loop], Any]]:
    return {"before": change}


def backward(change: Callable[[Loop], Any]) -> dict[str, Callable[[Loop], Any]]:
    return {"backward": change}


def update(change: Callable[[Loop], Any]) -> dict[str, Callable[[Loop], Any]]:
    return {"update": change}


# What is otherwise, and the way that is not to be taken then.
OTHERWISE: dict[str, tuple[dict[str, Callable[[Loop], Any]], str]] = {
    "another loss": (backward(lambda loop: loop.losses[1].backward()), "backward"),
    "twice": (backward(twice), "backward"),
    "with a gradient": (backward(lambda loop: loop.losses[0].backward(torch.tensor(0.5))), "backward"),
    "for one leaf": (backward(lambda loop: loop.losses[0].backward(inputs=[loop.a.weight])), "backward"),
    "a gradient is there": (before(lambda loop: setattr(loop.a.weight, "grad", torch.ones(6, 6))), "backward"),
    "a hook": (before(lambda loop: loop.a.weight.register_hook(lambda grad: grad * 0.5)), "backward"),
    "a later hook": (before(later_hook), "backward"),
    "a hook on a node": (before(node_hook), "backward"),
    "anomaly mode": ({"around": lambda loop: torch.autograd.set_detect_anomaly(True)}, "backward"),
    "no graph of a layer": ({"around first": lambda loop: torch.no_grad()}, "backward"),
    "a bias is frozen": (before(lambda loop: loop.a.bias.requires_grad_(False)), "backward"),
    "gradients swapped": (update(grads_swapped), "update"),
    "a gradient of the step before": (update(lambda loop: setattr(loop.a.weight, "grad", loop.held[0])), "update"),
    "a gradient of before, SGD": (update(lambda loop: setattr(loop.a.weight, "grad", loop.held[0])), "update"),
    "no learning rate": (update(option("lr", 0.0)), "update"),
    "a flag of the state": ({"around first": flag_of_state}, "update"),
    "layers in another order": (before(layers_swapped), "update"),
    "lists are others": (update(lambda loop: setattr(loop.optimizer, "crossed", True)), "update"),
    "no weight decay": (before(option("weight_decay", 0.0)), "update"),
    "the other way": (before(option("maximize", True)), "update"),
    "another state": (before(state_replaced), "update"),
    "a batch in the state's memory": (before(batch_is_state), "update"),
    "weights elsewhere": (before(lambda loop: setattr(loop.a.weight, "data", loop.a.weight.data.clone())), "replay"),
    "a knob": (before(lambda loop: setattr(kitsune.config, "max_graphs", 7)), "replay"),
    "a library's switch": (before(lambda loop: torch._C._set_cudnn_benchmark(not torch._C._get_cudnn_benchmark())), "replay"),
}


@pytest.fixture
def put_back() -> Iterator[None]:
    switch, most = torch._C._get_cudnn_benchmark(), kitsune.config.max_graphs
    yield
    torch._C._set_cudnn_benchmark(switch)
    kitsune.config.max_graphs = most


@pytest.mark.usefixtures("put_back")
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", OTHERWISE)
def test_a_step_that_is_otherwise_goes_the_long_way(name: str, taken: dict[str, list[bool]]) -> None:
    otherwise, way = OTHERWISE[name]
    options = {"schedule": way != "replay", "sgd": name.endswith("SGD")}
    plain = run(otherwise, contextlib.nullcontext, **options)
    loop = Loop(otherwise, **options)
    # Of new state it is not known at once that it will stay.
    last = AT + (name == "another state")
    n_before = n_after = 0
    for loop.at in range(STEPS):
        if loop.at == AT:
            n_before = len(taken[way])
            assert taken[way][-2:] == [True, True], "the way was not taken when nothing was otherwise"
        loop.do("before")
        with loop.do("around", lambda _: contextlib.nullcontext()), kitsune.accelerate(device="cpu"):
            loop.step()
        if loop.at == last:
            n_after = len(taken[way])
    assert not any(taken[way][n_before:n_after]), "the way was taken"
    for found, expected in zip([*loop.kept, *loop.leaves], [*plain.kept, *plain.leaves], strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=0)


def test_a_backward_goes_where_its_graph_was_made(taken: dict[str, list[bool]]) -> None:
    """The same operators, half of the time without a graph of the first layer."""

    def losses(context: Callable[[], Any]) -> Loop:
        loop = Loop({"around first": lambda loop: torch.no_grad()})
        with context():
            for k in range(2 * STEPS):
                loop.at = AT if k % 2 else AT - 1
                loop.step()
        return loop

    plain, loop = losses(contextlib.nullcontext), losses(lambda: kitsune.accelerate(device="cpu"))
    assert sum(taken["backward"]) > STEPS
    for found, expected in zip([*loop.kept, *loop.leaves], [*plain.kept, *plain.leaves], strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=0)


def test_ways_are_taken_in_steps_that_are_alike(taken: dict[str, list[bool]]) -> None:
    plain = run({}, contextlib.nullcontext)
    with kitsune.accelerate(device="cpu"):
        loop = run({}, contextlib.nullcontext)
    assert min(sum(ways) for ways in taken.values()) >= STEPS - 5, taken
    for found, expected in zip([*loop.kept, *loop.leaves], [*plain.kept, *plain.leaves], strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=0)
