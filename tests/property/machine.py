"""A machine of two worlds: what it does it does in eager at once, and the same script is run under Kitsune afterwards.

A script is a list of lines of Python. `ctx` enters and leaves contexts (and does nothing in eager), `check()` notes what every
living tensor is at that point, and `look()` what can be told of them without a value. Parts of a script come again, with other
data and maybe with one line more, so that what was recorded is followed.

    python -m tests.property.machine --shard 1/8 --runs 2000 --steps 2000

runs every eighth of 2,000 scripts of 2,000 lines, each in a process of its own, and prints how many were run, equal, different
and crashed; of those that are not equal it prints the seed and the shortest part that still shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

import kitsune
from tests import _compare
from tests.property.machine_steps import MACHINE, begin
from tests.property.strategies import MOST_TENSORS, Builder, make
from tests.property.world import World, differences

NAMES = sorted(MACHINE)
COUNTS = ("run", "equal", "different", "crashed")
# torch's words for a graph that is used up. Kitsune says so of every graph that a followed backward has used, eager only of those
# that have saved something: what a script does after that tells nothing.
USED_UP = "Trying to backward through the graph a second time"


class Contexts:
    """What `ctx` is in a script: the contexts that are open."""

    def __init__(self, warmup: int | None) -> None:
        self.warmup = warmup
        self.stack: list[Any] = []

    def enter(self) -> None:
        if self.warmup is not None:
            self.stack.append(kitsune.accelerate(warmup=self.warmup, device="cpu"))
            self.stack[-1].__enter__()

    def leave(self, error: BaseException | None = None) -> None:
        if self.stack:
            self.stack.pop().__exit__(type(error) if error else None, error, None)

    def flush(self) -> None:
        if self.stack:
            kitsune.flush()

    def close(self) -> None:
        while self.stack:
            self.leave()


class TwoWorlds(World):
    """A world with contexts, which notes what its tensors are whenever the script asks."""

    def open(self, warmup: int | None) -> TwoWorlds:
        self.contexts = Contexts(warmup)
        self.snapshots: list[dict[str, Any]] = []
        self.used_up: list[int] = []
        self.names |= {"ctx": self.contexts, "check": self.check, "look": self.look}
        return self

    def execute(self, line: str) -> None:
        super().execute(line)
        if self.words.startswith(USED_UP):
            self.used_up.append(len(self.seen) - 1)

    def check(self) -> None:
        """Note every value. Under Kitsune that runs what is pending."""
        state = self.state()
        with torch.no_grad(), torch.inference_mode(False):
            values = {name: (_compare.metadata(t), _bits_of(t)) for name, t in state.items()}
        self.snapshots.append({"values": values, "aliases": _compare.alias_sets(list(state.values()))})

    def look(self) -> None:
        """Note what shows without a value."""
        facts = {name: (t.shape, t.stride(), t.dtype, t.requires_grad, t.grad is None) for name, t in self.tensors.items()}
        self.snapshots.append(facts)


def _bits_of(t: torch.Tensor) -> Any:
    return _compare._plain(t).clone()


def _snapshot_difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    if "values" not in a:
        return next((f"{name}: {b.get(name)} instead of {fact}" for name, fact in a.items() if b.get(name) != fact), None)
    if a["values"].keys() != b["values"].keys():
        return f"living {sorted(b['values'])} instead of {sorted(a['values'])}"
    for name, (there, value) in a["values"].items():
        here, other = b["values"][name]
        for key, expected in there.items():
            if key != "history" and here.get(key) != expected:
                return f"{name}.{key}: {here.get(key)} instead of {expected}"
        if difference := _compare.value_difference(value, other):
            return f"{name}: {difference}"
    return None if a["aliases"] == b["aliases"] else f"alias sets {b['aliases']} instead of {a['aliases']}"


class Machine(Builder):
    """Makes a script, line by line, in the eager world."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.world = TwoWorlds(gradients=[]).open(None)
        self.script = self.program.inside
        self.parts: list[list[str]] = []
        with quiet():
            begin(self, seed)
        self.entered = 0

    def line(self, number: int) -> None:
        """One line of the table."""
        scattered = Random(number)
        name, (i, j, k) = scattered.choice(NAMES), (scattered.randrange(256) for _ in range(3))
        with quiet():
            text = MACHINE[name](self, i, j, k)
            if len(self.world.tensors) > MOST_TENSORS:
                text += f"; del {self.disposable(i + j)}"
            self.add(text, self.script)

    def disposable(self, i: int) -> str:
        names = [name for name in self.world.tensors if name not in ("t1", "t2", "t3", "w1", "b1", "w2")]
        return names[i % len(names)]

    def put(self, *lines: str) -> None:
        with quiet():
            for line in lines:
                self.add(line, self.script)

    def enter(self) -> None:
        if self.entered < 2:
            self.entered += 1
            self.put("ctx.enter()")

    def leave(self, number: int) -> None:
        if self.entered:
            self.entered -= 1
            self.put("ctx.leave(ValueError('the program'))" if number % 4 == 0 else "ctx.leave()")

    def part(self, number: int) -> None:
        """A part of a few lines that ends with an update or a flush; it will come again."""
        scattered = Random(number)
        start = len(self.script)
        train = scattered.random() < 0.7
        self.put(f"t3 = {make('2, 3', scattered.randrange(7), 'float32')}")
        if train:
            self.put("out = net(t3)")
        for _ in range(scattered.choice((0, 0, 1, 1, 2, 3, 5))):
            self.line(scattered.getrandbits(32))
        if train:
            loss = scattered.choice(("out.square().mean()", "F.cross_entropy(out, torch.tensor([0, 2]))", "(out * t3).sum()"))
            ends = ("loss.backward()", "loss.backward(); seen = loss.item()", "loss.backward(retain_graph=True)")
            self.put(f"loss = {loss}", scattered.choice((*ends, ends[0], ends[0])))
            self.put(scattered.choice(("opt.step()", "opt.step()", "opt.step(); opt.zero_grad()", "ctx.flush()")))
            self.put(scattered.choice(("opt.zero_grad()", "pass")))
        else:
            self.put("ctx.flush()")
        self.parts.append(self.script[start:])
        self.again(scattered.getrandbits(32), -1)

    def again(self, number: int, which: int | None = None) -> None:
        """A former part some times more, with other data, once maybe with a line more or less."""
        if not self.parts:
            return
        scattered = Random(number)
        part = self.parts[scattered.randrange(len(self.parts)) if which is None else which]
        times = scattered.randrange(1, 6)
        odd = scattered.randrange(times) if scattered.random() < 0.5 else -1
        for turn in range(times):
            place = scattered.randrange(1, len(part) + 1)
            self.put(f"t3 = {make('2, 3', scattered.randrange(7), 'float32')}")
            for k, line in enumerate(part[1:], 1):
                if turn == odd and k == place:
                    if scattered.random() < 0.3:
                        continue
                    self.line(scattered.getrandbits(32))
                self.put(line)

    def step(self, number: int) -> None:
        """Any of the above."""
        scattered = Random(number)
        other, choice = scattered.getrandbits(32), scattered.random()
        if not self.entered and choice < 0.5:
            self.enter()
        elif choice < 0.6:
            self.line(other)
        elif choice < 0.75:
            self.part(other)
        elif choice < 0.88:
            self.again(other)
        elif choice < 0.9:
            self.enter()
        elif choice < 0.92:
            self.leave(other)
        elif choice < 0.96:
            self.put("check()")
        else:
            self.put("look()")


