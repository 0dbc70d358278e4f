"""What lasts longer than a step and no call shows: hooks and modes from before the context, switches, functions in C++."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import cpp_extension

import kitsune
from tests.runtime.checked import forget
from tests.steady.loops import DEVICES, NONE
from tests.steady.test_unseen import Training, packed

STEPS, FIRST, LAST = 16, 7, 11
pytestmark = pytest.mark.usefixtures("repeatable")
Step = Callable[[Training, int], None]


def run(step: Step, device: str, context: Any, around: Callable[[Training], Any] = lambda t: NONE) -> tuple[Training, list[int]]:
    """A training, and how many backwards each of its steps has followed."""
    training, followed = Training(device), []
    with around(training), context:
        for i in range(STEPS):
            before = kitsune.counters()["backwards_followed"]
            step(training, i)
            followed.append(kitsune.counters()["backwards_followed"] - before)
    return training, followed


def compared(step: Step, device: str, around: Callable[[Training], Any] = lambda t: NONE) -> list[int]:
    """Eager and Kitsune leave the same; returns which steps of Kitsune's have followed their backward."""
    expected, _ = run(step, device, NONE, around)
    forget()
    got, followed = run(step, device, kitsune.accelerate(device=device), around)
    assert got.notes == expected.notes
    for a, b in zip([*expected.kept, *expected.model.parameters()], [*got.kept, *got.model.parameters()], strict=True):
        assert torch.equal(a, b)
    return followed


def plain(t: Training, i: int) -> None:
    t.update(t.loss(i))


# ---- from before the context ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_a_hook_on_an_accumulating_node_from_before_the_context(before: bool, device: str) -> None:
    def around(t: Training) -> Any:
        node = t.accumulator()
        if before:
            node.register_prehook(t.hook())
        else:
            node.register_hook(lambda inputs, outputs: t.sum_of(outputs))
        # Who registers such a hook holds the node, or it would be gone.
        t.held.append(node)
        return NONE

    assert not any(compared(plain, device, around))


@pytest.mark.parametrize("device", DEVICES)
def test_a_hook_on_an_accumulating_node_that_is_held_for_some_steps(device: str) -> None:
    def step(t: Training, i: int) -> None:
        if i == FIRST:
            t.held[:] = [node := t.accumulator(), node.register_prehook(t.hook())]
        plain(t, i)
        if i == LAST:
            t.held.pop().remove()

    followed = compared(step, device)
    assert followed[FIRST - 1] == followed[-1] == 1 and not any(followed[FIRST : LAST + 1])


@pytest.mark.parametrize("device", DEVICES)
def test_a_hook_on_an_accumulating_node_that_nobody_holds_is_gone(device: str) -> None:
    def step(t: Training, i: int) -> None:
        t.accumulator().register_prehook(t.hook())
        plain(t, i)
        assert not t.kept

    # Asking for a node is asking for the graph.
    assert compared(step, device)[-1] in (0, 1)
    assert kitsune.counters()["updates_followed"] > STEPS - 5


@pytest.mark.parametrize("device", DEVICES)
def test_hooks_on_what_is_saved_around_the_context(device: str) -> None:
    def around(t: Training) -> Any:
        def pack(x: Tensor) -> Tensor:
            t.notes.append(tuple(x.shape))
            return packed(x)

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    assert not any(compared(plain, device, around))


@pytest.mark.parametrize("device", DEVICES)
def test_hooks_on_what_is_saved_for_some_steps(device: str) -> None:
    def step(t: Training, i: int) -> None:
        if i == FIRST:
            t.held.append(torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x))
            t.held[-1].__enter__()
        hidden = t.model[:4](t.xs[i])
        t.update(t.model[4](hidden).square().sum())
        if i == LAST:
            t.held.pop().__exit__(None, None, None)

    followed = compared(step, device)
    assert followed[FIRST - 1] == followed[-1] == 1 and not any(followed[FIRST : LAST + 1])


