"""Numbers that the program reads are sent to the host in the middle of a region, and are eager's, whatever happens in between."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.ir import verify
from kitsune.lazy import LazyTensor
from kitsune.scheduler import awaited_first
from tests.plan.recorded import record
from tests.runtime.repeated import graphs

STEPS = 14
COUNTED = ("answered", "foreseen", "replayed")


@pytest.fixture(params=[True, False], ids=["kernels", "ops"])
def kernels(request: pytest.FixtureRequest) -> Iterator[bool]:
    kitsune.reset()
    with graphs(request.param), kitsune.config.patch(fuse=request.param):
        yield request.param


class Training:
    """A small model with an optimizer. `numbers` are those that the loop has read."""

    def __init__(self, device: str = "cpu", dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(dropout)]
        layers += [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)]
        self.model = nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.generator, self.device = torch.Generator().manual_seed(1), device
        self.numbers: list[Any] = []
        self.counts: list[tuple[int, ...]] = []

    def forward(self) -> torch.Tensor:
        x = torch.randn(6, 8, generator=self.generator).to(self.device)
        return F.cross_entropy(self.model(x), torch.arange(6, device=self.device) % 4)

    def backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.forward()
        loss.backward()
        return loss

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def run(self, step: Callable[[Training, int], None], context: Any, steps: int = STEPS) -> Training:
        with context:
            for k in range(steps):
                before = kitsune.counters()
                step(self, k)
                after = kitsune.counters()
                self.counts.append(tuple(after[name] - before[name] for name in COUNTED))
        return self


def same(step: Callable[[Training, int], None], steps: int = STEPS, **options: Any) -> list[tuple[int, ...]]:
    """Train twice; the counts of each of Kitsune's steps."""
    expected = Training(**options).run(step, contextlib.nullcontext(), steps)
    got = Training(**options).run(step, kitsune.accelerate(device=options.get("device", "cpu")), steps)
    assert got.numbers == expected.numbers
    assert all(map(torch.equal, got.model.parameters(), expected.model.parameters()))
    return got.counts


def filters(training: Training, k: int) -> None:
    """As trainers do that look for losses that are no numbers."""
    loss = training.backward().detach()
    training.numbers.append(bool(torch.isnan(loss)) or bool(torch.isinf(loss)))
    training.update()


def logs(training: Training, k: int) -> None:
    loss = training.backward()
    training.update()
    training.numbers.append(loss.item())


def test_a_question_before_the_update_is_answered_and_the_next_one_foreseen(kernels: bool) -> None:
    counts = same(filters)
    # Region and update are a graph each, if their inputs have not moved; and the second question is asked in none.
    assert {(answered, foreseen) for answered, foreseen, _ in counts[-5:]} == {(2, 1)} and max(n for *_, n in counts) == 2


def test_a_loss_that_each_step_reads_is_sent_before_the_update(kernels: bool) -> None:
    counts = same(logs)
    assert counts[-5:] == [(1, 0, 1)] * 5


def test_one_that_is_read_now_and_then_is_not(kernels: bool) -> None:
    def step(training: Training, k: int) -> None:
        loss = training.backward()
        training.update()
        if k % 4 == 0:
            training.numbers.append(loss.item())

    counts = same(step, 20)
    assert {answered for answered, *_ in counts} == {0}


def test_the_switch_leaves_every_read_to_the_device(kernels: bool) -> None:
    with kitsune.config.patch(early_reads=False):
        assert same(filters)[-1] == (0, 0, 3)


def test_what_is_awaited_needs_nothing_of_what_comes_after() -> None:
    training = Training()
    training.run(filters, kitsune.accelerate(device="cpu"), 3)
    found: list[Any] = []

    def program() -> Any:
        loss = training.backward()
        found.append(torch.isnan(loss.detach()))
        return found

    graph = record(program, warmup=1)
    awaited = found[0].cell.ref.id
    first = awaited_first(type(graph)(graph.inputs, graph.ops, graph.outputs, (awaited,)))
    verify(first)
    place = next(k for k, op in enumerate(first.ops) if awaited in {v.id for v in op.results})
    before = next(k for k, op in enumerate(graph.ops) if awaited in {v.id for v in op.results})
    assert place < len(graph.ops) / 2 < before and set(map(id, first.ops)) == set(map(id, graph.ops))
    assert "# awaited: " in str(first).splitlines()[-1]


@pytest.mark.parametrize("later", [lambda y: y.add_(1), lambda y: y.detach().mul_(2), lambda y: y[None].fill_(7)])
def test_what_is_written_later_in_its_region_is_read_after_that(later: Callable[[Any], Any], kernels: bool) -> None:
    def program(x: torch.Tensor) -> list[float]:
        y = x.sum()
        shown = y.detach()
        rest = products(x)
        later(y)
        return [shown.item(), rest.sum().item(), y.item()]

    batches = list(torch.randn(10, 4, 4))
    with kitsune.accelerate(device="cpu"):
        got = [program(x) for x in batches]
    assert got == [program(x) for x in batches] and kitsune.counters()["replayed"]


