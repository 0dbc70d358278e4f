"""Torch's own modules of which a call is not what it was when it was learned: each time it does what it does in eager."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import kitsune
from kitsune.lazy import LazyTensor, graph_doors, trusted_modules
from tests.steady import test_module_calls

taken = test_module_calls.taken
WARM_UP, STEPS = 12, 24
pytestmark = pytest.mark.usefixtures("taken")
# What a step gives: a tensor, whose sum is read at once, and what the program could notice besides.
Step = Callable[[int], tuple[Tensor, Any]]
X = torch.arange(24.0).reshape(2, 3, 4).sin()


def run(make: Callable[[], Step], context: Callable[[], AbstractContextManager[Any]]) -> list[Any]:
    """What each step gives, or what is said of it."""
    found: list[Any] = []
    torch.manual_seed(4)
    with context(), torch.no_grad():
        step = make()
        for k in range(STEPS):
            try:
                y, other = step(k)
            except (TypeError, ValueError) as error:
                found.append(str(error))
                # So that the next step begins a region.
                kitsune.flush()
            else:
                found.append((y, y.sum().item(), other))
    return [each if isinstance(each, str) else (each[0].tolist(), *each[1:]) for each in found]


def assert_as_in_eager(make: Callable[[], Step]) -> list[Any]:
    """`make` makes a program whose steps are alike but from WARM_UP on."""
    expected = run(make, contextlib.nullcontext)
    assert run(make, lambda: kitsune.accelerate(device="cpu")) == expected
    return expected


def changed(module: nn.Module, change: Callable[[Any], Any], undo: bool = False) -> Step:
    """A module that is called with the same in each step, and changed after some; or `undo`, changed until then."""

    def step(k: int) -> Any:
        if k == (0 if undo else WARM_UP):
            step.back = change(module)  # type: ignore[attr-defined]
        if k == WARM_UP and undo:
            step.back()  # type: ignore[attr-defined]
        return module(X.neg()), None

    return step


def with_bias(linear: Any) -> None:
    linear.bias = nn.Parameter(torch.ones(2))


def with_statistics(norm: Any) -> None:
    norm.running_mean, norm.running_var = torch.ones(3), torch.full((3,), 4.0)


def test_a_parameter_where_there_was_none(taken: list[str]) -> None:
    assert_as_in_eager(lambda: changed(nn.Linear(4, 2, bias=False), with_bias))
    assert "Linear" in taken


def test_statistics_where_there_were_none(taken: list[str]) -> None:
    assert_as_in_eager(lambda: changed(nn.BatchNorm1d(3, track_running_stats=False).eval(), with_statistics))
    assert "BatchNorm1d" in taken


def test_a_parameter_that_is_gone() -> None:
    def without(linear: Any) -> None:
        del linear.weight
        object.__setattr__(linear, "weight", torch.ones(2, 4))

    assert_as_in_eager(lambda: changed(nn.Linear(4, 2), without))


def test_another_of_torchs_classes(taken: list[str]) -> None:
    def narrower(norm: Any) -> None:
        norm.__class__ = nn.BatchNorm2d

    expected = assert_as_in_eager(lambda: changed(nn.BatchNorm1d(3), narrower))
    assert "expected 4D input" in expected[-1] and "BatchNorm1d" in taken


def test_one_that_stays_as_it_has_become_is_taken_again(taken: list[str]) -> None:
    def other(norm: Any) -> None:
        norm.eps = 0.5
        taken.clear()

    assert_as_in_eager(lambda: changed(nn.LayerNorm(4), other))
    assert taken


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["on one", "on all"])
def test_hooks_from_the_first_step_on(register: str, everywhere: bool) -> None:
    def hook(module: Any, args: Any, output: Any = None) -> Any:
        # Of what the module itself has, or is given.
        return (module.weight,) if output is None else torch.relu(args[0])

    def hooked(linear: Any) -> Any:
        owner = nn.modules.module if everywhere else linear
        return getattr(owner, register.replace("register_", "register_module_") if everywhere else register)(hook).remove

    assert_as_in_eager(lambda: changed(nn.Linear(4, 4), hooked, undo=True))


@pytest.mark.parametrize(("owner", "name"), [(nn.Linear, "forward"), (nn.Module, "_call_impl"), (nn.Module, "__call__")])
def test_methods_that_were_patched_while_it_was_learned(owner: Any, name: str) -> None:
    def patched(linear: Any) -> Any:
        patch = pytest.MonkeyPatch()
        patch.setattr(owner, name, lambda module, x: torch.relu(x))
        return patch.undo

    assert_as_in_eager(lambda: changed(nn.Linear(4, 2), patched, undo=True))


def test_a_forward_of_its_own_is_called_each_time() -> None:
    def make() -> Step:
        relu, calls = nn.ReLU(), list[int]()

        def forward(x: Tensor) -> Tensor:
            calls.append(1)
            return F.relu(x)

        relu.forward = forward  # type: ignore[method-assign]
        return lambda k: (relu(X.neg()), len(calls))

    assert_as_in_eager(make)


def test_a_kernel_size_that_is_a_list() -> None:
    def wider(pool: Any) -> None:
        pool.kernel_size[1] = pool.stride[1] = 4

    assert_as_in_eager(lambda: changed(nn.MaxPool2d([1, 2], stride=[1, 2]), wider))


def test_padding_that_is_a_call_of_its_own() -> None:
    assert_as_in_eager(lambda: changed(nn.Conv1d(3, 2, 3, padding=1, padding_mode="reflect"), lambda conv: None))


def test_arguments_by_keyword_and_too_many(taken: list[str]) -> None:
    def make() -> Step:
        relu, others = nn.ReLU(), 3 * [lambda x: relu(x, x), lambda x: relu(x, more=x), lambda x: relu(input=x), lambda x: relu()]

        def step(k: int) -> Any:
            x = X.neg()
            return others[k - WARM_UP](x) if k >= WARM_UP else relu(x), None

        return step

    expected = assert_as_in_eager(make)
    assert taken and [type(result) for result in expected[WARM_UP:]] == [str, str, tuple, str] * 3


def test_one_that_is_always_called_by_keyword() -> None:
    def make() -> Step:
        relu = nn.ReLU()
        return lambda k: (relu(input=X.neg()), None)

    assert_as_in_eager(make)


def test_a_batch_of_too_few_dimensions_is_not_counted(taken: list[str]) -> None:
    """At the place where one of enough was normalized: it is looked at before anything has happened."""

    def make() -> Step:
        norm, other = nn.BatchNorm2d(3), X.neg()
        kitsune.flush()

        def step(k: int) -> Any:
            x, flat = X[..., None].neg(), X.neg()
            # One that goes by the same number, in a region of before.
            kinds = [x] * WARM_UP + 6 * [flat, other]
            try:
                return norm(kinds[k]), None
            except ValueError as error:
                return norm.num_batches_tracked + 0, str(error)

        return step

    expected = assert_as_in_eager(make)
    assert "BatchNorm2d" in taken and all("expected 4D input" in result[2] for result in expected[WARM_UP:])


def test_a_batch_from_outside() -> None:
    def make() -> Step:
        norm = nn.BatchNorm1d(3)
        return lambda k: (norm(X), None)

    assert_as_in_eager(make)


def test_its_own_weight_as_its_input() -> None:
    """A program in three parts: what is learned in two of them is not right in the third."""

    def make() -> Step:
        linear = nn.Linear(4, 4)
        other = torch.arange(16.0).reshape(4, 4)

        def step(k: int) -> Any:
            x = other.neg()
            if k < 6:
                return linear(linear.weight) + x, None
            return (F.linear(x, x, linear.bias) if k < WARM_UP else linear(x)) + x, None

        return step

    assert_as_in_eager(make)


class Own(nn.Linear):
    """Of a class that is not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_class_of_the_programs_is_none_of_torchs() -> None:
    assert_as_in_eager(lambda: changed(Own(4, 2), with_bias))


