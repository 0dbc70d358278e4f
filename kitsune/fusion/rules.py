"""What a context allows the planner to fuse: a `FusionConfig` and registered patterns, as a law on ops."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from kitsune.fusion.config import FusionConfig
from kitsune.fusion.group import MAX_OPS
from kitsune.fusion.patterns import FusionDetector, FusionPattern
from kitsune.ir import Graph, Kernel, Op

Law = Callable[[Op], str | None]
# By kernel, as `benefit_key` names it: how many times as fast as its ops it was measured to be, once in a process.
MEASURED: dict[Hashable, float] = {}


@dataclass(frozen=True)
class Rules:
    """`config` None allows what the planner can do. Ops of a registered pattern are exempt from the switches."""

    config: FusionConfig | None = None
    patterns: tuple[FusionPattern, ...] = ()

    @property
    def max_ops(self) -> int:
        """Operators in a kernel, at most."""
        return MAX_OPS if self.config is None else min(MAX_OPS, self.config.max_fusion_size)

    @property
    def min_benefit(self) -> float:
        """How many times as fast a kernel must be; 0 if none is measured."""
        return 0.0 if self.config is None else self.config.min_fusion_benefit

    def law(self, graph: Graph, base: Law) -> Law:
        """`base`, and beyond that what the switches forbid in this graph."""
        config = self.config
        if config is None:
            return base
        matches = FusionDetector(self.patterns).detect(graph) if self.patterns else ()
        exempt = {id(graph.ops[number]) for match in matches for number in match.numbers}

        def why_not(op: Op) -> str | None:
            return base(op) or (None if id(op) in exempt else config.why_not(op))

        return why_not

    def pays(self, kernel: Kernel) -> bool:
        """False for a kernel that was measured, and is not fast enough."""
        if not self.min_benefit:
            return True
        measured = MEASURED.get(benefit_key(kernel))
        return measured is None or measured >= self.min_benefit


# What `kitsune.accelerate()` asks for: whatever the planner can do.
ANYTHING = Rules()


def benefit_key(kernel: Kernel) -> Hashable:
    """Equal for kernels that do the same to tensors of the same shapes and layouts, on the same device."""
    accesses = (*kernel.loads, *(store.access for store in kernel.stores))
    walked = tuple((access.value.type.dtype, access.value.type.device, access.strides) for access in accesses)
    return kernel.domain, kernel.reduced, walked, tuple(step.op.target for step in kernel.steps)
