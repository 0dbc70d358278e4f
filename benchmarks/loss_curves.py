"""The losses of one training, by eager or by Kitsune: the same weights, batches and dropout for every column of one seed."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kitsune
from benchmarks.models import RECIPES, Size, make
from benchmarks.small_data import Batch
from benchmarks.small_models import SMALL

GRADES = ("bitwise", "strict", "fast")
AUTOCAST = {"fp32": None, "amp": torch.bfloat16, "fp16": torch.float16}
# Kernels are waited for after this step, when every region has come back.
WARM = 5
N_HELD_OUT = 8
# Of random batches, which say nothing new, so many take turns.
N_RANDOM = 16
# The same bits each time, where every operator of a model has a kernel for that; where not, from as many as have. An attention's
# backward sums in any order unless nothing else is allowed (torch 2.11, flash).
DETERMINISM = ("strictly", "as far as possible")


@dataclass
class Training:
    """A model with its optimizer, the batches of its steps, and those that it does not see."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module, Any], Tensor]
    batches: list[Any]
    held_out: list[Any]
    device: torch.device
    precision: str


@dataclass(frozen=True)
class Curve:
    """What a training left: its losses, that of what is judged in the end, a digest of its parameters, and its counters."""

    losses: list[float]
    evaluated: float
    digest: str
    kernels: int
    followed: int


def training(name: str, device: torch.device, precision: str, steps: int, seed: int, size: Size = "full") -> Training:
    """One of the eight small models on real data or, from `benchmarks.models`, one of the seven on random data."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    if name in SMALL:
        small = SMALL[name]
        n = small.size if size == "full" else 4
        model = small.model().to(device).train()
        batches = [_to(small.source(n, False, generator), device) for _ in range(steps)]
        # The same for every seed.
        n_seen, n_each = (N_HELD_OUT, 256) if size == "full" else (1, 16)
        held_out = [_to(small.source(n_each, True, torch.Generator().manual_seed(k)), device) for k in range(n_seen)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=small.rate, weight_decay=0.01, fused=True)
        return Training(model, optimizer, small.loss, batches, held_out, device, precision)
    it = make(name, device, "fp32" if precision == "fp32" else "amp", size, seed=seed)
    drawn = [_to(RECIPES[name].batch(size, generator), device) for _ in range(N_RANDOM)]
    return Training(it.model, it.optimizer, it.loss, [drawn[i % N_RANDOM] for i in range(steps)], [], device, precision)


def _to(batch: Batch, device: torch.device) -> Batch:
    return tuple(t.to(device) for t in batch)


def train(
    it: Training, loss_of: Callable[[nn.Module, Any], Tensor], context: contextlib.AbstractContextManager[Any]
) -> list[float]:
    """The loop as people write it, with a scaler for float16."""
    kind, dtype = it.device.type, AUTOCAST[it.precision]
    scaler = torch.amp.GradScaler(kind, enabled=dtype is torch.float16)
    losses = []
    with context:
        for n, batch in enumerate(it.batches):
            it.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(kind, dtype, enabled=dtype is not None):
                loss = loss_of(it.model, batch)
            scaler.scale(loss).backward()
            # Before the step, which ends a region: the next one would begin with it.
            losses.append(loss.detach())
            scaler.step(it.optimizer)
            scaler.update()
            if n == WARM:
                # The steps from here on are run by plan.
                kitsune.wait_for_kernels(120)
    return [float(loss) for loss in losses]


def evaluate(it: Training, losses: list[float]) -> float:
    """The mean loss of what was held out, by eager in float32; where nothing was, of the last turn of the random batches."""
    it.model.eval()
    with torch.no_grad():
        found = [float(it.loss(it.model, batch)) for batch in it.held_out] or losses[-N_RANDOM:]
    return sum(found) / len(found)


def digest(model: nn.Module) -> str:
    """Equal exactly if every bit of the parameters and buffers is."""
    found = hashlib.sha256()
    for t in model.state_dict().values():
        found.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if t.dim() else repr(t.item()).encode())
    return found.hexdigest()[:16]


def nudge(model: nn.Module) -> None:
    """Move every parameter by one unit in the last place, upwards."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, float("inf"))))


@contextlib.contextmanager
def repeatable(wanted: str | None) -> Iterator[None]:
    """With kernels of eager's that give the same bits each time: one of DETERMINISM, or None for whatever is fastest."""
    with warnings.catch_warnings():
        # That this or that has no deterministic kernel: whether it matters is seen by the column "bitwise".
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(wanted is not None, warn_only=wanted != DETERMINISM[0])
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def determinism(name: str, device: torch.device, precision: str, size: Size = "full") -> str:
    """Which of DETERMINISM a model can be trained with."""
    it, (strictly, otherwise) = training(name, device, precision, 1, 0, size), DETERMINISM
    try:
        with repeatable(strictly):
            train(it, it.loss, contextlib.nullcontext())
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        return otherwise
    return strictly


def curve(
    name: str,
    column: str,
    device: torch.device,
    precision: str,
    steps: int,
    seed: int = 0,
    size: Size = "full",
    how: str = DETERMINISM[1],
) -> Curve:
    """One column of a model, here: a grade of numerics, "compile", "again" (without determinism), "nudged" or "eager"."""
    kitsune.reset()
    it = training(name, device, precision, steps, seed, size)
    if column == "nudged":
        nudge(it.model)
    loss_of = torch.compile(it.loss) if column == "compile" else it.loss
    context = kitsune.accelerate(device=device, numerics=column) if column in GRADES else contextlib.nullcontext()
    torch.manual_seed(seed)
    with repeatable(None if column in ("again", "compile") else how), kitsune.config.patch(gate=False):
        losses = train(it, loss_of, context)
        counters = kitsune.counters()
        if column in GRADES and device.type == "cuda" and not counters["kernels"]:
            raise RuntimeError(f"{name}, {column}: no kernel of Kitsune's was run, so that there is nothing to compare.")
        return Curve(losses, evaluate(it, losses), digest(it.model), counters["kernels"], counters["followed"])
