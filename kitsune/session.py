"""What users hold: `accelerate`, `disable`, `flush`, `counters`, `explain`, `reset`."""

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, overload

import torch

from kitsune.config import checked, config
from kitsune.contexts import Entry, entered, everyone, here as _thread, is_left, left
from kitsune.disabling import check_callable, disable
from kitsune.dispatch import foreign_modes, kept_out_by
from kitsune.engine_options import DEFAULT, EngineOptions
from kitsune.ir import Barrier, Graph
from kitsune.left_calls import LeftCalls
from kitsune.numerics import numerics_now
from kitsune.pipeline import Pipeline, last_plan, listeners, tally, wait_for_kernels
from kitsune.profiler import Report, report
from kitsune.static import StaticFunction

__all__ = ["accelerate", "counters", "disable", "explain", "flush", "last_plan", "reset", "trace_regions", "wait_for_kernels"]

P = ParamSpec("P")
R = TypeVar("R")


_DROPPED = (
    "a kitsune.accelerate() context that was not left was dropped, and is ended here: write it in a `with` statement, or hold "
    "what kitsune.accelerate() returned until its __exit__ is called."
)


class Accelerate:
    """The context that `accelerate()` returns. It may be entered again, in any thread, and inside itself."""

    def __init__(
        self,
        warmup: int | None = None,
        device: str | torch.device | None = None,
        static: bool = False,
        audit: int | None = None,
        options: EngineOptions = DEFAULT,
    ) -> None:
        self._warmup, self._device, self._options = warmup, device, options
        self._static, self._audit = static, audit
        self._entered = threading.local()

    def __enter__(self) -> "Accelerate":
        if self._static:
            raise TypeError(
                "static=True skips the Python of a function, and a `with` block has none that could be skipped: write "
                "@kitsune.accelerate(static=True) above the training step's `def`, or leave static=True out."
            )
        return entered(self, self.pipeline(), self._stack())

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # At this line an interrupt finds nothing begun: the context stays open until nobody holds it any more.
        n = len(self._entered.stack)
        try:
            try:
                self._finish(self._entered.stack[-1].pipeline, error)
            finally:
                left(self._entered.stack, n)
        finally:
            # An interrupt may have come at any line of it.
            left(self._entered.stack, n)

    def __del__(self) -> None:
        # Another thread's is not ended from here: modes and doors are a thread's own. Nor any when Python itself ends.
        stack = None if sys.is_finalizing() else getattr(getattr(self, "_entered", None), "stack", None)
        if stack:
            try:
                while stack:
                    self.__exit__(None, None, None)
            finally:
                note(_DROPPED)
                warnings.warn(_DROPPED, ResourceWarning, stacklevel=2, source=self)

    def _finish(self, pipeline: Pipeline | None, error: BaseException | None) -> None:
        """Run what is pending."""
        try:
            if pipeline is not None:
                pipeline.recorder.flush(Barrier.EXIT)
        except Exception as second:
            # The error on its way out is the one that the program made; that of the flush is told with it.
            if error is None:
                raise
            if hasattr(error, "add_note"):
                error.add_note(f"and while leaving kitsune.accelerate(): {type(second).__name__}: {second}")

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        check_callable(fn)
        if self._static:
            call = StaticFunction(fn, Accelerate(self._warmup, self._device, options=self._options), self._audit).call

            @functools.wraps(fn)
            def static(*args: P.args, **kwargs: P.kwargs) -> R:
                returned: R = call(args, kwargs)
                return returned

            return static

        calls = LeftCalls()

        @functools.wraps(fn)
        def accelerated(*args: P.args, **kwargs: P.kwargs) -> R:
            if (pipeline := self._left_pipeline()) is not None and calls.may_be_left(pipeline):
                return calls.make(pipeline, fn, args, kwargs)
            n, is_outermost = len(self._stack()), not _thread.depth
            try:
                with self:
                    pipeline = self._stack()[-1].pipeline
                    returned = fn(*args, **kwargs)
                if is_outermost and pipeline is not None:
                    calls.seen(pipeline)
                return returned
            finally:
                # The function holds the context for good, which an interrupt has left open.
                if len(self._stack()) > n:
                    self.__exit__(None, None, None)

        return accelerated

    def _stack(self) -> list[Entry]:
        if not hasattr(self._entered, "stack"):
            self._entered.stack = []
        stack: list[Entry] = self._entered.stack
        return stack

    def _left_pipeline(self) -> Pipeline | None:
        """The pipeline that this thread has used last for these options, if its next step is eager's without a context, too."""
        latest = getattr(self._entered, "latest", None)
        if latest is None or latest[0] is not _thread.pipelines or not is_left(pipeline := latest[2]) or foreign_modes():
            return None
        stamp = (resolve_device(self._device if self._device is not None else config.device), config.n_changes)
        return pipeline if stamp == latest[1] else None

    def pipeline(self) -> Pipeline | None:
        """This thread's pipeline for these options; None where the program is to run as plain PyTorch."""
        if not config.enabled:
            return None
        device = resolve_device(self._device if self._device is not None else config.device)
        if (reason := kept_out_by()) is not None:
            tally.passed_through[reason] += 1
            return None
        # To look it up by all options takes 5 us, which a context around each step need not.
        latest, stamp = getattr(self._entered, "latest", None), (device, config.n_changes)
        if latest is not None and latest[0] is _thread.pipelines and latest[1] == stamp:
            pipeline: Pipeline = latest[2]
            return pipeline
        warmup = config.warmup if self._warmup is None else self._warmup
        key = (device, warmup, config.max_pending_ops, config.max_pending_bytes, self._options)
        found = _thread.pipelines.get(key)
        if found is None:
            found = Pipeline(device, warmup, self._options)
            everyone.add(found)
            _thread.pipelines[key] = found
        self._entered.latest = _thread.pipelines, stamp, found
        return found


