"""One column of one model in a process of its own: what the step costs, from its first run on.

    python -m benchmarks.train_step.worker '{"model": "mlp", "column": "eager", ...}' FILE

There are two visits. The `cold` one begins with empty caches on disk and goes on to the step's times; the `warm` one finds
what the cold one left there, and goes on to memory, so that neither profiler nor samples are in its peak.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.device_trace import trace
from benchmarks.models import Precision, Size, make, make_batches
from benchmarks.train_step.columns import COLUMNS, NotAvailableError, Program, Read

# Resident batches that take turns, in every column, so that whoever relies on a batch's address meets another one.
N_BATCHES = 4
# How often a training loop looks at its loss; a sample is as many steps and ends with that look.
READ_EVERY = 20
MIN_SAMPLES = 5
HOST_STEPS = 20
MEMORY_STEPS = 20
# Steps that a gate may take; it needs some 200.
MOST_UNDECIDED = 400
# What has not come from the background by then does not come.
LONGEST_S = 60.0


@dataclass(frozen=True)
class Task:
    """What one process is asked for."""

    model: str
    column: str
    precision: Precision = "amp"
    size: Size = "full"
    read: Read = "every 20"
    device: str = "cuda"
    visit: Literal["cold", "warm"] = "cold"
    n_first: int = 30
    max_samples: int = 30
    seconds: float = 3.0

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


class Stepper:
    """Runs a program's steps, each on the next batch."""

    def __init__(self, program: Program) -> None:
        self._step = program.step
        self._batches = itertools.cycle(program.batches)

    def __call__(self) -> Tensor:
        x, y = next(self._batches)
        return self._step(x, y)


def first_steps(step: Stepper, program: Program, start: float, task: Task) -> dict[str, Any]:
    """Seconds from `start` (model and data were ready) to the end of the first step and to where steps are steady, the time
    of each of the first steps, and their losses."""
    losses, taken, ends = [], [], []

    def some(n: int) -> None:
        for _ in range(n):
            begin = time.perf_counter()
            loss = step()
            synchronize(task)
            ends.append(time.perf_counter())
            taken.append((ends[-1] - begin) * 1e3)
            if len(losses) < task.n_first:
                # Kept without a look at it: a value that is read ends a region.
                losses.append(loss.clone() if program.reuses_loss else loss)

    some(task.n_first)
    if not program.is_ready():
        # What is made in the background changes the step when it comes, and is a part of the way to the steady one.
        while not program.is_ready() and ends[-1] - start < LONGEST_S:
            some(1)
        some(task.n_first)
    steady = steady_from(taken)
    return {
        "first_step_s": round(ends[0] - start, 3),
        "steady_s": None if steady is None else round(ends[steady] - start, 3),
        "first_ms": [round(ms, 3) for ms in taken[: task.n_first]],
        # Nine digits tell every float32 from the next.
        "losses": [float(f"{loss.item():.9g}") for loss in losses],
    }


