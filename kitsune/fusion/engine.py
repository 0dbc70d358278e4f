"""`FusionEngine`: the planner's fusion by hand, for a list of operator names, a function or module, or a recorded graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kitsune.accepts import accepted, flag
from kitsune.fusion.config import FusionConfig
from kitsune.fusion.patterns import BUILT_IN, FAMILIES, FusionDetector, FusionPattern, FusionType, Match, checked_ops
from kitsune.fusion.rules import MEASURED, Rules, benefit_key
from kitsune.ir import Graph, Kind, Plan


class Works(Protocol):
    """What the engine has others do; `kitsune.fusing` puts it together from the stages."""

    def plan(self, graph: Graph, rules: Rules) -> Plan:
        """The plan of a graph."""

    def record(self, names: Sequence[str]) -> tuple[Graph, list[int]]:
        """A graph that does what the names say, one after the other, and for each of its ops the number of the name."""

    def running(self, fn: Any, rules: Rules, seen: Callable[[Graph], None], took: Callable[[float], None]) -> Any:
        """The same function or module, run by plan; `seen` hears of its regions, `took` of the seconds of a call."""

    def with_attention(self, fn: Any) -> tuple[Any, int, str | None]:
        """With library attention for product, softmax, product; how many were found, and why none could be looked for."""


works: Works | None = None
# The name of a step that is a call of the library's attention.
ATTENTION = "attention"


@dataclass(frozen=True)
class FusedGroup:
    """Operators that are one launch: a kernel of ours, or a call of the library (always for a single operator)."""

    ops: tuple[str, ...]
    fusion_type: FusionType
    kernel: bool = False
    # The registered or built-in pattern that all of them are part of.
    pattern: str | None = None


@dataclass
class _Seen:
    """What an engine has planned so far."""

    plans: list[Plan] = field(default_factory=list)
    attentions: int = 0
    calls: int = 0
    seconds: float = 0.0
    refusals: list[str] = field(default_factory=list)


class FusionEngine:
    """Fuses with a `FusionConfig` and patterns of its own.

    `fuse` takes a list of operator names, a function or `nn.Module`, or a recorded `Graph`, and returns groups of names, the
    same function or module run by plan, or a `Plan`. With `enable_fusion=False` it returns what it was given, name by name.
    `profile=True` takes the time of the calls of what it returned; `get_fusion_stats` tells.
    """

    def __init__(self, config: FusionConfig | None = None, enable_fusion: bool = True, profile: bool = False) -> None:
        if config is not None and not isinstance(config, FusionConfig):
            raise ValueError(f"config={config!r} is not possible: config accepts a kitsune.fusion.FusionConfig or None.")
        self.config = config or FusionConfig()
        self.enable_fusion: bool = accepted("enable_fusion", enable_fusion, flag)
        self.profile: bool = accepted("profile", profile, flag)
        self.patterns: list[FusionPattern] = []
        self._graphs: dict[int, Graph] = {}
        self._seen = _Seen()

    @property
    def rules(self) -> Rules:
        """What the planner is told."""
        return Rules(self.config, tuple(self.patterns))

    def register_pattern(self, pattern: FusionPattern) -> None:
        """Match one more pattern, whatever the switches of the config say. A name stands for the last pattern given it."""
        if not isinstance(pattern, FusionPattern):
            raise TypeError(f"register_pattern takes a kitsune.fusion.FusionPattern, not {pattern!r}.")
        self.patterns = [*(one for one in self.patterns if one.name != pattern.name), pattern]

    def fuse(self, operations: Any) -> Any:
        """Fuse a list of names, a function or module, or a graph; see the class."""
        if isinstance(operations, Graph):
            return self._planned(operations)
        if callable(operations):
            return self._running(operations)
        names = checked_ops(operations, "operations")
        if not self.enable_fusion:
            return [_alone(name) for name in names]
        return self._groups(names)

    def get_fusion_stats(self) -> dict[str, Any]:
        """What came of everything that was fused so far.

        `num_fused` kernels of several operators; `efficiency`: the operators in them of all that the planner could put into
        kernels, 0 to 1; `kernels_before` and `kernels_after` launches; `measured_speedup` by kernel, empty where none ran.
        """
        seen = self._seen
        plans = [*seen.plans, *(self._plan(graph) for graph in self._graphs.values())]
        kernels = [kernel for plan in plans for launch in plan.launches for kernel in launch.kernels if len(kernel.steps) > 1]
        fusible = sum(op.kind in (Kind.POINTWISE, Kind.REDUCTION) for plan in plans for op in plan.graph.ops)
        fused = sum(len(kernel.steps) for kernel in kernels)
        stats = {
            "num_fused": len(kernels) + seen.attentions,
            "efficiency": min(1.0, fused / fusible) if fusible else 0.0,
            "kernels_before": sum(plan.n_unplanned for plan in plans),
            "kernels_after": sum(plan.n_launches for plan in plans),
            "measured_speedup": {kernel.name: MEASURED[key] for kernel in kernels if (key := benefit_key(kernel)) in MEASURED},
            "refusals": list(seen.refusals),
        }
        return {**stats, "calls": seen.calls, "seconds": seen.seconds} if self.profile else stats

    def _planned(self, graph: Graph) -> Plan:
        plan = self._plan(graph)
        self._seen.plans.append(plan)
        return plan

    def _plan(self, graph: Graph) -> Plan:
        assert works is not None
        return works.plan(graph, self.rules)

    def _running(self, fn: Any) -> Any:
        assert works is not None
        if not self.enable_fusion:
            return fn
        if any(pattern.is_attention for pattern in self.patterns):
            fn, n_found, refusal = works.with_attention(fn)
            self._seen.attentions += n_found
            if refusal is not None:
                self._seen.refusals.append(refusal)
        return works.running(fn, self.rules, self._note, self._took)

    def _note(self, graph: Graph) -> None:
        # By identity: a region that comes back has the same graph.
        self._graphs[id(graph)] = graph

    def _took(self, seconds: float) -> None:
        self._seen.calls += 1
        self._seen.seconds += seconds

    def _groups(self, names: tuple[str, ...]) -> list[FusedGroup]:
        """The names as the planner groups them, with attention as one call where that pattern is registered."""
        assert works is not None
        built_in = BUILT_IN if self.config.enable_matmul else ()
        matches = FusionDetector([*self.patterns, *built_in]).detect(names)
        attentions = [match.numbers for match in matches if match.pattern.is_attention]
        steps = sorted([*attentions, *((k,) for k in range(len(names)) if not any(k in found for found in attentions))])
        graph, step_of = works.record([ATTENTION if len(step) > 1 else names[step[0]] for step in steps])
        plan = self._planned(graph)
        number_of = {id(op): k for k, op in enumerate(graph.ops)}
        taken: dict[int, tuple[int, ...]] = {}
        for launch in plan.launches:
            if launch.kernels:
                inside = {step_of[number_of[id(op)]] for op in launch.ops if id(op) in number_of} - taken.keys()
                taken.update(dict.fromkeys(inside, tuple(sorted(inside))))
        groups = dict.fromkeys(taken.get(k, (k,)) for k in range(len(steps)))
        self._seen.attentions += len(attentions)
        return [_described(names, [n for k in group for n in steps[k]], group[0] in taken, matches) for group in groups]


def _described(names: Sequence[str], numbers: list[int], kernel: bool, matches: list[Match]) -> FusedGroup:
    ops = tuple(names[n] for n in numbers)
    match = next((match for match in matches if set(numbers) <= set(match.numbers)), None)
    if match is not None and match.pattern.is_attention:
        return FusedGroup(ops, FusionType.ATTENTION, kernel, match.pattern.name)
    families = {FAMILIES[op] for op in ops}
    family = next(one for one in (FusionType.MATMUL, FusionType.REDUCTION, FusionType.ELEMENTWISE) if one in families)
    return FusedGroup(ops, family, kernel, None if match is None else match.pattern.name)


def _alone(name: str) -> FusedGroup:
    return FusedGroup((name,), FAMILIES[name])
