"""Parts before and behind a read that were planned as one: the second reads what the first leaves, whatever else may come."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune.ir import Graph, Handover
from kitsune.joined import Left
from kitsune.pairs import Pairs
from kitsune.planning import Planner
from kitsune.running import Runner
from kitsune.scheduler import RATES, Pair
from tests.plan.recorded import recorded_again
from tests.plan.test_channels_last import ImagesOnly
from tests.runtime.repeated import graphs
from tests.steady.test_cuts import LOOPS, run as run_small
from tests.steady.test_cuts_held import CASES

STEPS = 14
# Steps in which something else comes behind the read than in the others.
ODD = (8, 11)


class Net(nn.Module):
    """Images, with statistics, what is written in place, a mask, and a sum of two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.third, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x)), inplace=True), 2)
        self.hidden = F.relu(self.third(x + self.second(x)))
        return self.head(F.dropout(self.hidden.mean((2, 3)), 0.2))  # type: ignore[no-any-return]


Behind = Callable[[int, Net, Tensor, list[Any]], Any]
LOOKS: dict[str, Behind] = {}
# Times that what was kept had to be made again.
RESTORED: dict[str, int] = {}


def look(restored: int) -> Callable[[Behind], Behind]:
    def add(behind: Behind) -> Behind:
        LOOKS[behind.__name__], RESTORED[behind.__name__] = behind, restored
        return behind

    return add