def products(x: torch.Tensor) -> torch.Tensor:
    """What is done after a number is there: launches that no fusion makes fewer."""
    for _ in range(12):
        x = torch.tanh(x @ x)
    return x


def sum_of(x: torch.Tensor) -> float:
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return x.sum().item()


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "recorded": lambda y: y.add_(1),
    "a view": lambda y: y[None].mul_(3),
    "data": lambda y: y.data.fill_(4),
    "disabled": lambda y: disabled(y),
    "numpy": lambda y: y.detach().numpy().fill(5),
    "another thread": lambda y: in_a_thread(y),
}


@kitsune.disable
def disabled(y: torch.Tensor) -> None:
    y.sub_(2)


def in_a_thread(y: torch.Tensor) -> None:
    thread = threading.Thread(target=lambda: y.mul_(5))
    thread.start()
    thread.join()


@pytest.mark.parametrize("how", WRITES)
def test_a_write_after_the_region_is_seen(how: str, kernels: bool) -> None:
    def program(x: torch.Tensor) -> list[float]:
        y = x.sum()
        rest = products(x)
        numbers = [y.item()]
        WRITES[how](y)
        return [*numbers, y.item(), rest.sum().item()]

    batches = list(torch.randn(10, 4, 4))
    with kitsune.accelerate(device="cpu"):
        got = [program(x) for x in batches]
    assert got == [program(x) for x in batches]
    assert kitsune.counters()["answered"] >= 5


def test_an_older_result_keeps_its_number(kernels: bool) -> None:
    batches = list(torch.randn(12, 4, 4))
    kept: list[torch.Tensor] = []
    with kitsune.accelerate(device="cpu"):
        for x in batches:
            y = x.sum()
            rest = products(x)
            kept += [y] if y.item() == sum_of(x) else []
            del rest
        assert kitsune.counters()["answered"] >= 6
        assert all(type(y) is LazyTensor for y in kept)
        assert [y.item() for y in kept] == [sum_of(x) for x in batches]


def test_what_was_foreseen_and_does_not_come_is_forgotten(kernels: bool) -> None:
    def step(training: Training, k: int) -> None:
        loss = training.backward().detach()
        training.numbers.append(bool(torch.isnan(loss)))
        if k % 2:
            training.numbers.append(bool(torch.isinf(loss)))
        else:
            training.numbers.append(bool(loss > 1.0))
        training.update()

    counts = same(step, 24)
    assert 0 < sum(foreseen for _, foreseen, _ in counts) < 8 and counts[-1][1] == 0


@kitsune.disable
def overwrite(y: torch.Tensor) -> None:
    y.fill_(-1e6)


SECOND: dict[str, Callable[[torch.Tensor, torch.Tensor], bool]] = {
    "of the same": lambda y, z: bool(y > 3),
    "of another": lambda y, z: bool(z > 3),
    "after a write beside the region": lambda y, z: overwrite(z) or bool(z > 3),
    "after a recorded write": lambda y, z: bool(y.add_(1_000_000) * 2 > 3),
}


@pytest.mark.parametrize("sometimes", SECOND)
@pytest.mark.parametrize("mostly", SECOND)
def test_a_second_question_is_answered_for_what_it_is_asked_of(mostly: str, sometimes: str, kernels: bool) -> None:
    def program(k: int) -> list[bool]:
        # One is far below three, and one above.
        y, z = -xs[k].abs().sum(), xs[k].abs().sum() + 5
        rest = products(xs[k])
        first = bool(y + z > 5.5)
        return [first, SECOND[sometimes if k in (12, 15) else mostly](y, z), bool(rest.sum() > 0), bool(y > z)]

    xs = list(torch.randn(18, 4, 4))
    with kitsune.accelerate(device="cpu"):
        got = [program(k) for k in range(18)]
    assert (mostly in ("of the same", "of another")) == (kitsune.counters()["foreseen"] >= 5)
    assert got == [program(k) for k in range(18)]


def test_what_was_foreseen_before_a_part_that_writes_it_is_forgotten(kernels: bool) -> None:
    def step(training: Training, k: int) -> None:
        training.optimizer.zero_grad()
        with torch.no_grad():
            total = training.forward() * 1
        training.numbers.append(total.item())
        if k < STEPS - 1:
            training.numbers.append(bool(torch.isnan(total)))
        loss = training.forward()
        with torch.no_grad():
            total += 0.0 if k < STEPS - 1 else float("nan")
        # The region goes on behind this one.
        training.numbers.append(loss.item())
        loss.backward()
        training.optimizer.step()
        training.numbers.append(bool(torch.isnan(total)))

    counts = same(step)
    assert [foreseen for _, foreseen, _ in counts[-4:]] == [1, 1, 1, 0] and kitsune.counters()["backwards_followed"] > 8