@contextlib.contextmanager
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(script: list[str], warmup: int | None) -> TwoWorlds:
    """Run a script in a world of its own: in eager where `warmup` is None."""
    world = TwoWorlds(gradients=[] if warmup is None else None).open(warmup)
    with quiet():
        try:
            for line in script:
                world.execute(line)
        finally:
            world.contexts.close()
            torch.set_grad_enabled(True)
    return world


def compare(script: list[str], warmup: int, expected: TwoWorlds | None = None) -> list[str]:
    """What tells the worlds apart after a script, in words."""
    expected = expected or run(script, None)
    kitsune.reset()
    got = run(script, warmup)
    if not set(got.used_up) <= set(expected.used_up):
        return []
    found = [told for a, b in zip(expected.snapshots, got.snapshots, strict=False) if (told := _snapshot_difference(a, b))]
    return found[:1] + differences(expected, got)


def scripted(seed: int, steps: int) -> list[str]:
    """A script of at least so many lines, of a seed."""
    scattered = Random(seed)
    machine = Machine(scattered.getrandbits(16))
    try:
        machine.enter()
        while len(machine.script) < steps:
            machine.step(scattered.getrandbits(32))
    finally:
        torch.set_grad_enabled(True)
    return list(machine.script)


Found = tuple[str, list[str]]
SECONDS, TO_SHORTEN = 900, 300


def verdict(script: list[str], warmup: int) -> Found:
    """equal, different or crashed, and in which way."""
    try:
        expected = run(script, None)
        if differences(expected, run(script, None)):
            return "unstable", []  # memory that nobody has written
        found = compare(script, warmup, expected)
    except BaseException as error:
        return "crashed", [f"{type(error).__name__}: {error}"]
    return ("different" if found else "equal"), found[:3]


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a process of its own; None where that dies or does not end."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def work() -> None:
        torch.set_num_threads(1)
        there.send(function(*args))

    process = context.Process(target=work)
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(SECONDS) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def shortened(script: list[str], warmup: int, kind: str) -> list[str]:
    """The script without the lines that it does not need to end in the same way."""
    size, until = len(script) // 2, time.monotonic() + TO_SHORTEN
    while size and time.monotonic() < until:
        start, shorter = 0, False
        while start < len(script) and time.monotonic() < until:
            candidate = script[:start] + script[start + size :]
            if (apart(verdict, candidate, warmup) or ("crashed", []))[0] == kind:
                script, shorter = candidate, True
            else:
                start += size
        size = size // 2 if size > 1 or not shorter else 1
    return script


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="1/1")
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further script after these")
    parser.add_argument("--out", type=Path, help="write a line of JSON for each script to this file")
    options = parser.parse_args()
    k, n = map(int, options.shard.split("/"))
    counts: Counter[str] = Counter()
    until = time.monotonic() + 60 * options.minutes
    for seed in range(options.first + k - 1, options.first + options.runs, n):
        if time.monotonic() > until:
            break
        script = apart(scripted, seed, options.steps)
        kind, found = (script and apart(verdict, script, seed % 2)) or ("crashed", ["the process died or did not end"])
        counts["run"] += 1
        counts[kind] += 1
        if options.out:
            row = {"seed": seed, "lines": len(script or []), "run": 1, "verdict": kind, "told": found}
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if found:
            print(
                f"seed {seed}, warmup {seed % 2}: {kind}",
                *shortened(script or [], seed % 2, kind),
                *found,
                sep="\n  ",
                flush=True,
            )
    print(f"machine {options.shard}:", ", ".join(f"{counts[name]} {name}" for name in (*COUNTS, "unstable")))
    return int(bool(counts["different"] + counts["crashed"]))


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (its settings are those of the tests)

    sys.exit(main())
