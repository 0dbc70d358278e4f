"""An ordinary training loop, run eagerly or under one of the three forms of Kitsune."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune.demo import data
from kitsune.demo.errors import DemoError
from kitsune.demo.measure import deterministic, peak_memory
from kitsune.demo.models import CharGPT, LeNet

MODELS = ("lenet", "gpt")
FORMS = ("context", "decorator", "optimizer")
# Reading the loss waits for it, in eager and in Kitsune alike, so an ordinary loop does not do it in every step. It is
# also where time is taken: a synchronisation in every step would be the demo's own, and would end a region each time.
READ_EVERY = 5

Progress = Callable[[int, float], None]
Scheduler = torch.optim.lr_scheduler.LRScheduler


@dataclass(frozen=True)
class TrainResult:
    """What one training leaves behind; tensors are copies on the CPU."""

    losses: list[float]
    grads: dict[str, Tensor]  # of the last step
    params: dict[str, Tensor]
    step_seconds: list[float]  # one for every READ_EVERY steps: their mean
    peak_bytes: int | None
    counters: dict[str, object]
    report: Any | None  # what kitsune.explain() returns
    plan: Any | None = None  # of a step, as kitsune.last_plan() returns it


@dataclass
class Task:
    """Model, data and optimizer; nothing here knows of Kitsune, except that a form may replace the optimizer."""

    model: nn.Module
    data: data.Digits | data.Text
    batch_size: int
    optimizer: torch.optim.Optimizer
    clip: float | None = None
    cosine_steps: int | None = None


def build(model: str, steps: int, device: torch.device) -> Task:
    if model == "lenet":
        lenet = LeNet().to(device)
        return Task(lenet, data.digits(), 64, torch.optim.SGD(lenet.parameters(), lr=0.05, momentum=0.9))
    if model == "gpt":
        text = data.text()
        gpt = CharGPT(len(text.alphabet), text.context).to(device)
        return Task(gpt, text, 16, torch.optim.AdamW(gpt.parameters(), lr=2e-3), clip=1.0, cosine_steps=steps)
    raise DemoError(f"there is no model {model!r}; choose one of {', '.join(MODELS)}")


def train(
    model: str,
    form: str | None,
    *,
    steps: int,
    device: torch.device,
    warmup: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
    plan_for: str | None = None,
) -> TrainResult:
    """Train `model` for `steps` from `seed`. `form` is None for eager, or one of FORMS; `plan_for` a GPU's architecture."""
    if form is not None and form not in FORMS:
        raise DemoError(f"there is no form {form!r}; choose one of {', '.join(FORMS)}")
    with deterministic(device):
        torch.manual_seed(seed)
        task = build(model, steps, device)
        if form is not None:
            kitsune.reset()
        with peak_memory(device) as peak:
            losses, step_seconds = run(task, form, steps, device, warmup, seed, progress)
        grads = {name: p.grad.detach().to("cpu", copy=True) for name, p in task.model.named_parameters() if p.grad is not None}
        params = {name: p.detach().to("cpu", copy=True) for name, p in task.model.named_parameters()}
        return TrainResult(
            losses=losses,
            grads=grads,
            params=params,
            step_seconds=step_seconds,
            peak_bytes=peak.nbytes,
            counters={} if form is None else dict(kitsune.counters()),
            report=None if form is None else kitsune.explain(),
            plan=None if form is None else kitsune.last_plan(plan_for),
        )


def run(
    task: Task, form: str | None, steps: int, device: torch.device, warmup: int, seed: int, progress: Progress | None
) -> tuple[list[float], list[float]]:
    """The training itself. Only the three `if form` lines tell it from a loop that never heard of Kitsune."""
    context: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if form == "optimizer":
        task.optimizer = kitsune.KitsuneOptimizer(task.optimizer, warmup=warmup, device=device, enable_fusion=True)
    train_step = make_train_step(task)
    if form == "decorator":
        train_step = kitsune.accelerate(warmup=warmup, device=device)(train_step)
    if form == "context":
        context = kitsune.accelerate(warmup=warmup, device=device)

    losses: list[Tensor] = []
    step_seconds: list[float] = []
    batches = task.data.batches(steps, task.batch_size, torch.Generator().manual_seed(seed))
    with context:
        start = time.perf_counter()
        for step, (x, y) in enumerate(batches, start=1):
            loss = train_step(x.to(device), y.to(device))
            losses.append(loss)
            if step % READ_EVERY == 0:
                shown = loss.item()
                step_seconds.append((time.perf_counter() - start) / READ_EVERY)
                if progress is not None:
                    progress(step, shown)
                start = time.perf_counter()
    curve = torch.stack(losses).tolist()
    if steps % READ_EVERY:
        step_seconds.append((time.perf_counter() - start) / (steps % READ_EVERY))
    return curve, step_seconds


def make_train_step(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    model, optimizer, clip = task.model, task.optimizer, task.clip
    scheduler: Scheduler | None = None
    if task.cosine_steps is not None:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.cosine_steps)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        return loss.detach()

    return train_step
