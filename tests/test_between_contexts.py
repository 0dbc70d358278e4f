"""A context around each step: what is known of tensors holds from one to the next, unless somebody changed them in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune.lazy import door_set
from kitsune.session import trace_regions

pytestmark = pytest.mark.usefixtures("afresh")

STEPS = 12
CHANGED = 7


class Loop:
    """Trains with its step as it is, or under a decorator."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, **{"foreach": True, **options})
        self.batches = torch.randn(STEPS, 8, 6)

    def step(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), torch.arange(8) % 3)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def run(self, step: Callable[[Tensor], Tensor], change: Callable[[Loop], None] | None = None) -> list[Tensor]:
        losses = []
        for i, x in enumerate(self.batches):
            if i == CHANGED and change is not None:
                change(self)
            losses.append(step(x))
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [*map(torch.clone, losses), *self.model.parameters(), *state]


def compared(change: Callable[[Loop], None] | None, **options: Any) -> dict[str, Any]:
    eager, ours = Loop(**options), Loop(**options)
    expected = eager.run(eager.step, change)
    got = ours.run(kitsune.accelerate(device="cpu")(ours.step), change)
    assert all(map(torch.equal, got, expected))
    return kitsune.counters()


def frozen(loop: Loop) -> None:
    loop.model[0].bias.requires_grad_(False)


def other_memory(loop: Loop) -> None:
    loop.model[0].weight.data = loop.model[0].weight.data * 2


def other_strides(loop: Loop) -> None:
    loop.model[0].weight.data = loop.model[0].weight.data.t().contiguous().t()


def written_by_numpy(loop: Loop) -> None:
    loop.shared = loop.model[0].weight.detach().numpy()  # type: ignore[attr-defined]
    loop.shared[:] = 0.5  # type: ignore[attr-defined]


def other_parameter(loop: Loop) -> None:
    loop.model[2].bias = nn.Parameter(torch.ones(3))
    loop.optimizer.param_groups[0]["params"][3] = loop.model[2].bias


def swapped(loop: Loop) -> None:
    torch.utils.swap_tensors(loop.model[0].weight, nn.Parameter(torch.ones(16, 6)))


def loaded(loop: Loop) -> None:
    loop.optimizer.load_state_dict(loop.optimizer.state_dict())


