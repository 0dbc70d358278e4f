"""A default device, set or around a part of the program: torch sees it as in eager, and Kitsune's own code does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn
from torch.overrides import _get_current_function_mode_stack

import kitsune
from kitsune.config import config

STEPS = 5
WHERE = ("around", "set before", "set inside", "inside", "around each step")
Step = Callable[[Any, Any, Tensor], Any]


@pytest.fixture(autouse=True)
def no_gate() -> Iterator[None]:
    with config.patch(gate=False):
        yield
    torch.set_default_device(None)
    assert not _get_current_function_mode_stack()


@contextlib.contextmanager
def set_to(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def trained(step: Step, where: str, accelerated: bool, device: str = "cpu", model_on: str = "cpu") -> list[Any]:
    """What each step gives, and the state of the generator behind it; and the parameters."""
    torch.manual_seed(0)
    kitsune.reset()
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)).to(model_on)
    state = torch.get_rng_state if model_on == "cpu" else torch.cuda.get_rng_state
    # Adam of torch 2.11 counts its steps where the default device says.
    optimizer = (torch.optim.SGD if device == "meta" else torch.optim.Adam)(model.parameters(), 1e-2)
    batches, found = [torch.randn(6, 3).to(model_on) for _ in range(STEPS)], []
    outer = {"around": torch.device(device), "set before": set_to(device)}.get(where, contextlib.nullcontext())
    inner = {"inside": torch.device(device), "set inside": set_to(device)}.get(where, contextlib.nullcontext())
    with outer, kitsune.accelerate(device=model_on) if accelerated else contextlib.nullcontext(), inner:
        for batch in batches:
            with torch.device(device) if where == "around each step" else contextlib.nullcontext():
                found += [step(model, optimizer, batch), state()]
    return [*found, *[p.detach().clone() for p in model.parameters()]]


def read_before_backward(model: Any, optimizer: Any, batch: Tensor) -> Tensor:
    noise = torch.randn(6, 2)
    loss = (model(batch) - noise).pow(2)
    loss.sum().item()
    optimizer.zero_grad()
    loss.sum().backward()
    optimizer.step()
    return loss.detach()


def read_in_a_loop(model: Any, optimizer: Any, batch: Tensor) -> Tensor:
    x, y = model(batch), torch.randn(7, 2)
    distances, total = (x[:, None] - y[None]).pow(2).sum(-1), torch.zeros(6)
    for _ in range(10):
        before, total = total, 0.1 * torch.logsumexp(total[:, None] - distances, 1)
        if (total - before).abs().sum().item() < 0.5:
            break
    loss = (torch.exp(total[:, None] - distances) * distances).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def sampled(model: Any, optimizer: Any, batch: Tensor) -> Tensor:
    mean, scale = model(batch).chunk(2, -1)
    drawn = torch.distributions.Normal(mean, scale.exp()).rsample()
    loss = (drawn - torch.rand(6, 1)).pow(2).mean() + torch.nn.functional.dropout(torch.ones(4), 0.5).sum()
    if torch.isfinite(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("step", [read_before_backward, read_in_a_loop, sampled])
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("where", WHERE)
def test_training_is_eagers(where: str, warmup: int, step: Step, device: str) -> None:
    expected = trained(step, where, False, device, device)
    with config.patch(warmup=warmup, fuse=False):
        found = trained(step, where, True, device, device)
    counted = kitsune.counters()
    assert all(map(torch.equal, expected, found)) and counted["followed"] > STEPS
    # The storage of a result is no question of the program's.
    assert "DOOR" not in {str(cause) for cause in counted["flushed"]}


@library.custom_op("test_default_device::made", mutates_args=())
def made_by_others(x: Tensor) -> Tensor:
    SEEN.append(torch.zeros(1).device.type)
    return x.clone()


made_by_others.register_fake(torch.empty_like)
SEEN: list[str] = []


class Mine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        SEEN.append("forward " + torch.zeros(1).device.type)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        SEEN.append("backward " + torch.zeros(1).device.type)
        return grad * 2


class Named(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Not what Kitsune asks of its operands, as whether they require gradients.
        if (name := getattr(func, "__name__", "")) != "__get__":
            SEEN.append(f"named {name}")
        return super().__torch_function__(func, types, args, kwargs or {})


def python_of_others(model: Any, optimizer: Any, batch: Tensor) -> Tensor:
    SEEN.append("step " + torch.zeros(1).device.type)
    x = Mine.apply(model[0](batch)) + made_by_others(batch).sum()
    x.register_hook(lambda grad: SEEN.append("hook " + torch.zeros(1).device.type))
    named = batch.as_subclass(Named)
    SEEN.append(f"{tuple((named * 2).size())}")
    optimizer.zero_grad()
    x.sum().backward()
    optimizer.step()
    return x.detach()


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("where", WHERE)
def test_python_of_others_sees_the_default_device_as_in_eager(where: str, warmup: int) -> None:
    SEEN.clear()
    expected, seen = trained(python_of_others, where, accelerated=False, device="meta"), [*SEEN]
    SEEN.clear()
    with config.patch(warmup=warmup):
        found = trained(python_of_others, where, accelerated=True, device="meta")
    assert seen == SEEN and "step meta" in seen and all(map(torch.equal, expected, found))