def steady_from(taken: list[float]) -> int | None:
    """After how many steps none takes over twice the median of the last half, and no three in a row over 1.25 times (a
    ResNet-50's step without its kernels takes 1.7 times as long), half a millisecond allowed for; None if the
    last one still does. The lower of two medians: with few steps, a slow one is not to set the measure."""
    median = statistics.median_low(taken[len(taken) // 2 :])
    slow = [i for i, ms in enumerate(taken) if ms > 2 * median + 0.5]
    slow += [i for i in range(2, len(taken)) if min(taken[i - 2 : i + 1]) > 1.25 * median + 0.5]
    n_slow = max(slow) + 1 if slow else 0
    return n_slow if n_slow < len(taken) else None


def step_times(step: Stepper, task: Task) -> dict[str, Any]:
    """Milliseconds per step of a loop that is synchronised by nothing but the look at its loss."""
    taken: list[float] = []
    n_min = min(MIN_SAMPLES, task.max_samples)
    synchronize(task)
    while len(taken) < n_min or (len(taken) < task.max_samples and sum(taken) * READ_EVERY < task.seconds * 1e3):
        start = time.perf_counter()
        for _ in range(READ_EVERY):
            loss = step()
        loss.item()
        synchronize(task)
        taken.append((time.perf_counter() - start) * 1e3 / READ_EVERY)
    low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
    return {"step_ms": round(middle, 4), "quartiles_ms": [round(low, 4), round(high, 4)], "samples": len(taken)}


def host_times(step: Stepper, task: Task) -> dict[str, Any]:
    """Milliseconds until the Python of a step returns, on a device that has nothing else to do."""
    taken = []
    for _ in range(HOST_STEPS):
        synchronize(task)
        start = time.perf_counter()
        step()
        taken.append((time.perf_counter() - start) * 1e3)
    synchronize(task)
    return {"host_ms": round(statistics.median(taken), 4)}


def device_times(step: Stepper, task: Task) -> dict[str, Any]:
    """What one step launches, and how long that takes on the device, over one round of the batches."""

    def one_round() -> None:
        for _ in range(N_BATCHES):
            step()

    seen = trace(one_round)
    counted = {"kernels": seen.count("kernel"), "copies": seen.count("gpu_memcpy"), "fills": seen.count("gpu_memset")}
    per_step = {name: round(n / N_BATCHES, 2) for name, n in {"launches": len(seen.launches), **counted}.items()}
    return {"device_ms": round(seen.micros / 1e3 / N_BATCHES, 4), **per_step}


def memory(step: Stepper, task: Task) -> dict[str, Any]:
    """Bytes of torch's allocator at their peak: with the first steps, and in the steps after them. What a CUDA graph holds
    between replays is not `allocated` then, but it is `reserved`."""
    overall = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    for i in range(MEMORY_STEPS):
        loss = step()
        if i % READ_EVERY == READ_EVERY - 1:
            loss.item()
    synchronize(task)
    steady = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    names = ("allocated", "reserved")
    return {"memory": {"overall": dict(zip(names, overall, strict=True)), "steady": dict(zip(names, steady, strict=True))}}


def synchronize(task: Task) -> None:
    if task.device.startswith("cuda"):
        torch.cuda.synchronize()


def visit(task: Task, save: Callable[[dict[str, Any]], None]) -> None:
    """Measure, and save after each part: what a part that fails or hangs comes after is not lost."""
    # By default torch rounds the operands of convolutions, and those of other products not.
    torch.backends.cudnn.allow_tf32 = task.precision == "tf32"
    workload = make(task.model, task.device, task.precision, task.size)
    batches = make_batches(task.model, task.device, N_BATCHES, task.size)
    synchronize(task)
    start = time.perf_counter()
    program = COLUMNS[task.column](workload, batches, task.read)
    with program.context:
        step = Stepper(program)
        save({task.visit: first_steps(step, program, start, task)})
        on_device = task.device.startswith("cuda")
        if task.visit == "warm":
            save(memory(step, task) if on_device else {})
            return
        program.settle()
        for n in range(MOST_UNDECIDED):
            if n >= READ_EVERY and program.is_decided():
                break
            # Held until the next one is there, as below: a step whose loss nobody holds is another region, and is planned.
            loss = step()
        loss.item()
        save(step_times(step, task))
        # With a look at the loss in each step, Python waits for the device in all of them.
        save(host_times(step, task) if task.read != "each" else {})
        save(device_times(step, task) if on_device else {})
        counts = program.counts()
        save({"counts": counts} if counts else {})


def first_line(error: BaseException) -> str:
    """An error as a note: its type and the first line that says something."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'without a message'}"[:300]


def main() -> None:
    """Measure what the command line says, and write it."""
    task, target = Task(**json.loads(sys.argv[1])), Path(sys.argv[2])
    row: dict[str, Any] = {}

    def save(found: dict[str, Any]) -> None:
        row.update(found)
        target.write_text(json.dumps(row))

    try:
        visit(task, save)
    except NotAvailableError as reason:
        save({"note": f"not available: {reason}"})
    except Exception as error:
        traceback.print_exc()
        save({"note": f"failed: {first_line(error)}"})


if __name__ == "__main__":
    main()
