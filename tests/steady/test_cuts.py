"""A number is read while a backward is owed: the region goes on behind it, and all is as in eager."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import kitsune
from kitsune.lazy.cuts import MAX_CUTS
from tests.runtime.repeated import graphs

STEPS = 12
COUNTED = ("followed", "backwards_followed", "realized", "replayed")


class Net(nn.Module):
    """With what autograd saves in several ways: statistics, masks, what is written in place, views."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.batch = nn.LayerNorm(8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.batch(self.first(x)), inplace=True)
        self.hidden = x.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)
        x = F.dropout(F.gelu(self.norm(self.second(self.hidden))), 0.2, self.training)
        return self.head(x)  # type: ignore[no-any-return]


class Loop:
    """What a program has, and what it notes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.xs, self.ys = torch.randn(STEPS, 2, 8, 8), torch.randint(0, 3, (STEPS, 2, 8))
        self.found: list[Any] = []
        self.last: Any = None

    def loss(self, k: int, n: int = 0) -> Tensor:
        return F.cross_entropy(self.net(self.xs[k, n]), self.ys[k, n])

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


Step = Callable[[Loop, int], Any]
LOOPS: dict[str, Step] = {}
# Of each step once it is known: calls that were followed, backwards that were followed, calls made again for their graph.
KNOWN: dict[str, tuple[int, int]] = {}


def loop(backwards: int, realized: int = 0) -> Callable[[Step], Step]:
    def add(step: Step) -> Step:
        LOOPS[step.__name__], KNOWN[step.__name__] = step, (backwards, realized)
        return step

    return add


@loop(1)
def before(t: Loop, k: int) -> None:
    loss = t.loss(k)
    t.found.append(loss.item())
    loss.backward()
    t.update()


@loop(1)
def two_questions(t: Loop, k: int) -> None:
    loss = t.loss(k)
    if torch.isnan(loss) or torch.isinf(loss):
        return
    loss.backward()
    t.update()


@loop(1)
def then_scaled(t: Loop, k: int) -> None:
    loss = t.loss(k)
    t.found.append(loss.item())
    (loss * 0.5).backward()
    t.update()


@loop(2)
def accumulated(t: Loop, k: int) -> None:
    for n in range(2):
        loss = t.loss(k, n)
        t.found.append(loss.item())
        loss.backward()
    t.update()


@loop(1)
def two_losses(t: Loop, k: int) -> None:
    one = t.loss(k)
    t.found.append(one.item())
    other = t.net.hidden.square().mean()
    t.found.append(other.item())
    (one + other).backward()
    t.update()


@loop(1)
def read_again_after_the_backward(t: Loop, k: int) -> None:
    loss = t.loss(k)
    t.found.append(loss.item())
    loss.backward()
    t.found.append(loss.item())
    t.update()
    t.found.append(loss)


@loop(1)
def what_is_held_is_written(t: Loop, k: int) -> None:
    loss = t.loss(k)
    t.found.append(loss.item())
    noted = t.net.hidden.detach().clone()
    noted += 1
    loss.backward()
    t.update()
    t.found.append(noted)


@loop(0, 1)
def the_graph_is_asked_for(t: Loop, k: int) -> None:
    loss = t.loss(k)
    t.found += [loss.item(), str(type(loss.grad_fn)), str(type(loss.grad_fn.next_functions[0][0]))]
    loss.backward()
    t.update()


@loop(0, 1)
def a_second_backward(t: Loop, k: int) -> None:
    loss = t.loss(k)
    t.found.append(loss.item())
    loss.backward(retain_graph=True)
    loss.backward()
    t.update()


@loop(0, 1)
def gradients_of_gradients(t: Loop, k: int) -> None:
    loss = t.loss(k)
    t.found.append(loss.item())
    grads = torch.autograd.grad(loss, [t.net.head.weight, t.net.first.weight], create_graph=True)
    (loss + sum(g.square().sum() for g in grads)).backward()
    t.update()


@loop(0, 1)
def a_hook_comes_behind_it(t: Loop, k: int) -> None:
    loss = t.loss(k)
    t.found.append(loss.item())
    handle = t.net.hidden.register_hook(lambda grad: grad * 2)
    loss.backward()
    handle.remove()
    t.update()


@loop(0, 1)
def a_saved_value_is_written(t: Loop, k: int) -> None:
    loss = t.loss(k)
    t.found.append(loss.item())
    with torch.no_grad():
        t.net.hidden.mul_(2)
    try:
        loss.backward()
    except RuntimeError as error:
        t.found.append("modified by an inplace operation" in str(error))
    t.update()


def _told(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found.detach().tolist()
    return found


def run(step: Step, context: Any, until: int = STEPS) -> tuple[Any, list[list[int]]]:
    t, counts = Loop(), []
    with context:
        for k in range(until):
            before = kitsune.counters()
            step(t, k)
            counts.append([kitsune.counters()[name] - before[name] for name in COUNTED])
    left = [*t.net.state_dict().values(), *(s["momentum_buffer"] for s in t.optimizer.state.values()), torch.get_rng_state()]
    return [_told(x) for x in (*t.found, *left)], counts


def as_in_eager(step: Step, way: str) -> list[int]:
    """Both runs are the same; returns what was counted in the last step."""
    expected, _ = run(step, contextlib.nullcontext())
    kitsune.reset()
    with graphs(kernels=False) if way == "replayed" else contextlib.nullcontext():
        got, counts = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected
    return counts[-1]


@pytest.mark.parametrize("way", ["op by op", "replayed"])
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_looks_before_it_goes_backward_is_eagers(name: str, way: str) -> None:
    n_followed, backwards, realized, replayed = as_in_eager(LOOPS[name], way)
    assert (backwards, realized) == KNOWN[name] and n_followed >= 8
    assert way != "replayed" or not backwards or replayed >= 2


@pytest.mark.parametrize("every", [2, 5])
def test_a_number_that_is_read_now_and_then(every: int) -> None:
    def step(t: Loop, k: int) -> None:
        loss = t.loss(k)
        if k % every == 0:
            t.found.append(loss.item())
        loss.backward()
        t.update()

    expected, _ = run(step, contextlib.nullcontext())
    with graphs(kernels=False):
        got, counts = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected
    assert [c[1:3] for c in counts[every * 2 :]] == [[1, 0]] * (STEPS - every * 2)


def test_both_parts_are_replayed_from_the_fourth_step_on() -> None:
    """A loss that is held into the next step is handed out elsewhere each time: known before the second part is captured."""

    def step(t: Loop, k: int) -> None:
        loss = t.loss(k)
        t.found.append(loss.item())
        loss.backward()
        t.last = loss.detach()
        t.update()

    expected, _ = run(step, contextlib.nullcontext())
    kitsune.reset()
    with graphs(kernels=False):
        got, counts = run(step, kitsune.accelerate(device="cpu"))
        captured, missed = (kitsune.counters()[name] for name in ("captured", "graph_missed"))
    assert got == expected
    # Observed, and run for the first time; then the first part is captured, and the second where that leaves what it reads.
    assert [c[3] for c in counts] == [0, 0, 1, *[2] * (STEPS - 3)] and (captured, missed) == (2, {})


def test_a_step_that_is_given_up_behind_its_cut() -> None:
    def step(t: Loop, k: int) -> None:
        loss = t.loss(k)
        if loss.item() > 0 and k % 3 != 1:
            loss.backward()
            t.update()

    expected, _ = run(step, contextlib.nullcontext())
    got, counts = run(step, kitsune.accelerate(device="cpu"))
    # The region goes on with the forward of the next step, whose read ends it: a backward was not expected then.
    assert got == expected and [c[1:3] for c in counts[-3:]] == [[1, 0], [0, 0], [0, 1]]


def test_losses_without_a_backward_are_regions_of_their_own_soon() -> None:
    def step(t: Loop, k: int) -> None:
        t.found.append(t.loss(k).item())

    expected, _ = run(step, contextlib.nullcontext())
    kitsune.reset()
    with graphs(kernels=False):
        got, counts = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected
    # The second loss came behind the first one's cut.
    assert all(replayed for *_, replayed in counts[6:]) and kitsune.counters()["regions"] <= 4


def test_where_backwards_have_not_come_none_is_waited_for() -> None:
    t, cuts = Loop(), []
    with kitsune.accelerate(device="cpu"):
        for k in range(8):
            t.loss(k).item()
            pipeline = next(iter(kitsune.contexts.here.depth))
            cuts.append(pipeline.recorder.region.cut is not None)
    assert cuts == [True, *[False] * 7]


def test_a_step_that_reads_on_and_on_is_cut_a_few_times() -> None:
    """What only one of the questions was about is not kept for those behind it."""
    n_cuts, n_kept = list[int](), list[int]()

    def step(t: Loop, k: int) -> None:
        loss = t.loss(k)
        for n in range(MAX_CUTS + 3):
            t.found.append((loss * n).item())
            for pipeline in kitsune.contexts.here.depth:
                n_cuts.append(len(pipeline.recorder.region.cuts))
                n_kept.append(len(pipeline.recorder.region.kept))
        loss.backward()
        t.update()

    expected, _ = run(step, contextlib.nullcontext())
    got, _ = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected and max(n_cuts) == MAX_CUTS
    assert n_kept[:MAX_CUTS] == [n_kept[0]] * MAX_CUTS and n_kept[0] > 0


def test_behind_a_backward_a_region_begins_anew_to_wait_for_one() -> None:
    t = Loop()
    with kitsune.accelerate(device="cpu"):
        for k in range(6):
            before(t, k)
            t.loss(k).item()
            t.loss(k, 1).backward()
            for n in range(3):
                t.loss(k, n % 2).item()
            pipeline = next(iter(kitsune.contexts.here.depth))
            assert len(pipeline.recorder.region.cuts) <= 1
            t.update()


def test_a_backward_that_comes_after_all_is_expected_again() -> None:
    def step(t: Loop, k: int) -> None:
        loss = t.loss(k)
        t.found.append(loss.item())
        if k > 4:
            loss.backward()
            t.update()

    expected, _ = run(step, contextlib.nullcontext())
    got, counts = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected and counts[-1][1:3] == [1, 0]


def test_a_frozen_layer_saves_something_else() -> None:
    """The ops and the calls before the read are the same; what autograd saves of them is not."""

    def step(t: Loop, k: int) -> None:
        t.net.first.weight.requires_grad_(k % 4 < 2)
        t.net.norm.weight.requires_grad_(k % 3 > 0)
        before(t, k)

    expected, _ = run(step, contextlib.nullcontext())
    got, _ = run(step, kitsune.accelerate(device="cpu"))
    assert got == expected


def test_nothing_is_kept_behind_the_end_of_a_step() -> None:
    t = Loop()
    with kitsune.accelerate(device="cpu"):
        for k in range(4):
            before(t, k)
        loss = t.loss(5)
        loss.item()
        pipeline = next(iter(kitsune.contexts.here.depth))
        region = pipeline.recorder.region
        assert region.cut is not None and region.kept and region.calls
        loss.backward()
        t.update()
        assert not region.kept and not region.calls and pipeline.recorder.region is not region


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize("name", LOOPS)
def test_a_profiler_sees_the_step_as_it_is_without_it(name: str) -> None:
    counts, seen = {}, set()
    for profiled in (False, True):
        kitsune.reset()
        t = Loop()
        with kitsune.accelerate(device="cpu"):
            for k in range(7):
                LOOPS[name](t, k)
            before = kitsune.counters()
            with profile(activities=[ProfilerActivity.CPU]) if profiled else contextlib.nullcontext() as trace:
                LOOPS[name](t, 7)
            counts[profiled] = [kitsune.counters()[counted] - before[counted] for counted in COUNTED]
        seen = {event.name for event in trace.events()} if trace is not None else seen
    assert counts[True] == counts[False] and seen >= {"aten::item", "aten::_local_scalar_dense"}


def test_an_error_behind_a_cut_leaves_the_program_as_in_eager() -> None:
    def step(t: Loop, k: int) -> None:
        loss = t.loss(k)
        t.found.append(loss.item())
        with contextlib.suppress(RuntimeError):
            t.net.head(t.xs[k, 0, :, :6])
        loss.backward()
        t.update()

    expected, _ = run(step, contextlib.nullcontext())
    got, counts = run(step, kitsune.accelerate(device="cpu"))
    # What fails is made for real, with the graph of what was before it.
    assert got == expected and counts[-1][1:3] == [0, 1]


def test_a_backward_is_one_whatever_is_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the door is that float16 puts on for good."""

    def step(t: Loop, k: int) -> None:
        loss = t.loss(k)
        t.found.append(loss.item())
        loss.backward()
        t.found.append(t.net.head.weight.grad.sum().item())
        t.update()

    whole = torch.Tensor.backward
    expected, _ = run(step, contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *args, **kwargs: whole(self, *args, **kwargs))
    kitsune.reset()
    got, _ = run(step, kitsune.accelerate(device="cpu"))
    # The second read ends the region: what comes behind it is another one.
    assert got == expected and kitsune.counters()["regions"] == 4