def no_rate(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["lr"] = 0.0


def no_decay(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["weight_decay"] = 0.0


CHANGES = [frozen, other_memory, other_strides, written_by_numpy, other_parameter, swapped, loaded, no_rate, no_decay]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_between_two_steps_is_seen(change: Callable[[Loop], None]) -> None:
    compared(change)


@pytest.mark.parametrize("change", [frozen, other_memory, swapped, loaded], ids=lambda f: f.__name__)
def test_so_it_is_where_the_update_is_one_operator(change: Callable[[Loop], None]) -> None:
    compared(change, fused=True, foreach=None)


@pytest.mark.parametrize("options", [{}, {"fused": True, "foreach": None}], ids=["foreach", "fused"])
def test_what_is_known_holds_from_one_context_to_the_next(options: dict[str, Any]) -> None:
    counters = compared(None, **options)
    # All but the first three: observed, learned, and learned again as the update's numbers have moved.
    assert counters["backwards_followed"] >= STEPS - 3 and counters["updates_followed"] >= STEPS - 5


def test_a_decay_that_moves_and_then_stops_is_another_update() -> None:
    def train(context: Any) -> list[Tensor]:
        loop = Loop()
        with context:
            for i, x in enumerate(loop.batches):
                loop.optimizer.param_groups[0]["weight_decay"] = max(0.1 * (8 - i), 0.0)
                loop.step(x)
        return list(loop.model.parameters())

    expected = train(kitsune.disable())
    with trace_regions() as graphs:
        assert all(map(torch.equal, train(kitsune.accelerate(device="cpu")), expected))
    assert kitsune.counters()["updates_followed"] > 0
    # With a decay, parameters are multiplied too: by 1.0 that would go unnoticed.
    n_products = [sum("_foreach_mul_" in str(op.target) for op in graph.ops) for graph in graphs]
    assert [n for n in n_products if n][3::8] == [2, 1]


def test_a_constant_is_read_without_a_flush() -> None:
    def ask(x: Tensor) -> Tensor:
        places = torch.arange(4)
        return x * 2 if bool((places.diff() == 1).all()) else x

    with kitsune.accelerate(device="cpu"):
        for _ in range(4):
            got = ask(torch.ones(4))
            kitsune.flush()
    assert got.tolist() == [2.0] * 4 and not any(flush.cause == "ITEM" for flush in kitsune.explain().flushes)


@pytest.mark.parametrize("make", [lambda: torch.rand(3), lambda: torch.ones(3) * float(next(NUMBERS))], ids=["random", "moving"])
def test_what_moves_is_no_constant(make: Callable[[], Tensor]) -> None:
    def seen(context: Any) -> list[float]:
        torch.manual_seed(0)
        NUMBERS.reset()
        with context:
            return [(make().sum().item(), kitsune.flush())[0] for _ in range(5)]

    assert seen(kitsune.accelerate(device="cpu")) == seen(kitsune.disable())


class Counting:
    """1.5, 2.5, ... from the beginning after each reset."""

    def __init__(self) -> None:
        self.n = 0.5

    def reset(self) -> None:
        self.n = 0.5

    def __next__(self) -> float:
        self.n += 1
        return self.n


NUMBERS = Counting()


# Ways by which a plain tensor takes over the memory of a result.
TAKES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "data": lambda t: _with_data(nn.Parameter(torch.ones(2, 3)), t),
    "data of a plain tensor": lambda t: _with_data(torch.ones(2, 3), t),
    "data of data": lambda t: _with_data(torch.ones(2, 3), t.data),
    "data of another shape": lambda t: _with_data(torch.ones(7), t[0]),
    "a parameter": nn.Parameter,
    "a buffer": nn.Buffer,
    "_make_subclass": lambda t: torch.Tensor._make_subclass(nn.Parameter, t),
    "a state that is assigned": lambda t: _assigned(nn.Linear(3, 2, bias=False), t),
}


def _with_data(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    tensor.data = value
    return tensor


def _assigned(layer: nn.Linear, weight: torch.Tensor) -> torch.Tensor:
    layer.load_state_dict({"weight": weight}, assign=True)
    return layer.weight


@pytest.fixture
def doors_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that has opened few contexts."""
    monkeypatch.setattr(door_set, "OPENINGS", 1 << 30)


@pytest.mark.usefixtures("doors_close")
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("way", TAKES)
def test_a_result_gives_its_memory_after_its_context_too(way: str, warmup: int) -> None:
    x = torch.arange(6.0).view(2, 3)
    with kitsune.accelerate(warmup=warmup, device="cpu"):
        result = x * 2
    assert TAKES[way](result).tolist() == TAKES[way](x * 2).tolist()


@pytest.mark.usefixtures("doors_close")
def test_a_result_gives_its_memory_once_the_steps_are_left_to_eager() -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    with kitsune.accelerate(device="cpu"):
        result = torch.arange(6.0) * 2
        kitsune.set_stance("force_eager")
        try:
            parameter.data = result
            seen = parameter.tolist()
        finally:
            kitsune.set_stance("default")
    assert seen == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


AROUND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "other numerics": ({"numerics": "bitwise"}, {"numerics": "strict"}),
    "lazy inside": ({"warmup": 1}, {"warmup": 0}),
    "lazy outside": ({"warmup": 0}, {"warmup": 1}),
}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", AROUND)
def test_contexts_with_options_of_their_own_may_be_in_each_other(name: str, each: bool, foreach: bool) -> None:
    """The state that an update begins with is made by ops that both see: each has numbers of its own for it."""
    outer, inner = AROUND[name]
    eager, ours = Loop(foreach=foreach), Loop(foreach=foreach)
    expected = eager.run(eager.step)
    with kitsune.accelerate(device="cpu", **outer):
        context = kitsune.accelerate(device="cpu", **inner)
        if each:
            got = ours.run(context(ours.step))
        else:
            with context:
                got = ours.run(ours.step)
    assert all(map(torch.equal, got, expected))
    assert kitsune.counters()["recorded"]


@pytest.mark.parametrize("options", [{}, {"numerics": "bitwise"}, {"numerics": "strict"}], ids=["usual", "bitwise", "strict"])
def test_an_optimizer_of_kitsunes_steps_in_a_context_with_options(options: dict[str, Any]) -> None:
    eager, ours = Loop(), Loop()
    expected = eager.run(eager.step)
    ours.optimizer = kitsune.KitsuneOptimizer(ours.optimizer)  # type: ignore[assignment]
    with kitsune.accelerate(device="cpu", **options):
        got = ours.run(ours.step)
    assert all(map(torch.equal, got, expected))