class Early(nn.ReLU):
    """Returns something else than its last call."""

    def forward(self, input: Tensor) -> Tensor:
        result = F.relu(input)
        F.gelu(input)
        return result


class Listed(nn.ReLU):
    """Passes its argument on in a list."""

    def forward(self, input: Tensor) -> Tensor:
        F.relu(input)
        return torch.cat([input, input])


@pytest.mark.parametrize("cls", [Early, Listed])
def test_one_that_is_no_row_of_calls_of_what_it_is_given(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of another torch may be."""
    monkeypatch.setattr(graph_doors, "KNOWN", graph_doors.KNOWN | {cls})
    monkeypatch.setitem(trusted_modules.TRUSTED, cls, trusted_modules._trusted(cls, "relu"))

    def make() -> Step:
        module, xs = cls(), [X * k for k in range(STEPS)]
        return lambda k: (module(xs[k].neg()), None)

    assert_as_in_eager(make)


class Hears(TorchFunctionMode):
    """Somebody who is to see each call."""

    heard: list[Any]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_a_mode_of_the_programs_sees_each_call(taken: list[str]) -> None:
    def make() -> Step:
        norm, mode = nn.LayerNorm(4), Hears()

        def step(k: int) -> Any:
            mode.heard = []
            with mode if k >= WARM_UP else contextlib.nullcontext():
                y = norm(X)
            return y, [*mode.heard]

        return step

    assert "layer_norm" in assert_as_in_eager(make)[-1][2] and taken


def test_nothing_is_taken_while_recording_is_off(taken: list[str]) -> None:
    norm = nn.LayerNorm(4)
    with kitsune.accelerate(device="cpu"), torch.no_grad():
        for _ in range(WARM_UP):
            norm(X).sum().item()
        assert taken
        with kitsune.disable():
            assert type(norm(X)) is not LazyTensor


def test_a_weight_that_is_replaced_is_let_go_of(taken: list[str]) -> None:
    norm = nn.LayerNorm(4)
    with kitsune.accelerate(device="cpu"), torch.no_grad():
        for _ in range(WARM_UP):
            norm(X).sum().item()
        assert taken
        weight = weakref.ref(norm.weight)
        norm.weight = nn.Parameter(torch.ones(4))
        assert weight() is None


@pytest.mark.parametrize("full", [False, True])
def test_hooks_on_gradients_that_are_there_once_more(full: bool, taken: list[str]) -> None:
    """That it once had such hooks is noted at the module: it is learned again."""

    def make() -> Step:
        first, linear = nn.Linear(4, 4), nn.Linear(4, 2)
        register = linear.register_full_backward_hook if full else linear.register_full_backward_pre_hook
        hook: Any = (lambda module, grads, _: (grads[0] * 2,)) if full else (lambda module, grads: (grads[0] * 2,))
        register(hook).remove()

        def step(k: int) -> Any:
            if k == WARM_UP:
                register(hook)
            first.zero_grad()
            with torch.enable_grad():
                linear(first(X.neg())).square().sum().backward()
            return first.weight.grad + 0, None  # type: ignore[operator]

        return step

    assert_as_in_eager(make)
    assert taken
