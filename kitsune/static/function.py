"""A static function: which of its calls go through its Python, and which do without."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from kitsune.config import config
from kitsune.ir import Barrier
from kitsune.pipeline import Pipeline, tally
from kitsune.static.asked import Asked, Knower
from kitsune.static.moment import Unknowable, may_skip, where
from kitsune.static.program import Numbers, Program
from kitsune.static.record import Record, difference
from kitsune.static.shortcut import MISSED, find_shortcut
from kitsune.static.surroundings import Surroundings
from kitsune.static.watch import Watch

# Kinds of arguments that are known at a time, and programs for each (with and without gradients from before, say).
MOST_KINDS = 16
MOST_PROGRAMS = 4
# Calls in a row that must have done the same, all of it seen; twice as many after each that did something else, up to 64.
SIGHTS = 3
# Calls from one that is checked to the next where nobody has said how many, and the most of the program's time that goes into
# checks then: a check takes 20 to 30 times as long as the step of a small model, whose 100 calls are over in 8 ms.
USUAL = 100
SHARE = 0.05
# Calls in a row that were watched in vain, after which only one in so many is.
PATIENCE = 16


class _Kind:
    """Calls with arguments of one kind."""

    def __init__(self) -> None:
        self.programs: list[Program] = []
        self.last: Record | None = None
        # How often one of them did something that nothing looked at had announced.
        self.n_surprises = 0

    @property
    def needed(self) -> int:
        """How many alike are proof enough."""
        return int(min(SIGHTS << self.n_surprises, 64))


class _State:
    """What one thread knows of a function."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.n_forgotten = pipeline, pipeline.n_forgotten
        self.kinds: OrderedDict[Any, _Kind] = OrderedDict()
        self.knower = Knower(pipeline.device)
        self.n_in_vain = 0
        # What was run last without Python, if there is a shortcut to it.
        self.latest: Program | None = None

    def kind(self, key: Any) -> _Kind:
        found = self.kinds.pop(key, None) or _Kind()
        self.kinds[key] = found
        if len(self.kinds) > MOST_KINDS:
            self.kinds.popitem(last=False)
        return found

    def bury(self, _: Any = None) -> None:
        """A module or an optimizer has died: what was known of it holds tensors that nobody needs any more."""
        for kind in list(self.kinds.values()):
            kind.programs = [program for program in kind.programs if program.record.surroundings.alive()]
            if kind.last is not None and not kind.last.surroundings.alive():
                kind.last = None
        self.latest = None


