"""Regions that go on behind a cut, by plans of both parts that were made as one: the second reads what the first leaves.

Each part is known to the runner in two ways: as it was recorded, which needs nothing of the other, and as it was made with the
other. The second way is taken by both or by none. Where something else follows the first part than was expected, what it should
have kept is made again from what it has left.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from kitsune.background import later
from kitsune.codegen import WorkerFailed
from kitsune.config import config
from kitsune.fusion import ANYTHING
from kitsune.ir import Graph, Handover, Op
from kitsune.joined import Joined, Left
from kitsune.planning import Planner
from kitsune.ready import by_plan, runs_by_ops
from kitsune.scheduler import Pair
from kitsune.shown import show_pair, shows

# Times that what was kept had to be made again, from which on the parts go separate ways if that is one run in so many.
MOST_RESTORED, RESTORED_OF = 3, 16
# Runs of a first part with which a second one is known, after which plans are made of both.
ASK_AFTER = 3
# Times in a row that another part comes second until it is the one that is expected, and how often that may change.
IN_A_ROW, MOST_CHANGES = 2, 3


@dataclass(slots=True, eq=False)
class Known:
    """What is known of a pair: how it is run, once that is there, or that its parts go separate ways."""

    pair: Pair
    coming: "Future[Joined | None] | None" = None
    joined: Joined | None = None
    refused: bool = False
    # Times in a row that something else has followed the first, and those that it was taken for the second from then on.
    n_others: int = 0
    n_changes: int = 0
    # Runs of the first part. The runner, which asks for plans, does not see those that are but replays.
    n_firsts: int = 0

    def to_try(self) -> list[Op]:
        """What is to be tried out before what has come may be run."""
        joined = None
        if self.coming is not None and self.coming.done() and self.coming.exception() is None:
            joined = self.coming.result()
        return [] if joined is None else joined.to_try


@dataclass
class Pairs:
    """The pairs of one runner."""

    runner: Any
    known: dict[tuple[Graph, frozenset[int]], Known] = field(default_factory=dict)

    def begin(self, graph: Graph, values: list[Any], handover: Handover) -> Graph:
        """What is run in the place of a part; `values` gets what that reads of the part before."""
        if handover.first is None:
            handover.first = graph
            joined = self._joined(graph, handover.kept)
            if joined is None:
                return graph
            values.extend([None] * (joined.n_values - len(values)))
            return joined.first
        left = handover.carried
        if not isinstance(left, Left) or graph is not left.joined.pair.second:
            return graph
        left.put(values)
        self._follow(left.joined)
        return left.joined.second

    def end(self, graph: Graph, ran: Graph, values: list[Any], scalars: list[float], handover: Handover) -> None:
        """A part has been run, as the graph `ran`."""
        first, kept = handover.first, handover.kept
        assert first is not None
        known = self.known.get((first, kept))
        if graph is not first:
            if known is not None and known.pair.second is graph:
                known.n_others = 0
            elif known is None or not known.refused:
                self._meet(known, handover, graph, values)
        elif known is not None:
            known.n_firsts += 1
            if (joined := known.joined) is not None and ran is joined.first:
                joined.n_runs += 1
                handover.carried = Left(joined, values, scalars, lambda: self.stands(joined), lambda: self.runner.relieve(True))
            elif known.n_firsts == ASK_AFTER and not known.refused:
                self._ask(known)
        if known is not None and (to_try := known.to_try()):
            self.runner.thread_plans.go_on(to_try)

    @property
    def are_made(self) -> bool:
        """Does the runner make plans that are free to be of two parts?"""
        return self.runner.executor is not None and self.runner.options.fuses and self.runner.options.rules == ANYTHING

    def stands(self, joined: Joined) -> bool:
        """Can both parts be run so, as knobs and torch's settings are?"""
        first, *rest = self.runner.key(joined.first)
        return not config.check and all((graph, *rest) in self.runner.ready for graph in (first, joined.second))

    def takes(self, graph: Graph) -> bool:
        """Is a graph part of a pair? Then what is made in the background is made of both."""
        mine = [one for one in self.known.values() if not one.refused and graph in (one.pair.first, one.pair.second)]
        for known in mine:
            self._ask(known)
        return bool(mine)

    def forget(self) -> None:
        """Drop every pair."""
        for known in self.known.values():
            if known.coming is not None:
                known.coming.cancel()
        self.known.clear()

    def spread_nothing(self) -> None:
        """What is there now is run next time."""
        for known in list(self.known.values()):
            if known.coming is not None and (to_try := known.to_try()):
                self.runner.thread_plans.make_all(to_try)
                to_try.clear()

    def _joined(self, graph: Graph, kept: frozenset[int]) -> Joined | None:
        known = self.known.get((graph, kept))
        if known is None:
            return None
        if known.coming is not None and known.coming.done() and not known.to_try():
            self._arrive(known)
        joined = known.joined
        if joined is None or not self.stands(joined):
            return None
        if joined.n_restored >= MOST_RESTORED and joined.n_restored * RESTORED_OF > joined.n_runs:
            self._refuse(known)
            return None
        return joined

    def _meet(self, known: Known | None, handover: Handover, graph: Graph, values: list[Any]) -> None:
        """Something new has come behind a first part, of which so much is known."""
        first, kept = handover.first, handover.kept
        assert first is not None
        if not any(v.id in kept for v in graph.inputs):
            return
        own = frozenset(v.storage for v in first.inputs if isinstance(values[v.id], torch.nn.Parameter))
        pair = Pair(first, kept, graph, own)
        if known is None:
            self.known[pair.first, pair.kept] = Known(pair)
            return
        known.n_others += 1
        if known.n_others < IN_A_ROW:
            return
        if known.n_changes == MOST_CHANGES:
            return self._refuse(known)
        self._part(known)
        met = self.known[pair.first, pair.kept] = Known(pair, n_changes=known.n_changes + 1)
        self._ask(met)

    def _ask(self, known: Known) -> None:
        """Have the plans read or made."""
        if known.joined is not None or known.coming is not None:
            return
        planner = self.runner.planner()
        if self.runner.in_background():
            known.coming = later(lambda: self._made(known.pair, planner))
            return
        known.coming = Future()
        try:
            known.coming.set_result(self._made(known.pair, planner)[0])
        except Exception as error:
            known.coming.set_exception(error)

    def _made(self, pair: Pair, planner: Planner) -> tuple[Joined | None, list[Future[Any]]]:
        runner = self.runner
        if runner.coming is not None:
            readies = runner.coming.planned_pair(pair, planner)
        else:
            plans = show_pair(pair, planner)
            readies = plans and tuple(by_plan(plan, runner.executor, runner.device) for plan in plans)
        if readies is None:
            return None, []
        joined = Joined(pair, *readies)
        if runner.coming is not None:
            joined.to_try = [op for ready in joined.readies for op in runner.coming.to_try(ready)]
        return joined, joined.compiling

    def _arrive(self, known: Known) -> None:
        """The plans are there, or will not be. An interrupt leaves it to be done again."""
        runner, pair, joined = self.runner, known.pair, None
        assert known.coming is not None
        try:
            joined = known.coming.result()
            for error in [future.exception() for future in (joined.compiling if joined else ())]:
                if isinstance(error, WorkerFailed):
                    raise error
        except WorkerFailed:
            # It is told of the parts, whose kernels are mostly the same.
            joined = None
        except Exception as error:
            if config.verify:
                known.coming = None
                raise
            runner.sentences.append(runs_by_ops(pair.whole, error))
        if joined is None:
            return self._refuse(known)
        for ready in joined.readies:
            runner.ready[runner.key(ready.graph)] = ready
            if config.debug and ready.plan is not None:
                shows().fused(ready.n_ops, ready.plan.n_kernels)
        self._take_over(joined.first, pair.first)
        known.joined, known.coming = joined, None
        if runner.coming is not None:
            runner.coming.keep(runner.ready.values())

    def _follow(self, joined: Joined) -> None:
        """The second part is about to be run, by what the first one has left where it now is."""
        if not joined.follows:
            joined.follows = True
            self._take_over(joined.second, joined.pair.second, joined.first)

    def _take_over(self, graph: Graph, before: Graph, source: Graph | None = None) -> None:
        """A graph is to be run in the place of another one: what is known of that one's inputs stays known."""
        runner = self.runner
        if runner.steady is None or not runner.options.captures:
            return
        now, known = runner.ready.get(runner.key(graph)), runner.ready.get(runner.key(before))
        first = None if source is None else runner.ready[runner.key(source)].steady
        if now is not None and known is not None and known.steady is not None:
            now.steady = runner.steady_of(now, known.steady, first)

    def _refuse(self, known: Known) -> None:
        """Let the parts go separate ways from here on."""
        self._part(known)
        known.refused, runner = True, self.runner
        for part in (known.pair.first, known.pair.second):
            if (ready := runner.ready.get(runner.key(part))) is not None:
                runner.ask(part, ready)

    def _part(self, known: Known) -> None:
        """Run the parts as they were recorded."""
        pair, joined, known.joined, known.coming = known.pair, known.joined, None, None
        if joined is not None:
            for half, part in ((joined.first, pair.first), (joined.second, pair.second)):
                self._take_over(part, half)
                self.runner.ready.pop(self.runner.key(half), None)
