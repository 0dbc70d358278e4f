"""Watches one call of a static function that goes through its Python, and writes down what it did."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from kitsune.ir import Barrier, Graph, OpRow
from kitsune.lazy import HostCounts, casts_down, is_strided, outlive_calls, serial_of, user_site
from kitsune.static.origins import Origins, Results, Unclear, is_constant, leaves_in, place_of, real_of, version_of
from kitsune.static.record import KEPT, Argument, Counted, Counter, Leaf, Made, Outside, Record, Run
from kitsune.static.surroundings import Surroundings

# Ends of regions that come with every step, or only with what is not known yet.
_ENDS = (
    Barrier.STEP,
    Barrier.UPDATE,
    Barrier.AGAIN,
    Barrier.EXIT,
    Barrier.FLUSH,
    Barrier.BOUND,
    Barrier.DIVERGED,
    Barrier.UNTRUSTED,
)
# What is run beside a region and says nothing to the program.
_QUIET = (Barrier.INPUT_VIEW, Barrier.PROFILER)


class Watch:
    """The recorder's watcher during one call. `arguments` are its tensors, `others` its other objects.

    `known` is the record of the call before: the state of what that one names is noted first.
    """

    def __init__(self, function: Any, arguments: Sequence[Any], others: Sequence[Any], known: Record | None) -> None:
        self.reason: str | None = None
        self._arguments, self._roots = arguments, [function, *others]
        # Weakly: one that is made for a single call, such as a loss, is none that could be looked at before the next.
        self._modules: dict[int, weakref.ref[Any]] = {}
        self._optimizers: dict[int, Any] = {}
        self._runs: list[Run] = []
        # The inputs of each run; and the run that has not closed yet.
        self._inputs: list[list[tuple[int, Any]]] = []
        self._open: tuple[Run, list[tuple[int, Any]]] | None = None
        self._results = Results()
        self._counters: list[tuple[Any, ...]] = []
        self._counted: list[HostCounts] = []
        self._before = Before(list(map(real_of, arguments)), known)

    def __enter__(self) -> "Watch":
        self._hook = register_module_forward_pre_hook(self._called)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _called(self, module: Any, args: Any) -> None:
        self._modules[id(module)] = weakref.ref(module)
        if isinstance(module, torch.jit.ScriptModule):
            self._refuse("it calls a scripted module")

    def stepped(self, optimizer: Any) -> None:
        """An optimizer has stepped."""
        self._optimizers[id(optimizer)] = optimizer

    def counted(self, counts: HostCounts) -> None:
        """An optimizer's update is about to count steps on the host."""
        self._counted.append(counts)

    def flushes(self, cause: Barrier) -> None:
        """A region was asked to end, or memory was asked for."""
        if cause is Barrier.ITEM:
            # `passed` will tell which value it is.
            return
        if cause not in _ENDS:
            self._refuse(f"{cause.value}, at {user_site() or 'no line of Python'}")

    def passed(self, row: OpRow, args: Any, kwargs: Any, reason: Barrier) -> None:
        """An op ran beside the regions."""
        if reason is Barrier.HOST_SCALAR and row.in_place and type(args[0]) is not list:
            self._counters.append((row.target, args[0], tuple(args[1:]), tuple(kwargs.items())))
        elif reason not in _QUIET and not (reason is Barrier.ITEM and self._is_constant(args[0])):
            self._refuse(f"{row.target} at {user_site() or 'no line of Python'} is not recorded: {reason.value}")

    def _is_constant(self, tensor: Any) -> bool:
        """Is it computed from nothing that could change: by the regions so far, without their inputs and random numbers?"""
        with torch._C.DisableTorchFunction():
            made = self._results.at.get(place_of(real_of(tensor))) if is_strided(real_of(tensor)) else None
        return made is not None and made.run < len(self._runs) and is_constant(self._runs[made.run].graph, made.number)

    def ran(self, graph: Graph, inputs: list[tuple[int, Any]], values: list[Any], scalars: list[float]) -> None:
        """A region, or what there was of it, has been run."""
        results, number = self._results, len(self._runs)
        with torch._C.DisableTorchFunction():
            came = [(n, results.at.get(place_of(t), t)) for n, t in inputs]
            results.foreign |= {serial_of(t) for _, t in came if not isinstance(t, Made)}
            for value in graph.outputs:
                results.add(values[value.id], Made(number, value.id))
        self._open = Run(graph, (), len(values), list(scalars)), came

    def closed(self, graph: Graph) -> None:
        """A region has ended."""
        run, inputs = self._open or (None, [])
        self._open = None
        if run is None or len(run.graph.ops) != len(graph.ops):
            # Its ops were run one by one, all or some of them.
            run, inputs = Run(graph), []
        self._runs.append(run)
        self._inputs.append(inputs)

    def record(self, returned: Any, gone: Callable[[Any], Any]) -> Record:
        """What the call did: its last region has ended."""
        # All of it: the lane still looks at calls, and to ask 30 tensors what they are is 90 of them, at 3 ms.
        with torch._C.DisableTorchFunction():
            modules = [module for reference in self._modules.values() if (module := reference()) is not None]
            surroundings = Surroundings(modules, self._optimizers.values(), gone)
            record = Record(self._runs, surroundings, self._before.numbers)
            try:
                self._describe(record, returned)
            except Unclear as reason:
                self._refuse(str(reason))
            if outlive_calls() and any(casts_down(run.graph) for run in self._runs):
                self._refuse("autocast keeps its casts for the block around the call: a block of its own, inside, ends with it")
            record.complete = all(run.wiring is not None for run in self._runs) and self._before.knew(record)
        record.reason = self.reason
        return record

    def _describe(self, record: Record, returned: Any) -> None:
        if not self._runs:
            raise Unclear("nothing was recorded in it")
        if record.surroundings.hooked():
            raise Unclear("a hook on a module or on an optimizer's step runs in it")
        if any(run.wiring is None for run in self._runs):
            return
        storages = {serial_of(real_of(t)) for t in self._arguments}
        if any(serial_of(t) in storages for t in record.surroundings.tensors()):
            raise Unclear("an argument shares memory with a parameter, a buffer or a piece of optimizer state")
        came = [t for inputs in self._inputs for _, t in inputs if not isinstance(t, Made)]
        gradients = self._before.gradients()
        origins = Origins(self._arguments, gradients, self._results, record.surroundings, self._roots)
        counts = [count for counts in self._counted for count in counts.counts]
        origins.look_for([*came, *counts, *(tensor for _, tensor, *_ in self._counters)])
        self._check_order(came, counts)
        for run, inputs in zip(self._runs, self._inputs, strict=True):
            run.wiring = tuple((n, t if isinstance(t, Made) else origins.of(t)) for n, t in inputs)
        record.returned = origins.tree(returned)
        leaves = leaves_in([*came, *record.surroundings.tensors()])
        if any(leaf._backward_hooks or leaf._post_accumulate_grad_hooks for leaf in leaves):
            raise Unclear("a hook on a parameter runs in its backward")
        record.leaves = [self._leaf(leaf, origins) for leaf in leaves]
        record.counters = [Counter(f, origins.outside(t), args, kwargs) for f, t, args, kwargs in self._counters]
        record.counted = self._all_counted(origins)
        record.bumps = self._before.bumps(origins)
        record.paths = origins.paths
        if self._before.numbers and record.surroundings.numbers != self._before.numbers:
            raise Unclear("it changes the hyperparameters of its optimizer; let a scheduler step outside of it")

    def _check_order(self, came: list[Any], counts: list[Any]) -> None:
        """Without Python the counts are read before all else and go on after it, which is to make no difference."""
        counters = {serial_of(tensor) for _, tensor, *_ in self._counters}
        steps = set(map(serial_of, counts))
        if not counters.isdisjoint(steps):
            raise Unclear("it changes the steps that its optimizer has counted")
        if not (counters | steps).isdisjoint(map(serial_of, came)):
            raise Unclear("a number that is counted on the host is read or written by what is recorded")

    def _all_counted(self, origins: Origins) -> list[Counted]:
        found: list[Counted] = []
        seen: list[set[Any]] = []
        for it in self._counted:
            # By memory: two tensors may be one number.
            places, counts = {place_of(t)[:2] for t in it.counts}, tuple(map(origins.outside, it.counts))
            before = [one.counts for one, others in zip(found, seen, strict=True) if not others.isdisjoint(places)]
            if len(places) < len(counts) or any(other != counts for other in before):
                raise Unclear("some of its parameters share a count of steps")
            seen.append(places)
            floats = {name: number for name, number in it.options.items() if type(number) is float}
            others = tuple((name, number) for name, number in it.options.items() if type(number) is not float)
            steps = [step - len(before) for step in it.steps]
            found.append(Counted(it.name, counts, it.pattern, len(before), others, floats, steps))
        return found

    def _leaf(self, leaf: Any, origins: Origins) -> Leaf:
        origin, before, now = origins.of(leaf), self._before.gradient(leaf), leaf.grad
        assert isinstance(origin, (Argument, Outside))
        if now is None or now is before:
            return Leaf(origin, before is not None, None if now is None else KEPT, 0)
        if now.requires_grad:
            raise Unclear("a gradient has a graph of its own")
        return Leaf(origin, self._before.had(leaf), origins.of(real_of(now)), version_of(now))

    def _refuse(self, reason: str) -> None:
        self.reason = self.reason or reason