class Linears(TorchFunctionMode):
    """Somebody else's view of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is F.linear
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inside", [True, False])
def test_a_function_mode_sees_every_call(inside: bool) -> None:
    mode = Linears()

    def step(t: Training, i: int) -> None:
        with mode if inside else contextlib.nullcontext():
            plain(t, i)
        t.notes.append(mode.n)

    def around(t: Training) -> Any:
        mode.n = 0
        return contextlib.nullcontext() if inside else mode

    followed = compared(step, "cpu", around)
    assert mode.n == 2 * STEPS and bool(followed[-1]) is inside


def test_the_gradient_of_what_is_no_leaf_warns_in_every_step() -> None:
    def step(t: Training, i: int) -> None:
        hidden = t.model[0](t.xs[i])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            t.notes += [hidden.grad, len(said)]
        t.update(t.model[1:](hidden).sum())

    compared(step, "cpu")
    assert kitsune.counters()["updates_followed"] > STEPS - 5


# ---- where tensors are made, and by which library ----


def test_the_default_device_changes_in_mid_run() -> None:
    def step(t: Training, i: int) -> None:
        torch.set_default_device("meta" if i in (FIRST, LAST) else None)
        made = torch.ones(3) * 2
        torch.set_default_device(None)
        t.notes.append(str(made.device))
        plain(t, i)

    assert compared(step, "cpu")[-1] == 1


def test_a_step_is_called_under_another_default_device() -> None:
    made = kitsune.accelerate(lambda: str((torch.ones(3) * 2).device), device="cpu")
    with torch.device("meta"):
        there = [made() for _ in range(4)]
    here = [made() for _ in range(4)]
    with torch.device("meta"):
        assert made() == "meta"
    assert (set(there), set(here)) == ({"meta"}, {"cpu"})


def recurrent(t: Training) -> None:
    torch.manual_seed(0)
    t.model = nn.Sequential(nn.LSTM(6, 5)).to(t.device)
    t.optimizer = torch.optim.SGD(t.model.parameters(), 0.1)


def test_a_library_for_recurrent_layers_is_switched_off_and_on() -> None:
    def step(t: Training, i: int) -> None:
        if not i:
            recurrent(t)
        with torch.backends.mkldnn.flags(enabled=i not in (FIRST, LAST)):
            out, _ = t.model[0](t.xs[i])
            t.update(out.square().sum())
        t.kept.append(out.detach())

    compared(step, "cpu")
    assert kitsune.counters()["recognised"] > STEPS // 2


@pytest.mark.gpu
def test_cudnn_is_switched_off_and_on() -> None:
    def step(t: Training, i: int) -> None:
        if not i:
            torch.manual_seed(0)
            t.model = nn.Sequential(nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.ReLU()).cuda()
            t.optimizer = torch.optim.SGD(t.model.parameters(), 0.1)
        with torch.backends.cudnn.flags(enabled=i not in (FIRST, LAST), deterministic=True):
            t.update(t.model(t.xs[i][:, None]).square().sum())

    assert compared(step, "cuda")[FIRST - 1] == 1
    assert kitsune.counters()["replayed"] > 0


@pytest.mark.gpu
def test_tf32_is_switched_on_and_off() -> None:
    """A graph has the library's choice of its day in it: with another switch there is another graph."""
    torch.manual_seed(0)
    x = torch.randn(256, 256, device="cuda")

    def train(context: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(256, 256).cuda()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = []
        with context:
            for i in range(3 * STEPS):
                torch.backends.cuda.matmul.allow_tf32 = STEPS <= i < 2 * STEPS
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
                if i == STEPS:
                    captured.append(kitsune.counters()["captured"])
        torch.backends.cuda.matmul.allow_tf32 = False
        return [*losses, *model.parameters()]

    captured: list[int] = []
    with kitsune.config.patch(fuse=False):
        expected, got = train(NONE), train(kitsune.accelerate())
    assert all(map(torch.equal, expected, got))
    with torch.no_grad():
        weight, results = torch.randn(256, 256, device="cuda"), []
        for torch.backends.cuda.matmul.allow_tf32 in (True, False):
            results.append(x @ weight)
    assert not torch.equal(*results), "the switch does something here"
    counters = kitsune.counters()
    assert counters["captured"] > captured[1] > 0 and counters["replayed"] > 2 * STEPS, counters


# ---- functions in C++ ----

SOURCE = """
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

struct Thrice : torch::autograd::Function<Thrice> {
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x) { return x.mul(3); }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list grads) {
    return {grads[0].mul(0.5)};
  }
};

TORCH_LIBRARY(ks_steady, m) {
  m.def("thrice(Tensor x) -> Tensor", [](const at::Tensor& x) { return Thrice::apply(x); });
}
"""


@pytest.fixture(scope="module")
def thrice(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function with a backward of its own, which only C++ knows."""
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.skip("needs g++ and ninja")
    folder: Path = tmp_path_factory.mktemp("thrice")
    cpp_extension.load_inline(
        "ks_steady", SOURCE, build_directory=str(folder), is_python_module=False, no_implicit_headers=True, extra_cflags=["-O0"]
    )
    return torch.ops.ks_steady.thrice


@pytest.mark.timeout(300)
@pytest.mark.parametrize("device", DEVICES)
def test_a_function_in_cpp_comes_and_goes(thrice: Any, device: str) -> None:
    def step(t: Training, i: int) -> None:
        hidden = t.model[0](t.xs[i])
        hidden = thrice(hidden) if FIRST <= i <= LAST else hidden * 3
        t.update(t.model[1:](hidden).square().sum())

    followed = compared(step, device)
    assert (followed[FIRST - 1], followed[FIRST], followed[-1]) == (1, 0, 1)


def test_two_windows_that_move_along_one_tensor_are_one_region() -> None:
    torch.manual_seed(0)
    text = torch.randint(0, 5, (400,))
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with kitsune.accelerate(device="cpu"):
        for i in range(STEPS):
            F.cross_entropy(model(text[8 * i : 8 * i + 8]), text[8 * i + 1 : 8 * i + 9]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert kitsune.counters()["regions"] <= 2