@overload
def accelerate(
    fn: None = None,
    *,
    warmup: int | None = None,
    device: str | torch.device | None = None,
    static: bool = False,
    audit: int | None = None,
    numerics: str | None = None,
) -> Accelerate: ...
@overload
def accelerate(
    fn: Callable[P, R],
    *,
    warmup: int | None = None,
    device: str | torch.device | None = None,
    static: bool = False,
    audit: int | None = None,
    numerics: str | None = None,
) -> Callable[P, R]: ...
def accelerate(
    fn: Callable[..., Any] | None = None,
    *,
    warmup: int | None = None,
    device: str | torch.device | None = None,
    static: bool = False,
    audit: int | None = None,
    numerics: str | None = None,
    **unknown: Any,
) -> Any:
    """Record and run the PyTorch code inside: `with accelerate():`, `@accelerate` or `@accelerate(warmup=0)`.

    `warmup` is how often a region is observed, op by op, before it is recorded lazily; `device` what to record for, by
    default the current CUDA device or, without one, the CPU. Contexts nest. What was recorded is run at the latest when
    the context is left; one that nobody holds any more is left then, with a ResourceWarning.
    `numerics` is the knob of that name: "strict" lets reductions be fused, which changes their order of
    summation; "bitwise" does not; "fast" rounds to 16 bits less often, too. Raises TypeError for an unknown option, RuntimeError
    for a CUDA device that is not there.

    `@accelerate(static=True)` is for a training step that does the same each time: once it has, a few times over, its Python
    is skipped. Results, gradients, parameters, optimizer state, counts of writes and the random generator are as if it had
    run; whatever else its Python does is not (print, count, step a scheduler: do that outside). Before each call the arguments'
    shapes, parameters, buffers, optimizer state and options, flags and hooks, autocast and grad mode are looked at, and where
    one of them has changed the call goes through Python again. So does every `audit`th call (the knob `audit` by default;
    0: none), as a check: a RuntimeError says at which operator and line it did something else. `explain()` says why the Python
    of a function is not skipped.
    """
    if not isinstance(static, bool):
        raise ValueError(f"static={static!r} is not possible: static accepts True or False.")
    if audit is not None and not static:
        raise TypeError("audit= says how often a static function is checked: write accelerate(static=True, audit=...).")
    for name in unknown:
        checked(name, unknown[name])
        raise TypeError(f"{name} is not an option of accelerate(): set it with kitsune.config.patch({name}=...).")
    context = Accelerate(
        None if warmup is None else checked("warmup", warmup),
        None if device is None else checked("device", device),
        static,
        None if audit is None else checked("audit", audit),
        DEFAULT if numerics is None else EngineOptions(numerics=checked("numerics", numerics)),
    )
    return context if fn is None else context(fn)


def flush() -> None:
    """Run what is pending in this thread now."""
    for pipeline in list(_thread.depth):
        pipeline.recorder.flush(Barrier.FLUSH)


def counters() -> dict[str, Any]:
    """Counts since the start or the last `reset()`: ops `recorded`, `observed`, `executed` by replay and `skipped` because
    nobody needed them; programs in work (`compiling`) and runs `unfused` for want of them; runs compared with
    eager (`checked`) and found `different`; distinct `regions` and how often
    one was `recognised`; CUDA graphs `captured`, runs `replayed` by one, results `moved` or copied because they are held,
    `graph_missed` and `graph_refused` by reason; `flushed` by cause; `passed_through` by reason; steps that the gate left to
    eager (`gate_left`) and what it decided (`gate_decided`); calls of static functions without their Python (`static_skipped`),
    with it as a check (`static_audits`), and why others were (`static_refused`).
    """
    return tally.counters()


def explain(numerics: bool = False) -> Report:
    """What was recorded, what flushed it and at which line, and what ran as eager and why.

    With `numerics` it ends with the operators whose bits may differ from eager's in the grade of numerics of the last region,
    each with the reason and, where that was measured, by how much; and how often the last plan has them so.
    """
    return report(tally, numerics_now() if numerics else None)


def note(sentence: str) -> None:
    """Something that `explain()` is to say until the next `reset()`."""
    if sentence:
        tally.notes[sentence] = None


def reset() -> None:
    """Forget every region and set the counters to zero; what is pending is run first."""
    for pipeline in list(everyone):
        pipeline.forget()
    tally.reset()


@contextlib.contextmanager
def trace_regions() -> Iterator[list[Graph]]:
    """Collect the Graph of each region that closes while the context is open."""
    graphs: list[Graph] = []
    listeners.append(graphs.append)
    try:
        yield graphs
    finally:
        listeners.remove(graphs.append)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to record for: by default the current CUDA device or, without one, the CPU."""
    resolved = None if device is None else torch.device(device)
    if torch.cuda.is_initialized() and (resolved is None or (resolved.type == "cuda" and resolved.index is None)):
        # To ask all that is asked below takes 10 us, and a decorated step asks each time.
        return torch.device("cuda", torch.cuda.current_device())
    if resolved is None:
        resolved = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise ValueError(f"Kitsune records for device 'cpu' or 'cuda', not {str(device)!r}.")
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"device={str(device)!r} was asked for, but torch finds no CUDA device. Use device='cpu' or leave it out."
        )
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise RuntimeError(f"device={str(device)!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices.")
    return torch.device("cuda", index)
