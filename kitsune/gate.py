"""The gate: is a program better off with Kitsune? Steps that keep changing, or are slower than eager's, are left to eager.

It knows nothing of tensors: it is told when a step has ended and what was new in it, reads a clock now and then, and says
whether the next step is to be recorded.
"""

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

ON_A_CPU = "On a CPU there are no kernels of ours"
NO_ROOM = "It was not measured, because an eager step might not fit into the device's memory beside what Kitsune keeps there"

# Steps that are recorded on a CPU all the same, so that `explain()` and `last_plan()` have something to show: the first makes
# gradients and optimizer state, the second is the first of a kind that repeats, the others run lazily.
SHOWN = 4
# What a program does is settled when so many steps in a row brought nothing new; a program that never does is measured as it is.
SETTLED = 4
NEVER_SETTLES = 64
# Steps that have to do without their kernels are not those that will run later: as long as they do they are not timed, but for
# so many steps and then so many seconds. 1,024 steps of a small MLP took 0.3 s, and its kernels a second (CPU host).
WAITS_FOR_KERNELS, WAITS_SECONDS = 1024, 30.0
# Eager and Kitsune take turns, so that a change of the machine's speed meets both; the best block of each counts, being the
# least disturbed. A block begins and ends with a wait for the device: that is once in so many steps, not in each.
BLOCKS = 3
BLOCK = 4
# Of short steps a block has more, up to MANY, to last so many seconds: the first ones after a switch are not like those that
# follow. With `transformers.Trainer` and an MLP, at 2 ms a step, 12 steps told 0.85, and 256 steps later 1.00 (H200).
LASTING, MANY = 0.05, 24
# A step is left to eager when it is slower by this much, and recorded again when it is faster by as much: noise decides nothing.
SLOWER = 1.05
FASTER = 0.95
# Steps until a decision is looked at again: each time four times as many, and more by as much as blocks are longer than BLOCK.
# A look costs some 30 steps, with blocks of that length.
REVISIT = 256
LONGEST = 2**18
# A step is new if this share of its operators is; a program keeps changing if so many of its last steps are new.
NEW_SHARE = 0.25
# Contexts in a row without an optimizer's step, after which each context is a step: `@accelerate` on a function without one.
NO_STEPS = 16
# Steps of other optimizers after which one that does not come again has ended.
OTHERS = 16


class Patience(NamedTuple):
    """A program keeps changing if `new` of its last `steps` steps were new."""

    steps: int
    new: int


# Twenty batch sizes in turn are no reason to give up, a hundred are. Later on it was given up before, and each look costs what
# recording costs, 5 times an eager step.
AT_FIRST = Patience(32, 24)
LATER = Patience(2, 2)


class Progress(NamedTuple):
    """Counts that only grow: operators recorded, those of them that were new, plans and graphs made for them, and regions run
    without the kernels that are on their way."""

    n_ops: int
    n_new: int
    n_made: int
    n_unfused: int


