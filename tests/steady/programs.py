"""What the programs of `test_programs.py` share: how one is run, and what of it is compared."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import kitsune
from tests._compare import difference

STEPS = 12
Step = Callable[[int], Any]
# A step, and everything that it leaves behind.
Program = Callable[["Run"], tuple[Step, list[Any]]]
PROGRAMS: dict[str, Program] = {}


def program(make: Program) -> Program:
    """`make` sets a training up; it is one of those that are compared."""
    PROGRAMS[make.__name__] = make
    return make


class Run:
    """One run of a program, of so many steps. `way` is how Kitsune is switched on."""

    def __init__(self, way: str, steps: int = STEPS) -> None:
        self.way, self.steps = way, steps
        random.seed(0)
        torch.manual_seed(0)

    def optimizer(self, kind: Any, parameters: Any, lr: float, **options: Any) -> Any:
        base = kind(parameters, lr, **options)
        return kitsune.KitsuneOptimizer(base, device="cpu") if self.way == "optimizer" else base

    def context(self, way: str) -> Any:
        return kitsune.accelerate(device="cpu") if self.way == way else contextlib.nullcontext()

    def tell(self, make: Program, reads: bool) -> dict[str, Any]:
        """What each step gives, and what all of them leave; if `reads`, what they leave after each step, too."""
        found: dict[str, Any] = {}
        with self.context("all inside"):
            step, left = make(self)
            call = kitsune.accelerate(device="cpu")(step) if self.way == "decorator" else step
            self.run(call, left, reads, found)
        return found | _named(left, "left") | {"generator": torch.get_rng_state(), "random": random.random()}

    def run(self, call: Step, left: list[Any], reads: bool, found: dict[str, Any]) -> None:
        with self.context("context"):
            for k in range(self.steps):
                with self.context("a context each"):
                    found |= _named(call(k), f"step {k}")
                if reads:
                    found |= {name: _taken(held) for name, held in _named(left, f"after {k}").items()}
                    found[f"generator after {k}"] = torch.get_rng_state()


def differences(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """What tells one run from another, in words; a graph that a followed backward has used up is told in another way."""
    if expected.keys() != got.keys():
        return [f"{sorted(expected.keys() ^ got.keys())} are there only once"]
    told = {name: difference(expected[name], got[name], skip=("history",)) for name in expected}
    return [f"{name}: {words}" for name, words in told.items() if words]


def _taken(held: Any) -> Any:
    if not isinstance(held, Tensor):
        return held
    held = held.detach().to_dense()
    return torch.tensor(held.tolist()) if held.dtype is torch.bfloat16 else torch.from_numpy(held.numpy().copy())


def _named(held: Any, name: str) -> dict[str, Any]:
    return dict(_walk(held, name))


def _walk(held: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(held, nn.Module):
        held = {**dict(held.named_buffers()), **{k: [p, p.grad] for k, p in held.named_parameters()}}
    elif isinstance(held, torch.optim.Optimizer):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in held.param_groups]
        held = [groups, [held.state.get(p, {}) for group in held.param_groups for p in group["params"]]]
    if isinstance(held, (dict, list, tuple)):
        for key, part in held.items() if isinstance(held, dict) else enumerate(held):
            yield from _walk(part, f"{name}.{key}")
    else:
        yield name, held


def mlp(out: int = 4, width: int = 16, ins: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(ins, width), nn.Tanh(), nn.Linear(width, out))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 8), torch.randint(0, 4, (6,))) for _ in range(STEPS)]
