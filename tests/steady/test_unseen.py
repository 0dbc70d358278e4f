"""What the forward's ops do not show changes in mid-run: the step goes the full way, by the counters, and numbers are eager's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kitsune
from tests.runtime.checked import forget
from tests.steady.loops import DEVICES

STEPS, CHANGED = 16, (7, 12)
pytestmark = pytest.mark.usefixtures("repeatable")


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 0.5


class Names(TorchDispatchMode):
    """Somebody else's view of the ops."""

    def __init__(self, notes: list[Any]) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.notes.append(str(func))
        return func(*args, **(kwargs or {}))


class Training:
    """A small training. A step does something else while `on`; `kept` and `notes` are what a program could tell it by."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(3)
        self.device = device
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Dropout(0.2), nn.LayerNorm(8), nn.Linear(8, 3)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.xs = torch.randn(STEPS, 4, 6).to(device)
        self.ys = torch.randint(0, 3, (STEPS, 4)).to(device)
        self.kept: list[Tensor] = []
        self.notes: list[Any] = []
        self.held: list[Any] = []

    def loss(self, i: int) -> Tensor:
        return F.cross_entropy(self.model(self.xs[i]), self.ys[i])

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self.end()

    def end(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sum_of(self, tensors: Any) -> None:
        self.kept.append(torch.stack([t.detach().float().sum() for t in tensors if t is not None]))

    def hook(self, scale: float = 0.5) -> Callable[..., Any]:
        def hooked(*given: Any) -> Any:
            *_, g = given
            many = isinstance(g, tuple)
            self.sum_of(g if many else (g,))
            return (g[0] * scale, *g[1:]) if many else g * scale

        return hooked

    def accumulator(self) -> Any:
        weight = self.model[0].weight
        return weight.view_as(weight).grad_fn.next_functions[0][0]


Step = Callable[[Training, int, bool], None]
FULL: dict[str, Step] = {}


def full(step: Step) -> Step:
    """The step goes the full way while it is `on`, and is followed before and afterwards."""
    FULL[step.__name__] = step
    return step


# ---- what collects a gradient, and which tensor the backward begins at ----


@full
def a_frozen_bias(t: Training, i: int, on: bool) -> None:
    bias = t.model[0].bias
    if bias.requires_grad is on:
        bias.requires_grad_(not on)
    t.update(t.loss(i))
    t.notes.append(bias.grad is None)


@full
def another_loss_object(t: Training, i: int, on: bool) -> None:
    out = t.model(t.xs[i])
    loss, other = out.square().mean(), out.abs().mean()
    t.update(other if on else loss)


@full
def a_no_grad_block(t: Training, i: int, on: bool) -> None:
    with torch.no_grad() if on else contextlib.nullcontext():
        hidden = t.model[0](t.xs[i])
    t.update(t.model[1:](hidden).square().mean())


@full
def grad_mode_by_a_call(t: Training, i: int, on: bool) -> None:
    torch.set_grad_enabled(not on)
    hidden = t.model[0](t.xs[i])
    torch.set_grad_enabled(True)
    t.update(t.model[1:](hidden).square().mean())


@full
def a_gradient_that_is_there(t: Training, i: int, on: bool) -> None:
    loss = t.loss(i)
    if on:
        t.model[3].bias.grad = t.model[0].bias.grad = torch.ones(8, device=t.device)
    t.update(loss)


@full
def inputs_of_backward(t: Training, i: int, on: bool) -> None:
    t.loss(i).backward(inputs=[t.model[4].weight] if on else None)
    t.end()


# ---- switches ----


@full
def an_attention_backend(t: Training, i: int, on: bool) -> None:
    q = t.model[0](t.xs[i]).view(1, 1, 4, 8)
    with sdpa_kernel(SDPBackend.MATH) if on else contextlib.nullcontext():
        t.update(F.scaled_dot_product_attention(q, q, q).square().sum())


@full
def an_attention_switch(t: Training, i: int, on: bool) -> None:
    for switch in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        switch(not on)
    q = t.model[0](t.xs[i]).view(1, 1, 4, 8)
    t.update(F.scaled_dot_product_attention(q, q, q).square().sum())
    for switch in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        switch(True)


@full
def the_autocast_dtype(t: Training, i: int, on: bool) -> None:
    with torch.autocast(t.device, torch.float16 if on else torch.bfloat16):
        loss = t.loss(i)
    t.update(loss.float())


@full
def autocast_around_the_backward(t: Training, i: int, on: bool) -> None:
    loss = t.loss(i)
    with torch.autocast(t.device, torch.bfloat16, enabled=on):
        loss.backward()
    t.end()


@full
def deterministic_algorithms(t: Training, i: int, on: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not before if on else before, warn_only=True)
    t.update(t.loss(i))
    torch.use_deterministic_algorithms(before, warn_only=True)


@full
def anomaly_mode(t: Training, i: int, on: bool) -> None:
    with torch.autograd.set_detect_anomaly(on):
        loss = t.loss(i)
        try:
            t.update(loss * float("nan") if i == CHANGED[1] else loss)
        except RuntimeError as error:
            t.notes.append(str(error))
            t.optimizer.zero_grad()


# ---- Python in the backward ----


@full
def a_hook_on_a_leaf(t: Training, i: int, on: bool) -> None:
    with contextlib.ExitStack() as stack:
        if on:
            stack.callback(t.model[0].weight.register_hook(t.hook()).remove)
        t.update(t.loss(i))


@full
def a_hook_on_a_tensor(t: Training, i: int, on: bool) -> None:
    hidden = t.model[0](t.xs[i])
    if on:
        hidden.register_hook(t.hook())
    t.update(t.model[1:](hidden).sum())


@full
def a_hook_after_accumulation(t: Training, i: int, on: bool) -> None:
    with contextlib.ExitStack() as stack:
        if on:
            stack.callback(t.model[4].weight.register_post_accumulate_grad_hook(_halve).remove)
        t.update(t.loss(i))


@full
def a_hook_on_a_node(t: Training, i: int, on: bool) -> None:
    loss = t.loss(i)
    if on:
        loss.grad_fn.register_prehook(t.hook())
        loss.grad_fn.next_functions[0][0].register_hook(lambda inputs, outputs: t.hook()(inputs))
    t.update(loss)


@full
def a_hook_before_an_accumulating_node(t: Training, i: int, on: bool) -> None:
    if on:
        t.held[:] = [node := t.accumulator(), node.register_prehook(t.hook())]
    t.update(t.loss(i))
    t.held.clear()


@full
def a_hook_behind_an_accumulating_node(t: Training, i: int, on: bool) -> None:
    if on:
        t.held[:] = [node := t.accumulator(), node.register_hook(lambda inputs, outputs: t.sum_of(outputs))]
    t.update(t.loss(i))
    t.held.clear()


@full
def a_hook_on_many_leaves(t: Training, i: int, on: bool) -> None:
    with contextlib.ExitStack() as stack:
        if on:
            hook = torch.autograd.graph.register_multi_grad_hook(list(t.model.parameters()), t.sum_of)
            stack.callback(hook.remove)
        t.update(t.loss(i))


@full
def a_hook_on_any_of_many_tensors(t: Training, i: int, on: bool) -> None:
    hidden = t.model[0](t.xs[i])
    later = t.model[1](hidden)
    if on:
        torch.autograd.graph.register_multi_grad_hook([hidden, later], lambda g: t.sum_of([g]), mode="any")
    t.update(t.model[2:](later).sum())


@full
def a_hook_on_a_modules_backward(t: Training, i: int, on: bool) -> None:
    with contextlib.ExitStack() as stack:
        if on:
            stack.callback(t.model[1].register_full_backward_hook(lambda m, given, made: t.hook()(given)).remove)
            stack.callback(t.model[3].register_full_backward_pre_hook(lambda m, made: t.hook()(made)).remove)
        t.update(t.loss(i))


@full
def a_function_in_python(t: Training, i: int, on: bool) -> None:
    hidden = t.model[0](t.xs[i])
    t.update(t.model[1:](Halved.apply(hidden) if on else hidden * 2).sum())


@full
def a_function_in_cpp_outside_of_the_api(t: Training, i: int, on: bool) -> None:
    hidden = t.model[0](t.xs[i])
    t.update(t.model[1:](torch._C._functions.UndefinedGrad()(hidden) if on else hidden).sum())


@full
def hooks_on_what_is_saved(t: Training, i: int, on: bool) -> None:
    with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x) if on else contextlib.nullcontext():
        t.update(t.loss(i))


@full
def what_is_saved_goes_to_the_host(t: Training, i: int, on: bool) -> None:
    with torch.autograd.graph.save_on_cpu() if on else contextlib.nullcontext():
        loss = t.loss(i)
    t.update(loss)


@full
def checkpointing(t: Training, i: int, on: bool) -> None:
    hidden = t.model[0](t.xs[i])
    later = checkpoint(t.model[1:4], hidden, use_reentrant=i == CHANGED[1]) if on else t.model[1:4](hidden)
    t.update(t.model[4](later).sum())


# ---- another backward ----


@full
def a_retained_graph(t: Training, i: int, on: bool) -> None:
    loss = t.loss(i)
    if on:
        loss.backward(retain_graph=True)
    t.update(loss)


@full
def a_graph_of_the_gradients(t: Training, i: int, on: bool) -> None:
    loss = t.loss(i)
    if on:
        gradients = torch.autograd.grad(loss, list(t.model.parameters()), create_graph=True)
        loss = loss + sum(g.square().sum() for g in gradients)
    t.update(loss)


@full
def a_backward_that_makes_a_graph(t: Training, i: int, on: bool) -> None:
    loss = t.loss(i)
    loss.backward(create_graph=on)
    if on:
        sum(p.grad.square().sum() for p in t.model.parameters()).backward()
    t.end()


@full
def gradients_of_a_tensor(t: Training, i: int, on: bool) -> None:
    hidden = t.model[0](t.xs[i])
    loss = t.model[1:](hidden).square().sum()
    if on:
        t.sum_of(torch.autograd.grad(loss, [hidden], retain_graph=True))
    t.update(loss)


@full
def what_a_leaf_was_is_written(t: Training, i: int, on: bool) -> None:
    loss = t.loss(i)
    if on:
        with torch.no_grad():
            t.model[4].weight.add_(1)
    _told(t, loss)


@full
def what_an_input_was_is_written(t: Training, i: int, on: bool) -> None:
    x = t.xs[i] + 0
    loss = F.cross_entropy(t.model(x), t.ys[i])
    if on:
        x.add_(1)
    _told(t, loss)


@full
def what_a_result_was_is_written(t: Training, i: int, on: bool) -> None:
    hidden = t.model[1](t.model[0](t.xs[i]))
    loss = t.model[2:](hidden).square().sum()
    if on:
        with torch.no_grad():
            hidden.mul_(2)
    _told(t, loss)


# ---- who else looks ----


@full
def a_dispatch_mode(t: Training, i: int, on: bool) -> None:
    with Names(t.notes) if on else contextlib.nullcontext():
        loss = t.loss(i)
    t.update(loss)
    if on:
        t.notes[:] = [name for name in t.notes if "detach" not in name]


def packed(x: Tensor) -> Tensor:
    return x * 1.5 if x.dtype.is_floating_point else x


def _halve(leaf: Tensor) -> None:
    leaf.grad.mul_(0.5)  # type: ignore[union-attr]


def _told(t: Training, loss: Tensor) -> None:
    """Torch refuses a backward whose saved tensors have been written since."""
    try:
        t.update(loss)
    except RuntimeError as error:
        t.notes.append(str(error).partition(": [")[0].replace("torch.cuda.", "torch."))
        t.optimizer.zero_grad()


def run(step: Step, device: str, context: Any, changed: tuple[int, ...] = CHANGED) -> tuple[Training, list[int]]:
    training, followed = Training(device), []
    with context:
        for i in range(STEPS):
            before = kitsune.counters()["backwards_followed"]
            step(training, i, i in changed)
            followed.append(kitsune.counters()["backwards_followed"] - before)
    return training, followed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", FULL.values(), ids=FULL)
def test_it_goes_the_full_way_and_is_followed_before_and_after(step: Step, device: str) -> None:
    expected, none = run(step, device, contextlib.nullcontext())
    forget()
    got, followed = run(step, device, kitsune.accelerate(device=device))
    assert same(got, expected) and not any(none)
    assert got.notes == expected.notes
    # The last step that is as all before it, the first that is not, and the last again as the first ones.
    assert [followed[i] for i in (CHANGED[0] - 1, CHANGED[0], STEPS - 1)] == [1, 0, 1], followed
    counters = kitsune.counters()
    assert counters["followed"] > 8 * 5 and counters["recognised"] >= 8, counters
    assert device == "cpu" or counters["replayed"] > 0, counters


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", FULL.values(), ids=FULL)
def test_it_is_right_from_the_first_step_on_and_several_times_in_a_row(step: Step, device: str) -> None:
    changed = (0, 1, 2, 5, 6, 7, CHANGED[1])
    expected, _ = run(step, device, contextlib.nullcontext(), changed)
    forget()
    got, _ = run(step, device, kitsune.accelerate(device=device), changed)
    assert same(got, expected) and got.notes == expected.notes


def same(got: Training, expected: Training) -> bool:
    pairs = zip([*got.kept, *got.model.parameters()], [*expected.kept, *expected.model.parameters()], strict=True)
    return all(torch.equal(a.detach().nan_to_num(7.0), b.detach().nan_to_num(7.0)) for a, b in pairs)
