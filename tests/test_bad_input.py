"""What goes wrong does so as in eager: the same exception, at its line or with a note of it, and nothing is left."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import kitsune


def lazily() -> Any:
    return kitsune.accelerate(warmup=0, device="cpu")


@pytest.fixture(autouse=True)
def clean() -> Any:
    kitsune.reset()
    yield
    assert not _get_current_dispatch_mode_stack()
    with lazily():  # whatever happened, the next step works
        result = torch.ones(2) + 1
    assert result.tolist() == [2.0, 2.0]


# ---- devices ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_gpu_that_is_not_there_is_refused_when_the_context_is_entered() -> None:
    with pytest.raises(RuntimeError, match="finds no CUDA device"), kitsune.accelerate(device="cuda"):
        raise AssertionError("was entered")


@pytest.mark.gpu
def test_a_gpu_beyond_the_last_is_refused() -> None:
    with pytest.raises(RuntimeError, match="CUDA devices"), kitsune.accelerate(device="cuda:99"):
        raise AssertionError("was entered")


@pytest.mark.parametrize("device", ["meta", "mps", "nonsense"])
def test_a_device_that_cannot_be_recorded_for_is_refused(device: str) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError)), kitsune.accelerate(device=device):
        raise AssertionError("was entered")


def test_tensors_of_another_device_pass_through() -> None:
    with lazily():
        shape = (torch.empty(3, 4, device="meta") @ torch.empty(4, 5, device="meta")).shape
        result = torch.ones(2) * 2
    assert (shape, result.tolist()) == ((3, 5), [2.0, 2.0])
    assert kitsune.counters()["recorded"] > 0


def test_mixing_devices_fails_as_in_eager() -> None:
    def mixed() -> torch.Tensor:
        return torch.ones(3) + torch.ones(3, device="meta")

    assert error_of(mixed) == error_in_context(mixed)


# ---- exceptions out of the program ----


def test_what_was_issued_before_an_exception_is_visible() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(KeyError), lazily():
        with torch.no_grad():
            parameter.add_(3)
        result = parameter * 2
        raise KeyError("no")
    assert (parameter.tolist(), result.tolist()) == ([3.0, 3.0], [6.0, 6.0])


def test_a_keyboard_interrupt_in_a_hook_leaves_the_context() -> None:
    weight = torch.ones(2, requires_grad=True)

    def interrupt(grad: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lazily():
        loss = (weight * 3).sum()
        loss.register_hook(interrupt)
        loss.backward()
    assert weight.grad is None and loss.item() == 6.0


def test_an_exception_in_a_decorated_function_is_its_own() -> None:
    @kitsune.accelerate(warmup=0, device="cpu")
    def step(x: torch.Tensor) -> None:
        x.add_(1)
        raise ValueError("mine")

    x = torch.zeros(2)
    with pytest.raises(ValueError, match="mine"):
        step(x)
    assert x.tolist() == [1.0, 1.0]


def test_a_generator_function_is_refused_with_a_way_out() -> None:
    def batches() -> Any:
        yield torch.ones(1)

    with pytest.raises(TypeError, match="generator"):
        kitsune.accelerate(batches)


@pytest.mark.parametrize("thing", [nn.Linear, 3, torch.optim.SGD([torch.zeros(1)], lr=0.1)])
def test_what_is_no_function_is_not_decorated(thing: Any) -> None:
    with pytest.raises(TypeError):
        kitsune.accelerate(thing)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError):
        kitsune.accelerate(warm_up=1)


def test_contexts_nest() -> None:
    with lazily():
        x = torch.ones(2) + 1
        with lazily():
            y = x * 2
        z = y + 1
    assert (x.tolist(), y.tolist(), z.tolist()) == ([2.0] * 2, [4.0] * 2, [5.0] * 2)


def test_an_exception_in_an_inner_context_leaves_the_outer_one_at_work() -> None:
    with lazily():
        x = torch.ones(2) + 1
        with pytest.raises(KeyError), lazily():
            x.add_(1)
            raise KeyError
        before = kitsune.counters()["recorded"]
        y = x * 2
        kitsune.flush()
        assert kitsune.counters()["recorded"] > before
    assert y.tolist() == [6.0, 6.0]


# ---- operators that fail ----


def error_of(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


def error_in_context(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    """The error of a call inside the context, raised at its line: nothing after it is reached."""
    with lazily():
        torch.ones(3).mul_(2)  # something is pending
        return error_of(call)


def x() -> torch.Tensor:
    return torch.ones(2, 3)


REFUSED: dict[str, Callable[[], Any]] = {
    "matmul": lambda: x() @ x(),
    "broadcast": lambda: x() + torch.ones(4),
    "view": lambda: x().view(5),
    "cat": lambda: torch.cat([x(), torch.ones(3, 4)]),
    "addmm": lambda: torch.addmm(x(), x(), torch.ones(3, 1)),
    "dim": lambda: x().sum(dim=7),
    "dtype": lambda: x().to(torch.float64) @ x().t(),
    "linear": lambda: F.linear(x(), torch.ones(5, 4)),
    "conv": lambda: F.conv2d(torch.ones(1, 3, 4, 4), torch.ones(2, 4, 3, 3)),
    "subtraction of bools": lambda: x() - (x() > 0),
    "abs of bools": lambda: (x() > 0).abs(),
    "in-place cast": lambda: (x() > 0).mul_(0.5),
    "integer times float in place": lambda: torch.ones(3, dtype=torch.int64).mul_(0.5),
    "in-place broadcast": lambda: x().add_(torch.ones(5, 2, 3)),
    "write to overlapping memory": lambda: torch.ones(3).expand(2, 3).add_(1),
    "copy to overlapping memory": lambda: torch.ones(3).expand(2, 3).copy_(x()),
    "as_strided": lambda: torch.ones(()).as_strided((2,), (1,), 1),
    "a leaf in place": lambda: torch.ones(2, requires_grad=True).add_(1),
    "backward of a vector": lambda: torch.ones(2, requires_grad=True).mul(2).backward(),
    "backward without a graph": lambda: x().sum().backward(),
    "softmax of integers": lambda: torch.ones(3, dtype=torch.int64).softmax(0),
    "layer norm": lambda: F.layer_norm(x(), (4,)),
    "class count": lambda: F.cross_entropy(x(), torch.zeros(3, dtype=torch.int64)),
    "an argument": lambda: x().add("no"),
    "item of many": lambda: x().item(),
    "bool of many": lambda: bool(x()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_eager_refuses_is_refused_alike_at_its_line(name: str) -> None:
    assert error_in_context(REFUSED[name]) == error_of(REFUSED[name])


def test_backward_through_a_freed_graph_is_refused() -> None:
    def twice() -> None:
        loss = torch.ones(2, requires_grad=True).exp().sum()
        loss.backward()
        loss.backward()

    assert error_in_context(twice) == error_of(twice)


def test_a_saved_tensor_that_was_overwritten_is_refused() -> None:
    def overwritten() -> None:
        y = torch.ones(2, requires_grad=True).exp()
        y.add_(1)
        y.sum().backward()

    (kind, message), (expected, _) = error_in_context(overwritten), error_of(overwritten)
    assert kind is expected and "modified by an inplace operation" in message


INDICES: dict[str, Callable[[], Any]] = {
    "embedding": lambda: F.embedding(torch.tensor([9]), torch.ones(3, 2)),
    "gather": lambda: torch.ones(3).gather(0, torch.tensor([9])),
    "index": lambda: torch.ones(3)[torch.tensor([9])],
    "index_select": lambda: torch.ones(3).index_select(0, torch.tensor([9])),
    "nll_loss": lambda: F.nll_loss(torch.ones(1, 3), torch.tensor([9])),
}


@pytest.mark.parametrize("name", INDICES)
def test_a_value_that_an_operator_refuses_names_the_line_at_the_latest_when_it_is_run(name: str) -> None:
    expected, message = error_of(INDICES[name])
    with lazily(), pytest.raises(expected):  # the operators are known from here on
        INDICES[name]().sum().item()
    with pytest.raises(expected) as caught, lazily():
        INDICES[name]()
    told = str(caught.value) + "".join(traceback.format_exception(caught.value))
    assert message in told and __file__ in told


def test_what_was_issued_before_a_refused_value_is_visible() -> None:
    parameter = torch.zeros(2)
    with pytest.raises(IndexError), lazily():
        parameter.add_(1)
        result = parameter * 2
        F.embedding(torch.tensor([9]), torch.ones(3, 2))
        kitsune.flush()
    assert (parameter.tolist(), result.tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_a_result_that_could_not_be_computed_says_so() -> None:
    table = torch.ones(3, 2)
    lost: Any = None
    for index in (0, 9):  # the first round makes the operators known
        with contextlib.suppress(IndexError), lazily():
            lost = F.embedding(torch.tensor([index]), table) + 1
            kitsune.flush()
    with pytest.raises(Exception, match=r"no value|out of range"):
        lost.tolist()
