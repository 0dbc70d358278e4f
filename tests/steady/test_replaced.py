"""Where the program has put a function in the place of one of torch's, it is called as often as in eager."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune
from kitsune.lazy import door_set
from kitsune.pipeline import tally

STEPS, LATE = 14, 9
sgd, clip_grad = sys.modules[torch.optim.SGD.__module__], sys.modules[nn.utils.clip_grad_norm_.__module__]
# What is replaced, and whether the optimizer takes lists.
PLACES: dict[str, tuple[Any, str, bool]] = {
    "a method": (Tensor, "add_", False),
    "a function of lists": (torch, "_foreach_add_", True),
    "one update of several": (sgd, "_single_tensor_sgd", False),
    "the other": (sgd, "_multi_tensor_sgd", True),
    "the update": (sgd, "sgd", True),
    "the lists of a group": (torch.optim.SGD, "_init_group", True),
    "zero_grad": (torch.optim.Optimizer, "zero_grad", True),
    "zero_grad of a module": (nn.Module, "zero_grad", True),
    "clipping": (nn.utils, "clip_grad_norm_", True),
    "the norm in it": (clip_grad, "_get_total_norm", True),
    "a norm": (torch.linalg, "vector_norm", True),
    "norms": (torch, "_foreach_norm", True),
    "a tensor's backward": (Tensor, "backward", True),
    "every backward": (torch.autograd, "backward", True),
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Doors that contexts before this have left are away: what is replaced before a context is below its doors."""
    monkeypatch.setattr(door_set, "OPENINGS", sys.maxsize)
    with kitsune.accelerate(device="cpu"):
        pass
    kitsune.reset()
    with kitsune.config.patch(gate=False):
        yield
    kitsune.reset()


def count(original: Any, calls: list[str]) -> Any:
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append("called")
        return original(*args, **kwargs)

    return counting


def double(original: Any, calls: list[str]) -> Any:
    return lambda tensor, other, *, alpha=1: original(tensor, other, alpha=2 * alpha)


Make = Callable[[Any, list[str]], Any]


def train(place: str, first: int, make: Make, context: Callable[[], AbstractContextManager[Any]]) -> tuple[list[str], list[Any]]:
    """The calls of what was put in a place at the step `first`, or before the context opens if that is negative; parameters."""
    owner, name, lists = PLACES[place]
    torch.manual_seed(0)
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), list[str]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=lists)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if first < 0:
            patch.setattr(owner, name, make(getattr(owner, name), calls))
        stack.enter_context(context())
        for k in range(STEPS):
            if k == first:
                patch.setattr(owner, name, make(getattr(owner, name), calls))
            (model if owner is nn.Module else optimizer).zero_grad()
            loss = model(torch.ones(3, 4)).square().mean()
            torch.autograd.backward(loss) if place == "every backward" and k % 2 else loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        if first >= 0:
            # While doors are open, what they were put before is put back by whoever opened them.
            patch.undo()
    return calls, [p.tolist() for p in model.parameters()]


@pytest.mark.parametrize("first", [-1, 0, LATE], ids=["before the context", "from the first step", "late"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_in_the_place_of_torchs_is_called_as_often(place: str, first: int) -> None:
    expected = train(place, first, count, contextlib.nullcontext)
    assert train(place, first, count, lambda: kitsune.accelerate(device="cpu")) == expected
    assert len(expected[0]) >= STEPS - max(first, 0)


def test_an_update_is_made_of_what_is_in_the_place_of_torchs() -> None:
    expected = train("a method", LATE, double, contextlib.nullcontext)
    assert train("a method", LATE, double, lambda: kitsune.accelerate(device="cpu")) == expected
    assert expected != train("a method", STEPS, double, contextlib.nullcontext)


def test_what_is_put_back_is_followed_again() -> None:
    with kitsune.accelerate(device="cpu"):
        train("a method", LATE, double, contextlib.nullcontext)
        before = tally.updates
        train("a method", STEPS, double, contextlib.nullcontext)
    assert tally.updates - before >= STEPS - 3


def test_a_function_that_the_program_has_added_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(x: Tensor) -> Any:
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(twice, (x,), x)
        return x * 2

    monkeypatch.setattr(nn.functional, "twice", twice, raising=False)
    with kitsune.accelerate(device="cpu"):
        assert [twice(torch.ones(2)).tolist() for _ in range(4)] == [[2.0, 2.0]] * 4


def in_a_new_process(put: str) -> str:
    """What is said by a program that has `put` something somewhere before it imports Kitsune."""
    text = f"""
        import torch
        from torch import Tensor, nn
        from torch.nn import functional as F

        calls = []

        def counted(result):
            calls.append(1)
            return result

        {put}
        import kitsune

        def found():
            calls.clear()
            norm, relu = nn.LayerNorm(4), nn.ReLU()
            norm.weight.data.fill_(3.0)
            results = [
                (relu(-x).sum().item(), F.relu(x).sum().item(), norm(x).sum().item(), x.add_(1).sum().item(), len(x.split(1)))
                for x in [torch.full((4,), k - 5.0) for k in range(12)]
            ]
            layer = nn.Linear(4, 2)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=True)
            for _ in range(12):
                optimizer.zero_grad()
                layer(torch.ones(1, 4)).sum().backward()
                optimizer.step()
            return results, len(calls)

        expected = found()
        with kitsune.accelerate(device="cpu"):
            print(found() == expected, kitsune.counters()["followed"] > 0)
        print(*kitsune.explain().notes)
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=100
    )
    assert not run.returncode, run.stderr
    return run.stdout


BEFORE = {
    "F.relu": "torchs = F.relu; F.relu = lambda x, inplace=False: torchs(x, inplace) + 1",
    "Tensor.add_": "add_ = Tensor.add_; Tensor.add_ = lambda x, other: add_(x, other).mul(2)",
    "Tensor.split": "split = Tensor.split; Tensor.split = lambda x, size: split(x, size)[:-1]",
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_is_replaced_before_kitsune_is_there_is_called_once(name: str) -> None:
    """torch asks in its name, and nobody can tell what it has been put in the place of."""
    said = in_a_new_process(BEFORE[name])
    assert said.startswith("True False") and "had been replaced before" in said and name.removeprefix("F.") in said


@pytest.mark.parametrize(
    "put",
    [
        "forward = nn.ReLU.forward; nn.ReLU.forward = lambda module, x: counted(forward(module, x))",
        "call = nn.Module.__call__; nn.Module.__call__ = lambda module, *args: counted(call(module, *args))",
        "nn.ReLU.forward = type('Relu', (), {'__call__': lambda relu, x: counted(torch.relu(x))})()",
        "lists = torch._foreach_add_; torch._foreach_add_ = lambda *args, **options: counted(lists(*args, **options))",
        "forward = torch.no_grad()(lambda module, x: counted(torch.relu(x))); nn.ReLU.forward = forward",
        "",
    ],
    ids=["a module's method", "every module's call", "an object", "what an update calls", "in a wrapper of torch's", "nothing"],
)
def test_what_was_changed_before_kitsune_is_there_is_as_in_eager(put: str) -> None:
    assert in_a_new_process(put).split("\n")[:2] == ["True True", ""]
