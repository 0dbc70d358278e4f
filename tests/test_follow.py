"""Following: whole calls and backwards are skipped where they are known, and nobody can tell but by the counters."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kitsune
from kitsune.lazy.realize import realize

pytestmark = pytest.mark.usefixtures("afresh")

STEPS = 8
Seen = list[Any]


class Doubled(torch.autograd.Function):
    """Python in the graph, which no call of torch's API shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


doubled = Doubled.apply


class Training:
    """A small training; `kept` collects what a program could look at."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.LayerNorm(8), nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, **options)
        self.xs, self.ys = torch.randn(STEPS, 4, 6), torch.randint(0, 3, (STEPS, 4))
        self.kept: Seen = []
        self.hooked: list[Tensor] = []

    def loss(self, i: int) -> Tensor:
        return F.cross_entropy(self.model(self.xs[i]), self.ys[i])

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def found(self) -> Seen:
        return [*self.kept, *self.hooked, *self.model.parameters()]


def plain(t: Training, i: int) -> None:
    loss = t.loss(i)
    t.update(loss)
    t.kept.append(loss.detach())


def frozen_bias(t: Training, i: int) -> None:
    t.model[0].bias.requires_grad_(i < 5)
    t.optimizer.zero_grad()
    t.update(t.loss(i))
    t.kept.append(torch.tensor(t.model[0].bias.grad is None))


def other_loss(t: Training, i: int) -> None:
    loss, other = t.loss(i), t.loss(i) * 2
    t.update(other if i == 6 else loss)


def no_grad_block(t: Training, i: int) -> None:
    x = t.xs[i]
    with torch.set_grad_enabled(i != 6):
        hidden = t.model[0](x)
    t.update(t.model[1:](hidden).square().mean())


def loss_weight(t: Training, i: int) -> None:
    t.update(t.loss(i) * (1.0 + 0.25 * i))


def negated_weight(t: Training, i: int) -> None:
    loss = t.loss(i)
    t.update(loss.sub(loss, alpha=0.5 / (i + 1)))


def hook_on_leaf(t: Training, i: int) -> None:
    if i == 5:
        t.model[0].weight.register_hook(lambda g: g * 0.5)
    t.update(t.loss(i))


def hook_on_result(t: Training, i: int) -> None:
    hidden = t.model[0](t.xs[i])
    if i == 6:
        hidden.register_hook(lambda g: t.hooked.append(g.clone()))
    t.update(t.model[1:](hidden).sum())


def post_accumulate_hook(t: Training, i: int) -> None:
    if i == 5:
        t.model[4].weight.register_post_accumulate_grad_hook(lambda p: t.hooked.append(p.grad.clone()))
    t.update(t.loss(i))


def python_function(t: Training, i: int) -> None:
    hidden = t.model[0](t.xs[i])
    t.update(t.model[4](doubled(hidden) if i > 4 else hidden * 2).sum())


def retained(t: Training, i: int) -> None:
    loss = t.loss(i)
    loss.backward(retain_graph=True)
    t.update(loss)


def gradient_of_gradient(t: Training, i: int) -> None:
    loss = t.loss(i)
    (g,) = torch.autograd.grad(loss, [t.model[4].weight], create_graph=True)
    t.update(loss + g.square().sum())


def accumulated(t: Training, i: int) -> None:
    t.loss(i).backward()
    if i % 3 == 2:
        nn.utils.clip_grad_norm_(t.model.parameters(), 0.5)
        t.optimizer.step()
        t.optimizer.zero_grad()


def item_before_backward(t: Training, i: int) -> None:
    loss = t.loss(i)
    t.kept.append(torch.tensor(loss.item()))
    t.update(loss)


def item_afterwards(t: Training, i: int) -> None:
    loss = t.loss(i)
    t.update(loss)
    t.kept.append(torch.tensor(loss.item()))


def evaluation_between(t: Training, i: int) -> None:
    if i in (3, 6):
        t.model.eval()
        with torch.no_grad():
            t.kept.append(t.loss(0))
        t.model.train()
    t.update(t.loss(i))


def short_batch(t: Training, i: int) -> None:
    n = 3 if i % 4 == 3 else 4
    t.update(F.cross_entropy(t.model(t.xs[i][:n]), t.ys[i][:n]))


def checkpointed(t: Training, i: int) -> None:
    hidden = t.model[:2](t.xs[i])
    t.update(t.model[4](checkpoint(t.model[2:4], hidden, use_reentrant=i % 2 == 0) if i > 4 else t.model[2:4](hidden)).sum())


def saved_tensor_hooks(t: Training, i: int) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x * 1, lambda x: x) if i == 6 else contextlib.nullcontext():
        loss = t.loss(i)
    t.update(loss)


def written_views(t: Training, i: int) -> None:
    y = t.model[0](t.xs[i]).clone()
    y[1:].add_(1)
    y.t()[0] *= 3
    buffer = torch.zeros(4, 8)
    buffer[:, 1] = 2.0
    t.update((y.view(2, 16).select(0, 1) * buffer.flatten()[:16]).sum())


def mixed_precision(t: Training, i: int) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=i != 6):
        loss = t.loss(i)
    t.update(loss.float())


def several_losses(t: Training, i: int) -> None:
    first, second = t.loss(i), t.model[4](t.xs[i].repeat(1, 2)[:, :8]).mean()
    first.backward()
    t.update(second)


def replaced_parameter(t: Training, i: int) -> None:
    if i == 5:
        t.model[4].weight = nn.Parameter(t.model[4].weight.detach() * 2)
    t.update(t.loss(i))


def changed_data(t: Training, i: int) -> None:
    if i == 5:
        t.model[4].weight.data = t.model[4].weight.data * 2
    t.update(t.loss(i))


def scripted(t: Training, i: int) -> None:
    hidden = t.model[0](t.xs[i])
    t.update((_scripted(hidden) if i > 4 else hidden.sigmoid() * 2).sum())


def _doubled_sigmoid(x: Tensor) -> Tensor:
    return x.sigmoid() * 2


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    _scripted = torch.jit.script(_doubled_sigmoid)


FOLLOWED = [plain, loss_weight, item_afterwards, evaluation_between, short_batch, accumulated, mixed_precision, several_losses]
OTHERS = [
    frozen_bias,
    other_loss,
    no_grad_block,
    negated_weight,
    hook_on_leaf,
    hook_on_result,
    post_accumulate_hook,
    python_function,
    retained,
    gradient_of_gradient,
    item_before_backward,
    checkpointed,
    saved_tensor_hooks,
    written_views,
    replaced_parameter,
    changed_data,
    scripted,
]


def run(step: Callable[[Training, int], None], context: Any, rounds: int = 1) -> Seen:
    training = Training()
    with context:
        for _ in range(rounds):
            for i in range(STEPS):
                step(training, i)
    return training.found()


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("step", FOLLOWED + OTHERS, ids=lambda step: step.__name__)
def test_a_training_is_as_in_eager(step: Callable[[Training, int], None], warmup: int) -> None:
    expected = run(step, contextlib.nullcontext(), rounds=6)
    got = run(step, kitsune.accelerate(warmup=warmup, device="cpu"), rounds=6)
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
    counters = kitsune.counters()
    assert counters["followed"] + counters["updates_followed"] > 0
    if step in FOLLOWED:
        assert counters["backwards_followed"] >= STEPS


def test_without_following_nothing_is_followed() -> None:
    with kitsune.config.patch(follow=False):
        got = run(plain, kitsune.accelerate(device="cpu"))
    assert kitsune.counters()["followed"] == 0
    assert all(map(torch.equal, got, run(plain, contextlib.nullcontext())))


def test_a_followed_backward_uses_its_graph_up() -> None:
    training = Training()
    with kitsune.accelerate(device="cpu"):
        for i in range(5):
            loss = training.loss(i)
            training.update(loss)
        assert kitsune.counters()["backwards_followed"] > 0
        assert loss.requires_grad and not loss.is_leaf
        assert "NllLossBackward" in repr(loss)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            (loss * 2).backward()


def test_the_graph_is_there_for_who_asks() -> None:
    training = Training()
    with kitsune.accelerate(device="cpu"):
        for i in range(5):
            loss = training.loss(i)
            if i == 4:
                before = kitsune.counters()["realized"]
                assert type(loss.grad_fn).__name__.startswith("NllLoss")
                assert kitsune.counters()["realized"] == before + 1
            training.update(loss)


def test_an_error_in_a_call_leaves_the_rest_as_it_is() -> None:
    def step(t: Training, i: int) -> None:
        hidden = t.model[0](t.xs[i])
        with pytest.raises(RuntimeError):
            hidden @ hidden
        t.update(t.model[1:](hidden).sum())

    assert all(
        torch.equal(a, b)
        for a, b in zip(run(step, contextlib.nullcontext()), run(step, kitsune.accelerate(device="cpu")), strict=True)
    )


def test_a_number_that_is_read_from_a_tensor_is_read_each_time() -> None:
    """`alpha=` takes a tensor by its value: the call's arguments look the same and the op's do not."""
    totals = []
    for context in (contextlib.nullcontext(), kitsune.accelerate(device="cpu")):
        total, weight = torch.zeros(3), torch.ones(())
        with context:
            for _ in range(6):
                weight = weight * 2
                kitsune.flush()
                total.add_(torch.ones(3), alpha=weight)
        totals.append(total)
    assert torch.equal(*totals)


def test_leaves_that_are_made_inside_get_their_gradients() -> None:
    for _ in range(4):
        with kitsune.accelerate(device="cpu"):
            leaf = torch.ones(3, requires_grad=True)
            (leaf * 2).sum().backward()
        assert leaf.grad is not None and leaf.grad.tolist() == [2.0, 2.0, 2.0]


def test_contexts_that_close_out_of_order_leave_no_mode_behind() -> None:
    outer, inner = kitsune.accelerate(warmup=0, device="cpu"), kitsune.accelerate(warmup=1, device="cpu")
    outer.__enter__()
    inner.__enter__()
    torch.ones(3).sum()
    outer.__exit__(None, None, None)
    torch.ones(3).sum()
    inner.__exit__(None, None, None)
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_backward_is_followed_in_the_second_step_whatever_gave_back_its_operand() -> None:
    model, x = nn.Linear(6, 6), torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    followed = []
    with kitsune.accelerate(device="cpu"):
        for _ in range(3):
            # Contiguous already: the second call has nothing to do, and autograd nothing to note.
            loss = (model(x) * 2).contiguous().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            followed.append(kitsune.counters()["backwards_followed"])
    assert followed == [0, 1, 2] and not kitsune.counters()["realized"]


class Residual(nn.Module):
    """Writes in place what it has just made, as ResNet does, and counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.relu = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True)
        self.n = nn.Buffer(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.linear(x))
        self.n.add_(1)
        out += x
        return self.relu(out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("read", [False, True])
def test_what_is_written_in_place_is_followed_in_the_second_step(read: bool) -> None:
    model, xs = nn.Sequential(Residual(), Residual()), torch.randn(4, 5, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names, found = ("followed", "backwards_followed", "realized"), []
    with kitsune.accelerate(device="cpu"):
        for x in xs:
            before = kitsune.counters()
            loss = model(x).sum()
            if read:
                loss.item()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append([kitsune.counters()[name] - before[name] for name in names])
    # A layer is five calls, the host's count of batches aside; then there is the sum.
    assert found == [[0, 0, 0]] + [[11, 1, 0]] * 3


def test_nothing_is_followed_before_it_was_observed_as_often_as_the_warm_up_asks() -> None:
    model, x = nn.Linear(6, 6), torch.randn(4, 6)
    names, found = ("observed", "recorded", "followed"), []
    with kitsune.accelerate(device="cpu", warmup=3):
        for _ in range(5):
            before = kitsune.counters()
            model(x).sum().backward()
            model.zero_grad()
            kitsune.flush()
            found.append([kitsune.counters()[name] - before[name] for name in names])
    n = found[0][0]
    assert n and found == [[n, 0, 0]] * 3 + [[0, n, 2]] * 2


def test_a_flush_in_another_thread_is_no_call_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(recorder: Any, region: Any) -> None:
        seen.append(recorder.lane.inside)
        realize(recorder, region)

    monkeypatch.setattr("kitsune.lazy.debts.realize", watched)
    with ThreadPoolExecutor(1) as pool, kitsune.accelerate(device="cpu"):
        # The start of a thread is a door itself.
        pool.submit(int).result()
        training, insides = Training(), []
        for i in range(STEPS):
            loss = training.loss(i)
            if i > 3:
                seen.clear()
                pool.submit(training.model[0].weight.data_ptr).result()
                insides.append([*seen])
            training.update(loss)
    # Where nothing was followed, nothing is made again.
    assert [0] in insides and all(inside in ([], [0]) for inside in insides), insides


def test_a_gradient_that_is_on_the_device_stays_without_being_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from kitsune.lazy import call_lane

    asked: list[Any] = []
    key_of = call_lane.key_of
    monkeypatch.setattr(call_lane, "key_of", lambda region, func, *rest: asked.append(func) or key_of(region, func, *rest))
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    with kitsune.accelerate(device="cpu"):
        for x in torch.randn(5, 3, 4):
            model.zero_grad()
            model(x).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            y = x * 2
            assert y.to(y.device) is y and y.to(torch.device("cpu")) is y
            assert y.to(y.device, copy=True) is not y and y.to(y.device, torch.float64).dtype is torch.float64
            assert y.to("meta").is_meta
    assert asked.count(torch.Tensor.to) <= 3 * 5
