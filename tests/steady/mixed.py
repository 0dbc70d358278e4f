"""Programs that are put together: a model, a loss, a way to make a step, an optimizer, batches that come in some way, and what
the user does and changes meanwhile. A seed says which.

    python -m tests.steady.mixed --shard 1/4 --runs 2000

runs every fourth of 2,000 programs in eager and under Kitsune, each in a process of its own, and prints how many were equal, and
what tells the others apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kitsune
from tests.property.machine import apart
from tests.runtime.repeated import counts, graphs
from tests.steady.loops import deterministic
from tests.steady.mixed_changes import CHANGES
from tests.steady.mixed_habits import HABITS
from tests.steady.mixed_losses import LOSSES, WAYS
from tests.steady.mixed_models import MODELS, SCALES, Reading
from tests.steady.mixed_operators import OPERATORS
from tests.steady.programs import Program, Run, Step, differences

STEPS = 16
ALL_MODELS = MODELS | OPERATORS
optim = torch.optim
OPTIMIZERS: dict[str, Callable[[Run, Any], Any]] = {
    "SGD": lambda run, p: run.optimizer(optim.SGD, p, 0.05, momentum=0.9, weight_decay=1e-3),
    "plain SGD": lambda run, p: run.optimizer(optim.SGD, p, 0.05),
    "Adam": lambda run, p: run.optimizer(optim.Adam, p, 0.01),
    "foreach Adam": lambda run, p: run.optimizer(optim.Adam, p, 0.01, foreach=True, amsgrad=True),
    "fused AdamW": lambda run, p: run.optimizer(optim.AdamW, p, 0.01, fused=True),
    "RMSprop": lambda run, p: run.optimizer(optim.RMSprop, p, 0.01, foreach=True, momentum=0.5, centered=True),
    "NAdam": lambda run, p: run.optimizer(optim.NAdam, p, 0.01, foreach=True),
    "Adagrad": lambda run, p: run.optimizer(optim.Adagrad, p, 0.05, foreach=True),
    "Adadelta": lambda run, p: run.optimizer(optim.Adadelta, p, 1.0, foreach=True),
    "RAdam": lambda run, p: run.optimizer(optim.RAdam, p, 0.01, foreach=True),
    "Rprop": lambda run, p: run.optimizer(optim.Rprop, p, 0.01, foreach=True),
    "LBFGS": lambda run, p: run.optimizer(optim.LBFGS, p, 0.1, max_iter=3),
}
BATCHES = "listed", "fresh", "in place", "loaded", "windows", "views"
WAYS_ON = ("context", False), ("a context each", True), ("decorator", False), ("optimizer", False), ("context", True)
# Steps after which a change comes, and after which it is undone.
Times = tuple[int, int]


class Training:
    """What a program holds. Its attributes are what changes."""

    def __init__(self, run: Run, parts: Parts) -> None:
        self.run, self.parts = run, parts
        self.net = ALL_MODELS[parts.model]()
        self.optimizer = OPTIMIZERS[parts.optimizer](run, list(self.net.parameters()))
        self.given, self.way = LOSSES[parts.loss], WAYS[parts.way]
        self.k, self.n, self.dtype = 0, 6, torch.float32
        self.scale, self.negate = 1.0, False
        self.notes: dict[str, Any] = {}
        self.kept: list[Any] = []
        self.averaged: Any = None
        self.extra: Any = None
        self.data = torch.randn(STEPS * 6, 8), torch.randint(0, 4, (STEPS * 6,))
        self.buffer = torch.zeros(6, 8), torch.zeros(6, dtype=torch.long)
        self.loader: Any = None
        self.raised: list[str] = []
        self.left: list[Any] = []

    def loss(self, *args: Any) -> Tensor:
        found = self.given(*args)
        found = -found if self.negate else found
        return found if self.scale == 1 else found * self.scale

    def batch(self) -> tuple[Tensor, Tensor]:
        k = 1 if self.notes.get("same batch") else self.k
        x, y = self.data[0][6 * k : 6 * k + self.n], self.data[1][6 * k : 6 * k + self.n]
        if self.parts.batches == "fresh":
            x, y = torch.randn(self.n, 8), torch.randint(0, 4, (self.n,))
        elif self.parts.batches == "listed":
            x, y = x.clone(), y.clone()
        elif self.parts.batches == "in place":
            self.buffer[0][: self.n].copy_(x)
            self.buffer[1][: self.n].copy_(y)
            x, y = self.buffer[0][: self.n], self.buffer[1][: self.n]
        elif self.parts.batches == "loaded":
            if self.loader is None:
                data = torch.utils.data.TensorDataset(*self.data)
                self.loader = iter(torch.utils.data.DataLoader(data, 6, shuffle=True))
            x, y = (part[: self.n] for part in next(self.loader))
        elif self.parts.batches == "views":
            x = x.t().contiguous().t() if self.k % 2 else x.flip(1)
        return x.to(self.dtype), y

    def step(self, k: int) -> Any:
        self.k = k
        seen: list[Any] = []
        try:
            for name, (since, until) in self.parts.changes.items():
                if k in (since, until):
                    CHANGES[name](self, k == until)
            seen += [HABITS[name](self) for name in self.parts.habits]
            return [self.way(self, *self.batch()), seen]
        # Programs that torch refuses are programs, too: they go on with the next step.
        except (RuntimeError, ValueError, TypeError, NotImplementedError, LookupError, AttributeError, AssertionError) as error:
            self.raised.append(words_of(error))
            return [type(error).__name__, seen]
        finally:
            self.left[:] = self.net, self.optimizer, self.kept, self.averaged, self.versions()

    def versions(self) -> list[Any]:
        """How often all that lasts has been written; not gradients, which the engine adds up in place for plain tensors only."""
        state = [t for held in self.optimizer.state.values() if isinstance(held, dict) for t in held.values()]
        kept = [*self.net.parameters(), *self.net.buffers(), *state]
        return [t._version if isinstance(t, Tensor) and not t.is_inference() else None for t in kept]


def words_of(error: Exception) -> str:
    """How often a tensor has been written is told of those that Kitsune writes in another count."""
    words = re.sub(r"version \d+|\d{9,}", "", str(error)).replace("LazyTensor", "Tensor")
    return f"{type(error).__name__}: {words}"


class Parts:
    """What a seed says."""

    def __init__(self, seed: int) -> None:
        scattered = random.Random(seed)
        one: Callable[[Any], Any] = lambda table: scattered.choice(list(table))  # noqa: E731
        self.model, self.loss, self.batches, self.optimizer = one(ALL_MODELS), one(LOSSES), one(BATCHES), one(OPTIMIZERS)
        self.way = one(WAYS) if self.optimizer != "LBFGS" else "closed_over"
        self.on, self.reads = one(WAYS_ON)
        self.changes: dict[str, Times] = {}
        for _ in range(scattered.choice((0, 1, 1, 1, 2, 3))):
            since = scattered.randrange(2, 10)
            self.changes[one(CHANGES)] = since, since + scattered.randrange(1, 7)
        self.habits = [one(HABITS) for _ in range(scattered.choice((0, 0, 1, 1, 2)))]

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self).items())


def program_of(parts: Parts, trainings: list[Training]) -> Program:
    """The program; what it has made is put on a list."""

    def make(run: Run) -> tuple[Step, list[Any]]:
        random.seed(1)
        trainings.append(training := Training(run, parts))
        return training.step, training.left

    return make


@contextlib.contextmanager
def undone() -> Any:
    """What a program has replaced is put back."""
    functions, forward, defaults = (F.linear, F.cross_entropy), torch.nn.Tanh.forward, Reading.between.__defaults__
    try:
        yield
    finally:
        (F.linear, F.cross_entropy), torch.nn.Tanh.forward = functions, forward
        Reading.between.__defaults__ = defaults
        SCALES["global"] = 1.0
        torch.set_grad_enabled(True)
        torch._C._set_mkldnn_enabled(True)  # the public switch is locked for good by torch.testing._internal


class Told:
    """One run of a program: what it found and left, what was raised, and what it was warned of."""

    def __init__(self, parts: Parts, way: str) -> None:
        trainings: list[Training] = []
        with undone(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            self.found = Run(way, STEPS).tell(program_of(parts, trainings), parts.reads)
        self.raised = [words for training in trainings for words in training.raised]
        for training in trainings:
            # A wrapped optimizer's hook goes with its last reference, and a program's own hooks may keep all in a circle.
            vars(training).clear()
        self.warned = {f"{w.category.__name__}: {w.message}" for w in warned}


def verdict(parts: Parts) -> tuple[str, list[str]]:
    """equal, different or unstable, and in which way."""
    with deterministic():
        expected, again = Told(parts, "eager"), Told(parts, "eager")
        if differences(expected.found, again.found):
            return "unstable", []
        with kitsune.config.patch(gate=False), graphs(kernels=False):
            try:
                got = Told(parts, parts.on)
            except Exception as error:
                # What an operator says of values it says when they are there: behind the last step, where nothing reads them.
                if words_of(error) in expected.raised:
                    return "unstable", [f"raised when its region was run: {words_of(error)}"]
                raise
            recorded, replayed, refused = counts("recorded", "replayed", "graph_refused")
        if expected.raised and any(reason.startswith("A replay failed") for reason in refused):
            # What stands for a graph here raises in its midst what eager raises, with some of its random numbers drawn.
            return "unstable", []
        told = differences(expected.found, got.found)
        if expected.raised != got.raised:
            told.append(f"raised {got.raised[:2]} instead of {expected.raised[:2]}")
        if not expected.raised:
            # A replay that fails as eager does is done again op by op, and says so.
            told += [f"refused: {reason}" for reason in refused if "failed" in reason]
            told += [f"warned: {words}" for words in got.warned - expected.warned - again.warned]
        return ("different" if told else "equal"), [
            f"{recorded} recorded, {replayed} replayed, {len(expected.raised)} raised",
            *told,
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="1/1")
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--on", help="how Kitsune is switched on in all of them, as 'all inside'; else the seed says it")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further program after these")
    parser.add_argument("--out", type=Path, help="write a line of JSON for each program to this file")
    options = parser.parse_args()
    k, n = map(int, options.shard.split("/"))
    kinds: Counter[str] = Counter()
    until = time.monotonic() + 60 * options.minutes
    for seed in range(options.first + k - 1, options.first + options.runs, n):
        if time.monotonic() > until:
            break
        kind, told = apart(tried, seed, options.on) or ("crashed", ["the process died or did not end"])
        kinds.update(("run", kind))
        if options.out:
            row = {"seed": seed, "run": 1, "verdict": kind, "told": told[:4], "parts": str(Parts(seed))}
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if kind in ("different", "crashed"):
            print(f"seed {seed}: {kind}: {Parts(seed)}", *told[:4], sep="\n  ", flush=True)
    print(f"mixed {options.shard}:", ", ".join(f"{count} {name}" for name, count in kinds.items()))
    return int(bool(kinds["different"] + kinds["crashed"]))


def tried(seed: int, on: str | None = None) -> tuple[str, list[str]]:
    try:
        parts = Parts(seed)
        parts.on = on or parts.on
        return verdict(parts)
    except Exception as error:
        return "crashed", [f"{type(error).__name__}: {error}", traceback.format_exc()[-1500:]]


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (its settings are those of the tests)

    sys.exit(main())
