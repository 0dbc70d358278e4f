"""Programs over a pool of tensors as lines of Python, and a world that runs them and tells what they left behind.

A line is made while eager runs it, so it can be chosen to fit the tensors that live at that point; the other worlds run
the same lines. A failing program prints as a script.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

import kitsune
from tests import _compare

SEED = 991


class Doubled(torch.autograd.Function):
    """A user's own autograd function, in Python both ways."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * 2 + x * 0


@dataclass
class World:
    """Names and what they stand for; ``seen`` collects, line by line, what the program could tell."""

    names: dict[str, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    # Storages that held a gradient (kept, so that none is used twice), where asked for. Autograd adds gradients up in
    # place for plain tensors only, so their `_version` is its own affair.
    gradients: list[Any] | None = None
    # `_version` of each variable when it was made: C++ may work in place on a plain tensor that it has just made
    # (F.linear adds a bias), and out of place on a wrapper.
    births: dict[str, int] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    # Of the exception of the last line.
    words: str = ""
    # Was a second backward refused? README has among the known differences that eager allows one where nothing was saved.
    refused_again: bool = False
    # What the program saw of versions on the way.
    noted: list[tuple[str, tuple[int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names |= {"torch": torch, "F": torch.nn.functional, "np": numpy, "kitsune": kitsune, "Doubled": Doubled}
        self.names["note_writes"] = lambda name: self.noted.append((name, self.writes(name, self.names[name])))
        torch.manual_seed(SEED)

    def execute(self, line: str) -> None:
        """Run one line; note the value that it read, or the type of its exception."""
        self.names["seen"], self.words = None, ""
        try:
            exec(compile(line, "<program>", "exec"), self.names)
        except Exception as error:
            self.words = str(error)
            self.refused_again |= "backward through the graph a second time" in self.words
            self.seen.append(f"{type(error).__name__} at {line!r}")
        else:
            self.seen.append(f"{self.names['seen']!r} at {line!r}")
        # To ask for a version is to ask for the graph: the program has not, and calls would not be followed any more.
        with torch._C.DisableTorchFunction():
            for name, tensor in self.tensors.items():
                if self.ids.get(name) != id(tensor):
                    self.ids[name], self.births[name] = id(tensor), _version_of(tensor)
        if self.gradients is not None:
            self._note_gradients("autograd.grad(" in line)

    def _note_gradients(self, newest: bool) -> None:
        assert self.gradients is not None
        found = [t.grad for t in self.tensors.values() if t.grad is not None] + list(self.tensors.values())[-1:] * newest
        known = {storage._cdata for storage in self.gradients}
        self.gradients += [t.untyped_storage() for t in found if t.untyped_storage()._cdata not in known]

    def writes(self, name: str, tensor: torch.Tensor) -> tuple[int, int]:
        """How often the tensor was written, and how often of that since it was made."""
        version = _version_of(tensor)
        return version, version - self.births.get(name, 0)

    def is_gradient(self, tensor: torch.Tensor) -> bool:
        """Does the tensor lie in memory that once held a gradient?"""
        return tensor.untyped_storage()._cdata in {storage._cdata for storage in self.gradients or ()}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.names.items() if isinstance(value, torch.Tensor)}

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that the program can still reach: variables, gradients, optimizer state."""
        found = self.tensors
        for name, value in self.tensors.items():
            if value.grad is not None:
                found[f"{name}.grad"] = value.grad
        for name, value in self.names.items():
            if isinstance(value, torch.optim.Optimizer):
                found |= {f"{name}.{key}": t for key, t in optimizer_state(value)}
        return found


def optimizer_state(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, torch.Tensor]]:
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                yield f"state[{i}].{key}", value


@dataclass(repr=False)
class Program:
    """Lines run before the context is entered, and those run inside it."""

    outside: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        body = "".join(f"    {line}\n" for line in self.inside)
        return "\n" + "".join(f"{line}\n" for line in self.outside) + "with kitsune.accelerate():\n" + body

    def run(self, context: AbstractContextManager[Any], eager: bool = False) -> World:
        world = World(gradients=[] if eager else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for line in self.outside:
                world.execute(line)
            try:
                with context:
                    for line in self.inside:
                        world.execute(line)
            finally:
                torch.set_grad_enabled(True)
        return world


def _version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same_writes(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Of a view that was followed the first count is as in eager, and it begins to count when it gets its history."""
    return a[0] == b[0] or a[1] == b[1]


def differences(expected: World, got: World) -> list[str]:
    """What tells the two worlds apart, in words.

    The names of autograd's nodes are left out: after a write, eager remakes the history of a view of a view with
    as_strided, a wrapper's is replayed view by view.
    """
    found = [f"saw {b} instead of {a}" for a, b in zip(expected.seen, got.seen, strict=True) if a != b]
    for (name, a), (_, b) in zip(expected.noted, got.noted, strict=False):
        if not _same_writes(a, b):
            found.append(f"{name}: version {b} instead of {a} on the way")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there, here = expected.state(), got.state()
        if there.keys() != here.keys():
            return [*found, f"living {sorted(here)} instead of {sorted(there)}"]
        for name, tensor in there.items():
            if difference := _compare.difference(tensor, here[name], skip=("history",)):
                found.append(f"{name}: {difference}")
            writes = [world.writes(name, state[name]) for world, state in ((expected, there), (got, here))]
            if not _same_writes(*writes) and not expected.is_gradient(tensor):
                found.append(f"{name}: version {writes[1]} instead of {writes[0]}")
        names = list(there)
        sets = [_compare.alias_sets([state[name] for name in names]) for state in (there, here)]
        if sets[0] != sets[1]:
            found.append(f"alias sets of {names}: {sets[1]} instead of {sets[0]}")
    return found