class Gate:
    """Decides for one pipeline. `records` says if the next step is to be recorded.

    `progress` is asked after each recorded step, `clock` (seconds, with the device's work done) at the ends of blocks,
    `has_room` before the first eager step of a measurement, and `allocated` (bytes that were ever asked of the device's
    allocator) after eager steps, whose shapes it tells apart. `make_way` is called before eager steps that are measured, and
    `relieve` when their memory is not needed any more. While steps are timed, `quiet` (see `kitsune.ir`) holds what is made in
    the background. `tally` counts.
    """

    def __init__(
        self,
        has_kernels: bool,
        progress: Callable[[], Progress],
        clock: Callable[[], float],
        has_room: Callable[[], bool],
        allocated: Callable[[], int],
        make_way: Callable[[], None],
        relieve: Callable[[], None],
        quiet: Any,
        tally: Any,
    ) -> None:
        self._has_kernels = has_kernels
        self._progress, self._clock, self._has_room, self._tally = progress, clock, has_room, tally
        self._allocated, self._make_way, self._relieve, self._quiet = allocated, make_way, relieve, quiet
        self.restart()

    def restart(self) -> None:
        """Another program begins, or everything is forgotten."""
        self.records = True
        # Why the steps are left to eager; None while they are not, or only to be measured.
        self.left: str | None = None
        self._decided = False
        self._block_steps = BLOCK
        self._before = self._progress()
        self._patience = AT_FIRST
        # Was it left because it keeps changing?
        self._changes = False
        self._new: deque[bool] = deque(maxlen=AT_FIRST.steps)
        self._unsettled = 0
        # Did the last step have to do without kernels? Since when, once many did?
        self._lacks_kernels = False
        self._lacking_since = 0.0
        self._quiet.end()
        self._optimizers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._anchor: Callable[[], Any] = lambda: None
        self._others = 0
        self._contexts = 0
        self._life = self._decisions()
        next(self._life)

    def end_of_step(self, optimizer: Any) -> None:
        """An optimizer's step has ended. Where several take turns, one of them ends the steps of the program."""
        self._contexts = 0
        if id(optimizer) not in self._optimizers:
            if self._decided and self._has_kernels:
                # What was found about another program need not hold for this one.
                self.restart()
            self._optimizers[id(optimizer)] = optimizer
        if self._anchor() is None or self._others >= OTHERS:
            self._anchor, self._others = weakref.ref(optimizer), 0
        if self._anchor() is optimizer:
            self._others = 0
            self._end()
        else:
            self._others += 1

    def end_of_context(self) -> None:
        """A context was left: where no optimizer steps inside of contexts, that is the end of a step."""
        self._contexts += 1
        if self._contexts > NO_STEPS:
            self._end()

    def _end(self) -> None:
        if self.records:
            self._look()
        elif self.left is not None:
            self._tally.gate_left += 1
        try:
            next(self._life)
        except StopIteration:
            # An interrupt, while it waited for the device, has ended it.
            self.restart()

    def _look(self) -> None:
        """Note what was new in a recorded step."""
        now, before = self._progress(), self._before
        self._before = now
        # The count of what is known falls when a recorder forgets: then all of it is new again.
        new = abs(now.n_new - before.n_new) > NEW_SHARE * (now.n_ops - before.n_ops)
        self._new.append(new)
        self._unsettled += new or now.n_made != before.n_made
        self._lacks_kernels = now.n_unfused != before.n_unfused

    def _keeps_changing(self) -> str | None:
        last = list(self._new)[-self._patience.steps :]
        if sum(last) < self._patience.new:
            return None
        return f"Its operators or shapes were new in {sum(last)} of its last {len(last)} recorded steps"

    def _decisions(self) -> Iterator[None]:
        """The life of a gate: each `yield` is one step of the program."""
        if not self._has_kernels:
            for _ in range(SHOWN):
                yield
            self._leave(ON_A_CPU)
            while True:  # nothing that another look could find would change this
                yield
        wait = REVISIT
        while True:
            why = yield from self._reason_to_leave()
            if why is None:
                self._keep()
            else:
                self._leave(why)
            # Longer blocks make a look dearer.
            pause, wait = min(wait * self._block_steps // BLOCK, LONGEST), min(4 * wait, LONGEST)
            while (yield from self._still_changes_after(pause)):
                pause = REVISIT
            self._tally.gate_revisited += 1

    def _still_changes_after(self, pause: int) -> Generator[None, None, bool]:
        """Let so many steps go by; is a program that was left because it keeps changing still doing so?

        Recording it again to find out would cost 5 times an eager step. Steps of the same shapes allocate the same bytes.
        """
        marks: list[int] = []
        for k in range(pause):
            yield
            if self.records and (why := self._keeps_changing()) is not None:
                self._leave(why)
                self._changes = True
            if self._changes and k >= pause - AT_FIRST.steps - 1:
                marks.append(self._allocated())
        sizes = [after - before for before, after in itertools.pairwise(marks)]
        return len(set(sizes)) >= AT_FIRST.new

    def _keep(self) -> None:
        self.records, self.left, self._decided = True, None, True

    def _leave(self, why: str) -> None:
        self.records, self.left, self._decided = False, why, True
        self._tally.decided(f"{why}: the step is left to eager")

    def _reason_to_leave(self) -> Generator[None, None, str | None]:
        """Record until the program is settled, then measure it; returns None where it is to be recorded."""
        was_left = self.left is not None
        self.records, self.left, self._changes = True, None, False
        # A step between the last look and this one may have been eager's: what it brought is no news.
        self._before = self._progress()
        self._new.clear()
        settled = n_steps = n_waits = 0
        while settled < SETTLED and n_steps < NEVER_SETTLES:
            before = self._unsettled
            yield
            if (why := self._keeps_changing()) is not None:
                self._patience, self._changes = LATER, True
                return why
            waits = self._lacks_kernels and self._waits_for_kernels(n_waits)
            n_waits, n_steps = n_waits + waits, n_steps + (not waits)
            settled = settled + 1 if self._unsettled == before and not waits else 0
        if not self._has_room():
            self._tally.decided(f"{NO_ROOM}: the step is recorded")
            return None
        # What is made in the background takes what cores and device the steps would have: an MLP's eager step under
        # `transformers.Trainer` took 11 ms meanwhile and 2 later, and its replays seemed faster (H200, 16 cores). To wait until
        # all is made, also what these steps do not need, took 1,000 steps.
        while not self._quiet.ask():
            yield
        why = yield from self._measured(FASTER if was_left else SLOWER)
        self._quiet.end()
        if why is None:
            self._relieve()
        return why

    def _waits_for_kernels(self, n_waits: int) -> bool:
        """After a step that had to do without them, `n_waits` having gone by before: are they to be waited for?"""
        if not n_waits or n_waits % WAITS_FOR_KERNELS:
            return True
        now = self._clock()
        if n_waits == WAITS_FOR_KERNELS:
            self._lacking_since = now
        return now - self._lacking_since < WAITS_SECONDS

    def _measured(self, bound: float) -> Generator[None, None, str | None]:
        first = yield from self._block(BLOCK, records=False)
        self._block_steps = n = min(max(BLOCK, round(LASTING / max(first, 1e-9))), MANY)
        eagers, ours = [first] if n == BLOCK else [], []
        for k in range(BLOCKS):
            if len(eagers) == k:
                eagers.append((yield from self._block(n, records=False)))
            ours.append((yield from self._settled_block(n)))
            if (why := self._keeps_changing()) is not None:
                self._patience, self._changes = LATER, True
                return why
        ratio = min(ours) / max(min(eagers), 1e-9)
        said = f"It took {ratio:.2f} times as long as eager's over {BLOCKS * n} steps"
        if ratio > bound:
            return said
        self._patience = AT_FIRST
        self._tally.decided(f"{said}: the step is recorded")
        return None

    def _settled_block(self, n: int) -> Generator[None, None, float]:
        """Seconds of a recorded step, of steps with nothing new in them where there are such."""
        for _ in range(BLOCKS):
            before = self._unsettled
            seconds = yield from self._block(n, records=True)
            if self._unsettled == before:
                break
        return seconds

    def _block(self, n: int, records: bool) -> Generator[None, None, float]:
        """Seconds of a step, over a block of them."""
        self.records = records
        if not records:
            self._make_way()
        # The first step after a switch pays for it.
        yield
        start = self._clock()
        for _ in range(n):
            yield
            self._quiet.ask()
        return (self._clock() - start) / n