class Before:
    """What the last record names, and the arguments' tensors, as they were when the call began."""

    def __init__(self, reals: Sequence[Any], known: Record | None) -> None:
        outside = [] if known is None else known.outside()
        self._known = known
        self._versions = {id(t): (t, version_of(t)) for t in (*reals, *outside)}
        # Weakly: what nobody holds any more need not be moved out of a graph's way.
        self._gradients = {
            id(leaf): (leaf, None if leaf.grad is None else weakref.ref(leaf.grad)) for leaf in leaves_in([*reals, *outside])
        }
        self.numbers = [] if known is None else known.surroundings.hyperparameters()

    def knew(self, record: Record) -> bool:
        """Was all noted that the call has turned out to be about?"""
        return self._known is not None and all(id(t) in self._versions for t in record.outside())

    def gradients(self) -> list[tuple[Any, Any]]:
        """Leaves that had a gradient, and that, weakly."""
        return [(leaf, reference) for leaf, reference in self._gradients.values() if reference is not None]

    def gradient(self, leaf: Any) -> Any:
        """The gradient that a leaf had, if it is still there."""
        _, reference = self._gradients.get(id(leaf), (None, None))
        return None if reference is None else reference()

    def had(self, leaf: Any) -> bool:
        """Did a leaf have a gradient?"""
        return self._gradients.get(id(leaf), (None, None))[1] is not None

    def bumps(self, origins: Origins) -> list[tuple[Argument | Outside, int]]:
        """Which tensors were written, and how often."""
        found = []
        for tensor, version in self._versions.values():
            if n := version_of(tensor) - version:
                origin = origins.of(tensor)
                if not isinstance(origin, (Argument, Outside)):
                    raise Unclear("it writes a tensor in memory that it has also made")
                found.append((origin, n))
        return found