class StaticFunction:
    """Makes a function's calls. `context` is the `accelerate()` context for those that go through its Python.

    `audit` is how many calls there are from one that is checked to the next; None: as the knob says.
    """

    def __init__(self, function: Callable[..., Any], context: Any, audit: int | None) -> None:
        self._function, self._context, self._audit = function, context, audit
        self._name = getattr(function, "__qualname__", repr(function))
        self._here = threading.local()

    def call(self, args: Any, kwargs: Any) -> Any:
        """Call the function."""
        state: _State | None = getattr(self._here, "state", None)
        latest = None if state is None or kwargs or state.n_forgotten != state.pipeline.n_forgotten else state.latest
        if state is not None and latest is not None and not self._is_audit(latest):
            # Only a call that ends well is followed by one like it.
            state.latest = None
            returned = latest.shortcut.call(latest, args)
            if returned is not MISSED:
                state.latest = latest
                return returned
        return self._looked_up(args, kwargs)

    def _looked_up(self, args: Any, kwargs: Any) -> Any:
        """Call the function, not knowing what of."""
        state = self._state() if config.enabled and may_skip() else None
        if state is None:
            return self._ordinary(args, kwargs)
        try:
            call = state.knower.asked(args, kwargs)
        except Unknowable as reason:
            tally.not_static(f"{self._name}: {reason}")
            return self._ordinary(args, kwargs)
        kind, roots = state.kind(call.key), [self._function, *call.others]
        for program in kind.programs:
            if program.ready and program.guards.hold(roots, call) and (numbers := program.numbers()) is not None:
                return self._known(state, kind, program, call, numbers, args, kwargs)
        fitting = [program for program in kind.programs if program.guards.hold(roots, call)]
        kind.programs = [program for program in kind.programs if not program.guards.lost]
        state.n_in_vain += 1
        if state.n_in_vain > PATIENCE and state.n_in_vain % PATIENCE:
            return self._ordinary(args, kwargs)
        returned, record = self._watched(state, kind, call, args, kwargs)
        if self._tried(lambda: self._learn(kind, fitting, record, call)):
            state.n_in_vain -= 1
        return returned

    def _ordinary(self, args: Any, kwargs: Any) -> Any:
        with self._context:
            return self._function(*args, **kwargs)

    def _known(self, state: _State, kind: _Kind, program: Program, call: Asked, numbers: Numbers, args: Any, kwargs: Any) -> Any:
        state.n_in_vain = 0
        if not self._is_audit(program):
            tally.static_skipped += 1
            returned = program.run(call, numbers, state.pipeline)
            if find_shortcut(program, call, state.knower, [self._function], args, kwargs, state.pipeline):
                state.latest = program
            return returned
        tally.static_audits += 1
        kind.last, began = program.record, time.perf_counter()
        returned, record = self._watched(state, kind, call, args, kwargs)
        ended = time.perf_counter()
        program.rests_until = ended + (ended - began) * (1 / SHARE - 1)
        found = difference(program.record, record)
        if found is None and record.complete:
            found = program.surprise(record)
        if found is not None:
            kind.programs.remove(program)
            kind.n_surprises += 1
            raise RuntimeError(
                f"{self._name} was called without its Python {program.n_skipped} times, and this call, which went through it to "
                f"check, did something else: {found}. This call's own results are right, those before may not be. A function "
                "under accelerate(static=True) must do the same each time: leave static=True out, or move what changes out of it."
            )
        program.n_skipped = 0
        return returned

    def _is_audit(self, program: Program) -> bool:
        """Is it time for a call that goes through Python to check?"""
        audit = config.audit if self._audit is None else self._audit
        if audit is None:
            return program.n_skipped >= USUAL - 1 and time.perf_counter() >= program.rests_until
        return bool(audit) and program.n_skipped >= audit - 1

    def _watched(self, state: _State, kind: _Kind, call: Asked, args: Any, kwargs: Any) -> tuple[Any, Record]:
        """Make a call with Python, and see what it does."""
        pipeline, state.latest = state.pipeline, None
        recorder = pipeline.recorder
        pipeline.insists = True
        try:
            with Watch(self._function, call.tensors, call.others, kind.last) as watch, self._context:
                recorder.watcher = watch
                try:
                    returned = self._function(*args, **kwargs)
                    recorder.flush(Barrier.EXIT)
                    record = self._tried(lambda: watch.record(returned, state.bury))
                finally:
                    recorder.watcher = None
        finally:
            pipeline.insists = False
        return returned, record or Record([], Surroundings([], [], state.bury), [], reason="it was not understood")

    def _tried(self, learn: Callable[[], Any]) -> Any:
        """What `learn` returns; None if it fails, since the call itself has not."""
        try:
            return learn()
        except Exception as error:
            if config.verify:
                raise
            said = f"{type(error).__name__}: {error}"
            tally.not_static(
                f"{self._name}: Kitsune failed to learn from it ({said}). This is a bug in Kitsune: please report it"
            )
            return None

    def _learn(self, kind: _Kind, fitting: list[Program], record: Record, call: Asked) -> bool:
        """Learn from a call that went through Python; was it the same as one before?"""
        kind.last = record
        if record.reason is not None:
            tally.not_static(f"{self._name}: {record.reason}")
            kind.programs = [program for program in kind.programs if program not in fitting]
            return False
        if not record.complete:
            return False
        roots, known = [self._function, *call.others], None
        for program in list(kind.programs):
            found = difference(program.record, record)
            if found is None and (program in fitting or program.foretells(record)):
                known = program
            elif found is not None and program in fitting:
                kind.programs.remove(program)
                kind.n_surprises += 1
                tally.not_static(f"{self._name}: it did something else with arguments of the same kind: {found}")
        if known is not None:
            known.see(record, roots)
            reason = known.unexplained()
            if reason is None:
                return True
            tally.not_static(f"{self._name}: {reason}")
            kind.programs.remove(known)
            kind.n_surprises += 1
        kind.programs = [*kind.programs, Program(record, self._function, call, kind.needed)][-MOST_PROGRAMS:]
        return False

    def _state(self) -> _State | None:
        """What this thread knows, where recording is possible."""
        here, now = self._here, where()
        state: _State | None = getattr(here, "state", None)
        if state is not None and here.where == now and state.n_forgotten == state.pipeline.n_forgotten:
            return state
        pipeline = self._context.pipeline()
        if pipeline is None:
            return None
        here.state, here.where = _State(pipeline), now
        return here.state  # type: ignore[no-any-return]