def test_of_a_part_only_what_the_program_holds_is_moved_before_the_next_replay(kernels: bool) -> None:
    def step(training: Training, k: int) -> None:
        training.optimizer.zero_grad()
        loss = training.forward()
        scale = loss.exp()
        training.numbers.append(scale.item())
        (loss * scale).backward()
        training.optimizer.step()
        moved.append(kitsune.counters()["moved"])

    moved: list[int] = []
    same(step)
    assert moved[-1] == moved[-5] and kitsune.counters()["backwards_followed"] > 8


def test_a_second_question_of_several_operators_is_answered(kernels: bool) -> None:
    def program(x: torch.Tensor) -> list[bool]:
        y = x.abs().sum()
        return [bool(y > 5), bool((y * 2 - 3).abs() > 4)]

    xs = list(torch.randn(14, 4, 4))
    with kitsune.config.patch(verify=True), kitsune.accelerate(device="cpu"):
        got = [program(x) for x in xs]
    assert kitsune.counters()["foreseen"] >= 5
    assert got == [program(x) for x in xs]


def test_a_region_of_nothing_that_comes_in_is_foreseen(kernels: bool) -> None:
    def program() -> float:
        nothing = torch.empty(0) * 1
        with pytest.raises(RuntimeError, match="0 elements"):
            nothing.item()
        return nothing.sum().item()

    with kitsune.config.patch(verify=True), kitsune.accelerate(device="cpu"):
        assert [program() for _ in range(8)] == [0.0] * 8
    assert kitsune.counters()["foreseen"] >= 2


@pytest.mark.parametrize("how", ["reads what is written", "draws numbers"])
def test_what_comes_before_an_awaited_value_stays_before_it(how: str, kernels: bool) -> None:
    def program(x: torch.Tensor) -> list[float]:
        x = x * 1
        if how == "draws numbers":
            before, y = torch.rand_like(x), torch.rand_like(x)
        else:
            before = x @ x
            y = x.mul_(3)
        rest = products(before)
        return [y.sum().item(), before.sum().item(), rest.sum().item()]

    xs = list(torch.randn(12, 4, 4))
    torch.manual_seed(0)
    expected = [program(x) for x in xs]
    torch.manual_seed(0)
    with kitsune.accelerate(device="cpu"):
        assert [program(x) for x in xs] == expected
    assert kitsune.counters()["answered"] >= 5


def test_answers_of_a_replay_are_none_of_the_next_one_s(kernels: bool) -> None:
    with kitsune.accelerate(device="cpu"):
        for x in torch.randn(12, 4, 4):
            y = x.sum()
            rest = products(x)
            number = y.item()
            answers, real = y.cell.region.recorder.early.answers, y.cell.real
            assert answers is None or answers.to(real) == number
            del rest
        assert answers is not None
        other, rest = x.sum(), products(x)
        assert [other.item(), rest.sum().item()] and answers.to(real) is None


@pytest.mark.parametrize("question", [torch._is_all_true, lambda seen: torch.equal(seen, seen.clone())])
def test_a_question_to_many_numbers_is_none_that_can_be_sent(question: Callable[[torch.Tensor], Any], kernels: bool) -> None:
    """`torch.distributions` asks the first of each value that it is given; the region that ends with it is captured."""

    def step(training: Training, k: int) -> None:
        seen = next(training.model.parameters()).detach() > -9
        training.backward()
        training.update()
        training.numbers.append(bool(question(seen)))

    counts = same(step)
    assert not kitsune.counters()["graph_refused"] and not any(answered for answered, *_ in counts)
    assert all(replayed for *_, replayed in counts[-4:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_numbers_of_any_type(dtype: torch.dtype, kernels: bool) -> None:
    def program(x: torch.Tensor) -> Any:
        y = x[0, 0] * x[1, 1]
        rest = products(z)
        number = y.item()
        return number, rest.sum().item()

    batches, z = [(4 * torch.randn(2, 2)).to(dtype) for _ in range(12)], torch.randn(4, 4)
    with kitsune.accelerate(device="cpu"):
        got = [program(x) for x in batches]
    assert got == [program(x) for x in batches] and kitsune.counters()["answered"]
    assert [type(a) for a, _ in got] == [type(program(x)[0]) for x in batches]


@pytest.mark.gpu
@pytest.mark.parametrize("step", [filters, logs])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("fuse", [True, False])
def test_on_the_gpu(step: Callable[[Training, int], None], dropout: float, fuse: bool) -> None:
    kitsune.reset()
    with kitsune.config.patch(fuse=fuse):
        counts = same(step, 60, device="cuda", dropout=dropout)
    assert counts[-1] == ((2, 1, 2) if step is filters else (1, 0, 1))


@pytest.mark.gpu
def test_the_host_goes_on_while_the_device_does_the_rest() -> None:
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def program() -> tuple[float, bool, torch.Tensor]:
        y = x.float().sum()
        z = x
        for _ in range(60):
            z = z @ x
        number = y.item()
        running = not torch.cuda.current_stream().query()
        return number, running, z

    with kitsune.accelerate():
        for _ in range(8):
            number, running, z = program()
            del z
            torch.cuda.synchronize()
    assert number == x.float().sum().item() and running and kitsune.counters()["answered"] >= 3