@look(0)
def the_same_each_time(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
    found.append(loss.item())
    loss.backward()


@look(0)
def two_questions(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
    if not (torch.isnan(loss) or torch.isinf(loss)):
        loss.backward()


@look(2)
def the_graph_is_asked_for(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
    found.append(loss.item())
    if k in ODD:
        found.append(type(loss.grad_fn.next_functions[0][0]).__name__)  # type: ignore[union-attr]
    loss.backward()


@look(2)
def what_is_saved_is_looked_at(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
    found.append(loss.item())
    if k in ODD:
        found.extend(saved_by(loss.grad_fn))
    loss.backward()


@look(2)
def a_hook_comes(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
    found.append(loss.item())
    handle = net.hidden.register_hook(lambda grad: grad * 2) if k in ODD else None
    loss.backward()
    if handle is not None:
        handle.remove()
        found.append(net.hidden.stride())


@look(2)
def another_loss_goes_backward(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
    found.append(loss.item())
    (loss * 2 if k in ODD else loss).backward()


@look(2)
def a_step_is_given_up(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
    if loss.item() > 0 and k not in ODD:
        loss.backward()


@look(2)
def a_parameter_is_written_and_read(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
    found.append(loss.item())
    if k in ODD:
        with torch.no_grad():
            net.norm.weight.mul_(2)
        found.append(net.norm.weight.sum().item())
    # The weight was saved, and autograd sees that it was written.
    try:
        loss.backward()
    except RuntimeError as error:
        found.append("modified by an inplace operation" in str(error))


@look(1)
def a_memory_is_asked_for(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
    found.append(loss.item())
    if k == ODD[0]:
        net.head.weight.data_ptr()
        found.append(net.hidden.detach().numpy().strides)
    loss.backward()


def saved_by(node: Any) -> list[Any]:
    """Names, shapes, strides and contents of all that a graph has saved."""
    found, seen, waiting = [], set(), [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        tensors = ((name, getattr(node, name)) for name in sorted(dir(node)) if name.startswith("_saved_"))
        found += [(name, t.stride(), t.detach().tolist()) for name, t in tensors if isinstance(t, Tensor)]
        waiting += [after for after, _ in node.next_functions]
    return found


def run(behind: Behind, context: Any, steps: int = STEPS) -> list[Any]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    xs, ys = torch.randn(steps, 4, 3, 8, 8), torch.randint(0, 5, (steps, 4))
    found: list[Any] = []
    with context:
        for k in range(steps):
            loss = F.cross_entropy(net(xs[k]), ys[k])
            behind(k, net, loss, found)
            optimizer.step()
            optimizer.zero_grad()
    left = [*net.state_dict().values(), *(s["momentum_buffer"] for s in optimizer.state.values()), torch.get_rng_state()]
    return [*found, *(t.tolist() for t in left)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How each part was run: as it was recorded, or with the other; and when what was kept was made again."""
    ways: list[str] = []
    begin, restored = Pairs.begin, Left.restored

    def told(self: Pairs, graph: Graph, values: list[Any], handover: Handover) -> Graph:
        ran = begin(self, graph, values, handover)
        reads = any(v.id in handover.kept for v in graph.inputs)
        part = "first" if graph is handover.first else "second" if reads else "between"
        ways.append(part if ran is graph else f"{part}, joined")
        return ran

    monkeypatch.setattr(Pairs, "begin", told)
    monkeypatch.setattr(Left, "restored", lambda self: (ways.append("restored"), restored(self))[1])
    kitsune.reset()
    yield ways


@contextlib.contextmanager
def by_plan() -> Iterator[None]:
    with kitsune.config.patch(numerics="bitwise", gate=False), graphs():
        yield


@pytest.mark.parametrize("name", LOOKS)
def test_whatever_comes_behind_a_read_is_as_in_eager(name: str, runs: list[str]) -> None:
    expected = run(LOOKS[name], contextlib.nullcontext())
    with by_plan():
        got = run(LOOKS[name], kitsune.accelerate(device="cpu"))
    assert got == expected
    assert runs.count("restored") == RESTORED[name]
    assert runs[-2:] in (["first, joined", "second, joined"], ["between", "second, joined"])


@pytest.mark.parametrize("name", [*LOOPS, *CASES])
def test_so_it_is_in_loops_that_differ_from_step_to_step(name: str, runs: list[str]) -> None:
    step = {**LOOPS, **CASES}[name]
    expected, _ = run_small(step, contextlib.nullcontext())
    with by_plan():
        got, _ = run_small(step, kitsune.accelerate(device="cpu"))
    assert got == expected and "first" in runs


def test_of_what_came_in_for_the_first_part_only_parameters_are_known_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program may fill a batch again behind the read, and statistics are written."""
    met: list[Pair] = []
    plan_pair = Planner.plan_pair
    monkeypatch.setattr(Planner, "plan_pair", lambda self, pair, *show: (met.append(pair), plan_pair(self, pair, *show))[1])
    with by_plan():
        run(the_same_each_time, kitsune.accelerate(device="cpu"))
    (pair,) = met
    came = pair.first.inputs
    shapes = sorted(tuple(v.type.shape) for v in came if v.storage in pair.parameters)
    assert shapes == sorted(tuple(p.shape) for p in Net().parameters()) and len(came) > len(shapes) + 2


def near(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(near, a, b))
    return a == b or (isinstance(a, float) and abs(a - b) <= 1e-5 * (1 + abs(b)))


@pytest.mark.parametrize("name", LOOKS)
def test_images_that_are_handed_over_in_another_layout_are_seen_in_their_own(
    name: str, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution adds up in another order in that layout; all geometry is eager's."""
    planner = Planner(ImagesOnly(RATES["sm_90"]), fuel=0, verify=True, numerics="bitwise", slots_in_kernels=True)
    monkeypatch.setattr("kitsune.running.planner_for", lambda *args: planner)
    laid_out: list[int] = []
    put = Left.put

    def seen(self: Left, values: list[Any]) -> None:
        put(self, values)
        images = [t for t in self._tensors.values() if t.dim() == 4 and not t.is_contiguous()]
        laid_out.append(sum(t.is_contiguous(memory_format=torch.channels_last) for t in images))

    monkeypatch.setattr(Left, "put", seen)
    expected = run(LOOKS[name], contextlib.nullcontext())
    with by_plan():
        got = run(LOOKS[name], kitsune.accelerate(device="cpu"))
    assert near(got, expected) and all(n >= 4 for n in laid_out)
    assert runs.count("restored") == RESTORED[name] and "second, joined" in runs[-2:]


def test_what_differs_again_and_again_is_not_planned_as_one(runs: list[str]) -> None:
    def behind(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
        found.append(loss.item())
        (loss if k % 2 else loss * 2).backward()

    expected = run(behind, contextlib.nullcontext())
    with by_plan():
        got = run(behind, kitsune.accelerate(device="cpu"))
    assert got == expected
    assert runs.count("restored") == 3 and runs[-2:] == ["first", "second"]


@pytest.mark.parametrize("scale", [1, 2])
def test_parts_that_went_separate_ways_stay_apart(scale: int, runs: list[str]) -> None:
    """Also where one and the same comes second from then on, be it what was expected before or not."""

    def behind(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
        found.append(loss.item())
        (loss * 2 if (k % 2 if k < 16 else scale == 2) else loss).backward()

    expected = run(behind, contextlib.nullcontext(), 24)
    with by_plan():
        got = run(behind, kitsune.accelerate(device="cpu"), 24)
    assert got == expected
    assert runs.count("restored") == 3 and runs[-8:] == ["first", "second"] * 4


def test_what_comes_from_some_step_on_is_what_is_expected_then(runs: list[str]) -> None:
    def behind(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
        found.append(loss.item())
        (loss * 2 if k > 5 else loss).backward()

    expected = run(behind, contextlib.nullcontext())
    with by_plan():
        got = run(behind, kitsune.accelerate(device="cpu"))
    assert got == expected
    # Once for the graph of what is new, and then until it has come twice in a row.
    assert runs.count("restored") == 3 and runs[-2:] == ["first, joined", "second, joined"]


def test_what_changes_now_and_then_is_not_followed_for_ever(runs: list[str]) -> None:
    def behind(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
        found.append(loss.item())
        (loss * 2 if k // 4 % 2 else loss).backward()

    expected = run(behind, contextlib.nullcontext(), 40)
    with by_plan():
        got = run(behind, kitsune.accelerate(device="cpu"), 40)
    assert got == expected
    changes = [a + b for a, b in itertools.pairwise(runs) if b == "second, joined" and a != "first, joined"]
    assert not changes and "second, joined" in runs and runs[-8:] == ["first", "second"] * 4


def test_a_check_runs_each_part_by_itself(runs: list[str]) -> None:
    """It compares with eager what each part leaves."""

    def behind(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
        found.append(loss.item())
        # From here on until the next step's read is over.
        kitsune.config.check = k == ODD[0]
        loss.backward()

    expected = run(the_same_each_time, contextlib.nullcontext())
    with by_plan(), kitsune.config.patch(check=False):
        got = run(behind, kitsune.accelerate(device="cpu"))
        checked = kitsune.counters()["checked"]
    assert got == expected and checked == 2
    assert runs.count("restored") == 1 and runs[-2:] == ["first, joined", "second, joined"]


def test_what_is_forgotten_is_run_by_itself(runs: list[str]) -> None:
    def behind(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
        found.append(loss.item())
        if k == ODD[0]:
            (pipeline,) = kitsune.contexts.here.depth
            pipeline.runner.forget()
        loss.backward()

    expected = run(the_same_each_time, contextlib.nullcontext())
    with by_plan():
        got = run(behind, kitsune.accelerate(device="cpu"))
    assert got == expected
    assert runs.count("restored") == 1 and runs[-2:] == ["first, joined", "second, joined"]


@pytest.mark.parametrize("times", [1, 2])
def test_memory_runs_out_while_what_was_kept_is_made_again(times: int, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is freed and asked for once more; who gets none then is told so, and may go on as in eager."""
    relieved: list[bool] = []
    made, relieve = Left._made_again, Runner.relieve

    def short(self: Left) -> dict[int, Tensor]:
        if runs.count("short") < times:
            runs.append("short")
            raise torch.OutOfMemoryError
        return made(self)

    def behind(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
        try:
            the_graph_is_asked_for(k, net, loss, found)
        except torch.OutOfMemoryError:
            found.pop()
            the_graph_is_asked_for(k, net, loss, found)

    monkeypatch.setattr(Left, "_made_again", short)
    monkeypatch.setattr(Runner, "relieve", lambda self, hard: (relieved.append(hard), relieve(self, hard))[1])
    expected = run(the_graph_is_asked_for, contextlib.nullcontext())
    with by_plan():
        got = run(behind, kitsune.accelerate(device="cpu"))
    assert got == expected and runs.count("short") == times
    assert relieved.count(True) == 1 and runs.count("restored") == times + 1


def test_what_the_first_part_leaves_is_let_go_of_with_the_step(runs: list[str]) -> None:
    regions: list[Any] = []

    def behind(k: int, net: Net, loss: Tensor, found: list[Any]) -> None:
        found.append(loss.item())
        if k:
            (pipeline,) = kitsune.contexts.here.depth
            regions.append(pipeline.recorder.region)
            assert regions[-1].handover is not None
        loss.backward()

    with by_plan():
        run(behind, kitsune.accelerate(device="cpu"))
    assert runs[-1] == "second, joined" and {region.handover for region in regions} == {None}


def test_what_a_part_may_not_be_run_before() -> None:
    """Of what is handed over in another form, some may have to be made again from what the first part has read."""
    reads, writes = recorded_again(lambda: torch.ones(3).sin()), recorded_again(lambda: torch.ones(3).sin_())
    kept = dataclasses.replace(reads, inputs=(reads.ops[0].results[0],))
    handover = Handover(frozenset({kept.inputs[0].id}))
    assert [handover.concerns(graph) for graph in (reads, kept, writes)] == [False, True, True]
