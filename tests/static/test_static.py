"""`accelerate(static=True)`: results are eager's to the last bit, and the function's Python was skipped."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from tests.runtime.repeated import graphs
from tests.static.programs import STEPS, Training, adamw, agree, compare, dropping, mlp, normed, sgd, straight
from tests.test_follow import Doubled

# One call is observed, one begins what is then seen three times alike; optimizer state that is made first costs one more.
WARM = 5


@pytest.fixture(autouse=True, params=["op by op", "replayed"])
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to run a region on a CPU: its operators, and what stands for a CUDA graph, with memory that is lent."""
    kitsune.reset()
    if request.param == "replayed":
        with graphs(kernels=False):
            yield request.param
    else:
        yield request.param
    kitsune.reset()


@pytest.mark.parametrize("model", [mlp, dropping, normed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=lambda f: f.__name__)
def test_a_training_is_as_in_eager_and_its_python_is_skipped(model: Any, optimizer: Any) -> None:
    _, counters = compare(straight(30), at_most=WARM, model=model, optimizer=optimizer)
    # AdamW makes its state beside the region, which is that of the second step from the first on: one step less to learn.
    assert counters["static_skipped"] == 30 - WARM + (optimizer is adamw)
    assert not counters["static_refused"]


def test_regions_are_replayed_as_graphs(executor: str) -> None:
    _, counters = compare(straight(30), at_most=WARM)
    assert (counters["replayed"] > 20) is (executor == "replayed")


def under_autocast(t: Training, x: Tensor, y: Tensor) -> Tensor:
    t.optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(t.model(x), y)
    loss.backward()
    t.optimizer.step()
    return loss.detach()


def clipped(t: Training, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(t.model(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(t.model.parameters(), 0.5)
    t.optimizer.step()
    t.optimizer.zero_grad()
    return loss.detach()


def accumulated(t: Training, x: Tensor, y: Tensor) -> Tensor:
    """Over two halves of a batch, which are views of the arguments."""
    t.optimizer.zero_grad()
    total = torch.zeros(())
    for half in (slice(0, 2), slice(2, 4)):
        loss = F.cross_entropy(t.model(x[half].view(2, 6)), y[half]) / 2
        loss.backward()
        total = total + loss.detach()
    t.optimizer.step()
    return total


def two_steps(t: Training, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two regions; the second begins with what the first has made."""
    first = Training.plain(t, x, y)
    second = Training.plain(t, x, y)
    return first + second, second


def left_for_later(t: Training, x: Tensor, y: Tensor) -> Tensor:
    """A gradient that is there when the step begins is added to."""
    loss = F.cross_entropy(t.model(x), y)
    loss.backward()
    t.optimizer.step()
    return loss.detach()


def with_a_module_for_one_call(t: Training, x: Tensor, y: Tensor) -> Tensor:
    t.optimizer.zero_grad()
    loss = nn.CrossEntropyLoss()(t.model(x), y)
    loss.backward()
    t.optimizer.step()
    return loss.detach()


def with_a_function_in_python(t: Training, x: Tensor, y: Tensor) -> Tensor:
    t.optimizer.zero_grad()
    loss = F.cross_entropy(Doubled.apply(t.model(x)), y)
    loss.backward()
    t.optimizer.step()
    return loss.detach()


def reads_a_constant(t: Training, x: Tensor, y: Tensor) -> Tensor:
    """As language models do, to see if their positions need a mask."""
    t.optimizer.zero_grad()
    scores = t.model(x)
    places = torch.arange(4, device=x.device)[None]
    if (torch.diff(places, prepend=places[:, :1] - 1) != 1).cumsum(-1)[:, -1].any():
        scores = scores * 0
    loss = F.cross_entropy(scores, y)
    loss.backward()
    t.optimizer.step()
    return loss.detach()


BODIES = [under_autocast, clipped, accumulated, two_steps, left_for_later]
BODIES += [with_a_module_for_one_call, with_a_function_in_python, reads_a_constant]


@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=lambda f: f.__name__)
def test_other_steps(body: Any, optimizer: Any) -> None:
    def drive(t: Training) -> None:
        # Two parts of one tensor are known by their places in its memory, which are others in each part of `t.xs`.
        t.kept += [t.step(t.xs[i].clone(), t.ys[i].clone()) for i in range(30)]

    compare(drive, at_most=WARM + 2, body=body, optimizer=optimizer, model=dropping)


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=lambda f: f.__name__)
def test_a_learning_rate_that_moves_every_step_is_passed_on(optimizer: Any) -> None:
    def drive(t: Training) -> None:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(t.optimizer, T_max=40)
        for i in range(30):
            t.take(i)
            schedule.step()

    compare(drive, at_most=WARM, optimizer=optimizer, model=normed)


def test_a_learning_rate_that_moves_later_is_learned_once() -> None:
    def drive(t: Training) -> None:
        for i in range(30):
            if i >= 10:
                t.optimizer.param_groups[0]["lr"] = 0.1 / i
            t.take(i)

    compare(drive, at_most=WARM + 1)


def test_gradients_that_nobody_holds_are_not_moved(executor: str) -> None:
    compare(straight(30), at_most=WARM + 1, body=two_steps)
    if executor == "replayed":
        # Of the two replays of one graph in each call, the first one's loss is wanted after the second.
        assert kitsune.counters()["moved"] <= 2 * 30


def test_results_that_are_held_stay_as_they_are() -> None:
    def drive(t: Training) -> None:
        gradients = []
        for i in range(20):
            t.take(i)
            gradients.append([p.grad for p in t.model.parameters()])
        t.kept += gradients

    compare(drive, at_most=WARM)


def test_views_and_functions_of_results_stay_as_they_are() -> None:
    def drive(t: Training) -> None:
        found = []
        for i in range(20):
            loss = t.take(i)
            found += [loss.view(1), loss.detach(), loss * 2]
        t.kept += found

    compare(drive, at_most=WARM)


Both = namedtuple("Both", "loss rest")


def with_all_kinds(t: Training, x: Tensor, y: Tensor) -> Any:
    loss = Training.plain(t, x, y)
    return Both(loss, {"n": 4, "x": x, "half": x[:2], "w": t.model[0].weight, "list": [True, 0.5, None, "word"]})


def test_what_is_returned_is_put_together_as_it_was() -> None:
    static, _ = compare(straight(), at_most=WARM, body=with_all_kinds)
    last = static.take(3)
    assert type(last) is Both and last.rest["w"] is static.model[0].weight
    assert last.rest["half"].data_ptr() == static.xs[3].data_ptr()


def test_a_loss_with_a_history_says_that_its_graph_is_used_up() -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        t.optimizer.zero_grad()
        loss = F.cross_entropy(t.model(x), y)
        loss.backward()
        t.optimizer.step()
        return loss

    static, _ = compare(straight(), at_most=WARM, body=body)
    loss = static.take(2)
    assert loss.requires_grad and not loss.is_leaf
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        (loss * 2).backward()


def test_a_result_is_the_next_calls_argument() -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        return Training.plain(t, x, y), (x * 0.9).detach()

    def drive(t: Training) -> None:
        x = t.xs[0]
        for i in range(20):
            loss, x = t.step(x, t.ys[i])
            t.kept += [loss, x]

    # The first call is given a plain tensor, the others what the call before has made.
    compare(drive, at_most=WARM + 1, body=body)


def test_an_argument_that_the_function_writes() -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(0.5)
        return Training.plain(t, x, y)

    def drive(t: Training) -> None:
        straight(20)(t)
        t.kept += [t.xs, torch.tensor(t.xs[1]._version)]

    compare(drive, at_most=WARM, body=body)


def test_an_argument_that_collects_a_gradient() -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        return Training.plain(t, x, y)

    def drive(t: Training) -> None:
        for i in range(20):
            x = t.xs[i].clone().requires_grad_()
            t.kept += [t.step(x, t.ys[i]), x.grad]

    compare(drive, at_most=WARM, body=body)


def test_each_shape_has_a_program_of_its_own() -> None:
    def drive(t: Training) -> None:
        for i in range(40):
            n = 3 if i % 5 == 4 else 4
            t.kept.append(t.step(t.xs[i][:n], t.ys[i][:n]))

    compare(drive, at_most=2 * WARM)


def test_arguments_by_name_numbers_and_objects() -> None:
    torch.manual_seed(1)
    x = torch.randn(3)
    ran = []

    @kitsune.accelerate(static=True, device="cpu")
    def scaled(a: Tensor, *, by: float, how: Any) -> Tensor:
        ran.append(by)
        return a * by + how.shift

    class How:
        shift = 2

    how = How()
    for by in (0.5, 2.0):
        for _ in range(8):
            assert torch.equal(scaled(x, by=by, how=how), x * by + 2)
    assert ran == [0.5] * 4 + [2.0] * 4
    assert torch.equal(scaled(x, by=0.5, how=how), x * 0.5 + 2)
    assert len(ran) == 8


def test_methods_are_known_by_their_object() -> None:
    class Trainer(Training):
        @kitsune.accelerate(static=True, device="cpu")
        def go(self, x: Tensor, y: Tensor) -> Tensor:
            self.n_python += 1
            return Training.plain(self, x, y)

    eager, first, second = Training(), Trainer(), Trainer()
    for i in range(STEPS):
        expected = eager.take(i)
        agree([expected, expected], [first.go(first.xs[i], first.ys[i]), second.go(second.xs[i], second.ys[i])])
    # Each has to be learned, and the second's operators are known by then.
    assert (first.n_python, second.n_python) == (WARM, WARM - 1)


def test_a_model_that_is_dropped_is_not_kept_alive() -> None:
    import gc
    import weakref

    @kitsune.accelerate(static=True, device="cpu")
    def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    model = mlp()
    optimizer = sgd(model.parameters())
    for _ in range(9):
        step(model, optimizer, torch.ones(2, 6))
    assert kitsune.counters()["static_skipped"] > 3
    weights = [weakref.ref(p) for p in model.parameters()]
    states = [weakref.ref(s["momentum_buffer"]) for s in optimizer.state.values()]
    # What a region has run with stays known to the runner no longer than the region is.
    del model, optimizer
    gc.collect()
    assert [w() for w in weights] == [None] * len(weights)
    assert [s() for s in states] == [None] * len(states)


def test_kitsunes_optimizer_steps_in_it() -> None:
    def optimizer(parameters: Any) -> Any:
        return kitsune.KitsuneOptimizer(sgd(parameters), device="cpu")

    # The other run of the two is recorded by the optimizer alone.
    compare(straight(30), at_most=WARM + 1, optimizer=optimizer)


def test_what_goes_wrong_while_learning_is_said_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr("kitsune.static.watch.Surroundings", broken)
    with kitsune.config.patch(verify=False):
        compare(straight(), at_most=STEPS, at_least=STEPS)
    assert "Kitsune failed to learn from it (ValueError: no such thing)" in str(kitsune.explain())


def test_a_context_around_it_goes_through_python() -> None:
    def drive(t: Training) -> None:
        if t.step.__name__ == "static" or hasattr(t.step, "__wrapped__"):
            with kitsune.accelerate(device="cpu"):
                straight(10)(t)
        else:
            straight(10)(t)

    _, counters = compare(drive, at_most=10, at_least=10)
    assert counters["static_skipped"] == 0 and counters["regions"] > 0


def test_when_kitsune_is_off_it_is_the_function() -> None:
    def drive(t: Training) -> None:
        with kitsune.config.patch(enabled=False):
            straight(10)(t)

    _, counters = compare(drive, at_most=10, at_least=10)
    assert counters["recorded"] == counters["observed"] == 0


def test_reset_begins_anew() -> None:
    t = Training(static=True)
    straight(8)(t)
    assert t.n_python == WARM
    kitsune.reset()
    straight(8)(t)
    # State is there by now, and its first call is as all others.
    assert t.n_python == WARM + 4


def test_forced_eager_goes_through_python() -> None:
    t = Training(static=True)
    straight(8)(t)
    with kitsune.set_stance("force_eager"):
        straight(3)(t)
    assert t.n_python == WARM + 3
    straight(3)(t)
    assert t.n_python == WARM + 3


def test_the_gate_leaves_static_functions_alone() -> None:
    with kitsune.config.patch(gate=True):
        _, counters = compare(straight(30), at_most=WARM)
    assert counters["gate_left"] == 0
