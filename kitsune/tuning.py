"""Tiles by measurement: while a region is replayed, others than the first choice are compiled, timed, and the fastest taken.

The workers compile them. They are timed on the stream of the program right after a replay, when the device has nothing else to
do on it, each once in a round, on the arena, which holds nothing between two replays. Nobody waits for a result: it is looked up
at a later replay. Rounds are so far apart that they take SHARE of the time.

Another tile adds up in another order. Where deterministic algorithms are asked for, no bit may depend on what was measured when,
so that only kernels that have the same bits with any tile are tried, and only those have a tile from an earlier process.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kitsune.backends import Backend
from kitsune.background import thread, when_done
from kitsune.codegen import Choices, candidates, why_not_tried
from kitsune.ir import Launch, Plan, Tile, quiet
from kitsune.profiler import Tally
from kitsune.runtime import Trial, was_lent

# Replays of a region before its kernels are tried: by then the gate has decided, or is timing steps, and none are tried.
AFTER = 64
# The part of a program's time that trials may take, the device's time counting like the host's.
SHARE = 0.03
# Kernels of one region that are tried, those that move the most in a step first; ResNet-50 has 66.
MOST = 100
# Of the bytes of a step: what moves less in all of its launches is left as it is.
LEAST_SHARE = 0.002
# Kernels whose tiles are compiled while others are timed.
AHEAD = 2
# Memory that a trial may take where no arena has room, and more than that was lent before. It is given back at once.
OWN_BYTES = 64 << 20
# Seconds between two looks of who waits for trials.
PAUSE = 2e-4
# Bytes that a kernel is taken to move in a second until it is timed, and the seconds of a start.
RATE, START = 2e12, 25e-6

# Memory for a trial of so many bytes, if there is any.
Scratch = Callable[[int], torch.Tensor | None]


@dataclass(slots=True, eq=False)
class Subject:
    """A region whose kernels are tried. `left` have not been asked for, `coming` are being compiled, `trial` is timed."""

    plan: Plan
    n_replays: int = 0
    left: deque[Launch] | None = None
    coming: deque[Future[Trial | None]] = field(default_factory=deque)
    trial: Trial | None = None
    is_over: bool = False


class Tuner:
    """Tries the tiles of one thread's kernels on its device. `scratch` lends memory until the next replay."""

    def __init__(
        self,
        backend: Backend,
        scratch: Scratch,
        tally: Tally,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert backend.choices is not None
        self.choices: Choices = backend.choices
        self._backend, self._scratch, self._tally, self._clock = backend, scratch, tally, clock
        self._device, self._not_before = device, 0.0

    def tiles(self) -> Callable[[Launch], Tile | None]:
        """What a plan is to take for the tiles of its launches, with the settings of now."""
        reproducible = _reproducible()

        def tile_for(launch: Launch) -> Tile | None:
            tile = self.choices.tile_for(launch, reproducible)
            if tile is not None:
                self._tell(launch)
            return tile

        return tile_for

    def _untried(self, plan: Plan) -> deque[Launch]:
        """The launches of which other tiles are to be tried, those with the most bytes in a step first."""
        reproducible = _reproducible()
        nbytes: Counter[Any] = Counter()
        alike: dict[Any, Launch] = {}
        for launch in plan.launches:
            if not launch.kernels or why_not_tried(launch, reproducible) is not None:
                continue
            key = self.choices.key(launch.kernels[0])
            nbytes[key] += launch.nbytes
            alike.setdefault(key, launch)
        worth = [key for key, n in nbytes.most_common(MOST) if n >= LEAST_SHARE * plan.nbytes]
        left = deque(alike[key] for key in worth if self.choices.of(alike[key].kernels[0]) is None)
        self._tally.n_untried += len(left)
        return left

    def turn(self, subject: Subject, stream: int, until: float | None = None) -> bool:
        """After a replay: a round of a trial, if it is time for one; with `until` all trials, now, as long as the clock allows.
        True if all are over, and launches are to be changed."""
        if until is not None:
            return self._finish(subject, stream, until)
        if subject.is_over or quiet.is_on or self._clock() < self._not_before:
            return False
        subject.n_replays += 1
        return subject.n_replays >= AFTER and self._advance(subject, stream, OWN_BYTES)

    def _finish(self, subject: Subject, stream: int, until: float) -> bool:
        while not subject.is_over and self._clock() < until:
            if self._advance(subject, stream, math.inf):
                return True
            # For the workers, and for the device.
            time.sleep(PAUSE)
        return False

    def _advance(self, subject: Subject, stream: int, most_bytes: float) -> bool:
        if subject.left is None:
            subject.left = self._untried(subject.plan)
        self._ask_ahead(subject)
        if subject.trial is None and subject.coming and subject.coming[0].done():
            subject.trial = subject.coming.popleft().result()
            if subject.trial is None:
                self._tally.n_untried -= 1
        if subject.trial is not None:
            self._go_on(subject, subject.trial, stream, most_bytes)
        subject.is_over = subject.trial is None and not subject.coming and not subject.left
        return subject.is_over and self.changed(subject.plan) is not subject.plan

    def changed(self, plan: Plan) -> Plan:
        """The plan with the tiles that are known by now; the same plan where it has them."""
        return plan.with_tiles(self.tiles())

    def _go_on(self, subject: Subject, trial: Trial, stream: int, most_bytes: float) -> None:
        if trial.is_open:
            return
        kernel = trial.launch.kernels[0]
        if trial.is_done and trial.first in trial.micros:
            self.choices.keep(kernel, trial.micros)
        # Another thread may have tried the same.
        if trial.is_done or self.choices.of(kernel) is not None:
            return self._end(subject, trial)
        memory = self._scratch(trial.nbytes)
        if memory is None and not self._may_take(trial.nbytes, most_bytes):
            return self._end(subject, trial, f"its operands need {trial.nbytes / 2**20:.0f} MiB, more than an arena has")
        start = self._clock()
        try:
            if memory is None:
                memory = torch.empty(trial.nbytes, dtype=torch.uint8, device=self._device)
            trial.round(memory, self._backend.timer, stream)
        except Exception as error:
            return self._end(subject, trial, f"{type(error).__name__}: {error}")
        device_seconds = trial.n_programs * (START + trial.launch.nbytes / RATE)
        self._not_before = self._clock() + (self._clock() - start + device_seconds) / SHARE

    def _may_take(self, nbytes: int, most_bytes: float) -> bool:
        # Who waits for trials has them take what they want.
        return nbytes <= most_bytes and (most_bytes == math.inf or was_lent(self._device, nbytes))

    def _end(self, subject: Subject, trial: Trial, failure: str = "") -> None:
        subject.trial = None
        self._tally.n_untried -= 1
        self._tell(trial.launch)
        if failure:
            self._tally.notes[f"No other tiles were timed for {trial.launch.name}: {failure}."] = None

    def _ask_ahead(self, subject: Subject) -> None:
        while subject.left and len(subject.coming) < AHEAD:
            subject.coming.append(self._ask(subject.left.popleft()))

    def _ask(self, launch: Launch) -> "Future[Trial | None]":
        """A trial, once all of its programs are compiled; None if there can be none."""
        asked: Future[Trial | None] = Future()
        prepare, warm = self._backend.prepare_launch, self._backend.warm
        assert warm is not None

        def work() -> None:
            try:
                launches = {tile: replace(launch, tile=tile) for tile in candidates(launch.kernels[0])}
                programs = {tile: prepare(one) for tile, one in launches.items()}
                futures = [future for tile, made in programs.items() for future in warm(launches[tile], made)]
            except Exception:
                asked.set_result(None)
            else:
                when_done(futures, lambda: asked.set_result(Trial(launch, programs)))

        # After plans, and the loading of what they wait for.
        thread.submit(work, rank=2)
        return asked

    def _tell(self, launch: Launch) -> None:
        choice = self.choices.of(launch.kernels[0])
        if choice is not None:
            self._tally.chosen[(choice.kernel, choice.domain)] = choice


def _reproducible() -> bool:
    return bool(torch._C._get_deterministic_algorithms())
