"""From a region's Graph to its Plan, stage by stage: passes -> kernels -> batches -> order -> streams -> arena."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch

from kitsune.codegen import (
    HALF,
    is_window,
    keeps_rows,
    text_key,
    tile_of,
    toolkit_libdevice,
    why_not_batched,
    why_not_exact,
    why_not_lowered,
)
from kitsune.config import config
from kitsune.fusion import ANYTHING, Partition, Rules, batch, gather, in_long_rows, in_rows, kernels_of, partition
from kitsune.ir import Graph, Kernel, Kind, Launch, Op, Plan, Tile, happens_before, reads_slots, verify, verify_plan
from kitsune.memory import Lifetime, assign_offsets, lifetimes, peak_bytes
from kitsune.runtime import out_form, takes_memory
from kitsune.scheduler import (
    RATES,
    Costs,
    Pair,
    Work,
    assign_streams,
    awaited_first,
    batch_norms,
    bias_gradients,
    common_subexpressions,
    cross_entropies,
    dead_code,
    fleeting,
    in_channels_last,
    in_order,
    joined_in_place,
    kernel_micros,
    layer_norm_backwards,
    made_again,
    op_micros,
    padded_products,
    parts,
    patches_as_rows,
    pools,
    prepared,
    run_passes,
    split_reductions,
    unlist,
)

Show = Callable[[str, Graph, float], None]


def no_tile(launch: Launch) -> None:
    """The first choice for each launch."""


@dataclass(frozen=True)
class Planner:
    """How graphs are planned: for which device, at which costs, with how many fusions."""

    costs: Costs
    fuel: int | None = None
    verify: bool = False
    # Is the math library there that eager was built with? Without it fewer ops keep eager's bits.
    toolkit: bool = True
    # Are ops that take a moving number to be kernels, which can read it from memory? A library call has it baked in.
    slots_in_kernels: bool = False
    # May values that live and die inside have other layouts than eager gives them?
    layouts: bool = True
    # Passes beside those that every plan needs.
    shared: tuple[Callable[[Graph], Graph], ...] = (common_subexpressions,)
    # Of a CUDA graph; what is run in the ordinary way goes to one.
    n_streams: int = 1
    # What the context allows beyond what the planner can do.
    rules: Rules = ANYTHING
    # Which tile a launch of kernels has, where it is not the first choice.
    tiles: Callable[[Launch], Tile | None] = no_tile
    # As the knob has it. In "strict" a reduction may be a kernel, whose order of summation is its own; in "fast" a kernel rounds
    # to 16 bits only what it stores, and an op may be in one whose rule is near eager's and not equal.
    numerics: str = "bitwise"
    # Only deterministic algorithms are allowed: what eager refuses then is left to eager.
    deterministic: bool = False

    def plan(self, graph: Graph, show: Show | None = None) -> Plan:
        """The plan of a graph; `show` hears of each pass."""
        first = (awaited_first,) if graph.awaited else ()
        return self._decided(run_passes(graph, (*first, *self._passes()), self.verify, show), graph)

    def plan_pair(self, pair: Pair, show: Show | None = None) -> tuple[Plan, Plan] | None:
        """The plans of two parts of a region that are prepared as one; None where each is to be planned by itself."""
        passes = self._passes(fleeting(pair))
        halves = prepared(pair, lambda graph: run_passes(graph, passes, self.verify, show))
        if halves is None:
            return None
        first, second = (run_passes(half, (awaited_first,) if half.awaited else (), self.verify) for half in halves)
        if self.verify:
            verify(first)
            verify(second)
        return self._decided(first, pair.first), self._decided(second, pair.second)

    def _passes(self, fleeting: frozenset[int] = frozenset()) -> tuple[Callable[[Graph], Graph], ...]:
        def made_again(graph: Graph) -> Graph:
            return self.made_again(graph, fleeting)

        layouts = (self.patches_taken_apart, self.convolutions_laid_out, self.joined_in_place, self.products_padded)
        ready = (dead_code, *self.shared, self.lists_taken_apart)
        return (*ready, *(layouts if self.layouts else ()), self.reductions_taken_apart, made_again)

    def _decided(self, planned: Graph, graph: Graph) -> Plan:
        """The plan of a graph that has been through the passes; `graph` is what was recorded."""
        law = self.rules.law(planned, self.why_not_fused)
        parts = partition(planned, law, self.costs.joining, self.fuel, self.rules.max_ops)
        gather(parts, keeps_rows)
        kernels = {n: self._rounding(self._walking(kernel)) for n, kernel in kernels_of(parts).items()}
        batches = batch(parts, kernels, _batch_key, lambda kernel: self.costs.batching(kernel) and self.rules.pays(kernel))
        works = [work for n in parts.living() for work in self._works(parts, kernels, batches, n)]
        in_turn = in_order(planned, works, self._micros(planned))
        lives = lifetimes(planned, in_turn, takes_memory)
        launches = assign_streams(in_turn, planned, self.costs.load, self.n_streams, peak_bytes(lives, len(in_turn)))
        before = happens_before(launches)
        offsets, arena = assign_offsets(lives, before)
        living = dead_code(graph).ops
        plan = Plan(
            graph=planned,
            launches=launches,
            offsets=offsets,
            arena=arena,
            drops=_drops(planned, lives, offsets, len(launches)),
            refusals=tuple(parts.refusals),
            n_recorded=len(graph.ops),
            n_unplanned=sum(op.kind is not Kind.VIEW for op in living),
            n_dead=len(graph.ops) - len(living),
            awaited=graph.awaited,
            outside=peak_bytes([life for life in lives if life.storage not in offsets], len(launches)),
        )
        if self.verify:
            verify_plan(plan)
        return plan.with_tiles(self.tiles)

    def lists_taken_apart(self, graph: Graph) -> Graph:
        """The pass that gives each tensor of a list call an op of its own, of which some may be needed by nobody."""
        return dead_code(unlist(graph, self.why_not_fused))

    def patches_taken_apart(self, graph: Graph) -> Graph:
        """The pass that makes convolutions over patches matrix products."""
        return patches_as_rows(graph, self.costs)

    def convolutions_laid_out(self, graph: Graph) -> Graph:
        """The pass that has convolutions, and what is between them, in channels-last."""
        return in_channels_last(graph, self.costs)

    def joined_in_place(self, graph: Graph) -> Graph:
        """The pass that writes the parts of joined tensors where they end up."""
        return joined_in_place(graph, self.costs, self.why_not_fused)

    def products_padded(self, graph: Graph) -> Graph:
        """The pass that makes matrix products with odd dimensions larger."""
        return padded_products(graph, self.costs, self.why_not_fused)

    def reductions_taken_apart(self, graph: Graph) -> Graph:
        """The pass that makes ops of which each reduces the same dimensions throughout, and fills the device."""
        if self.numerics == "bitwise":
            return graph
        if not self.deterministic:
            graph = pools(graph, self.costs.windows, self.why_not_fused)
        graph = bias_gradients(cross_entropies(graph, self.why_not_fused), self.why_not_fused)
        graph = layer_norm_backwards(batch_norms(graph, self.why_not_fused), self.why_not_fused)
        return dead_code(split_reductions(graph, parts, self.why_not_fused))

    def made_again(self, graph: Graph, fleeting: frozenset[int] = frozenset()) -> Graph:
        """The pass that makes values again where they are read, instead of keeping them."""
        return dead_code(made_again(graph, self.why_not_fused, self.costs, fleeting))

    def why_not_fused(self, op: Op) -> str | None:
        """Why an op may be in no kernel: there is no rule for it, or its rule would not keep eager's bits."""
        if op.kind is Kind.REDUCTION and self.numerics == "bitwise":
            return f"{op.target} is a reduction, and numerics='bitwise' keeps eager's order of summation"
        return why_not_lowered(op) or (None if self.numerics == "fast" else why_not_exact(op, self.toolkit))

    def _walking(self, kernel: Kernel) -> Kernel:
        """A kernel in the order in which it is best walked."""
        if len(kernel.steps) == 1:
            return kernel
        rows, long = in_rows(kernel), in_long_rows(kernel)
        if rows is not None and self.costs.in_rows(kernel):
            return rows
        return kernel if long is None or not self.costs.in_long_rows(kernel) else long

    def _rounding(self, kernel: Kernel) -> Kernel:
        """A kernel that rounds to 16 bits where its grade of numerics has it: in "fast", what it stores, and nothing else."""
        halves = any(v.type.dtype in HALF for step in kernel.steps for v in step.op.outputs)
        return replace(kernel, rounds=False) if self.numerics == "fast" and halves and not is_window(kernel) else kernel

    def _works(self, parts: Partition, kernels: dict[int, Kernel], batches: dict[int, list[int]], n: int) -> list[Work]:
        """What a node becomes: a launch, or calls of the library."""
        numbers = parts.nodes[n].numbers
        if n in batches:
            return [Work(tuple(numbers), tuple(kernels[m] for m in batches[n]))]
        if n in kernels and self._pays(parts, kernels[n]):
            return [Work(tuple(numbers), (kernels[n],))]
        return [Work((number,)) for number in numbers]

    def _pays(self, parts: Partition, kernel: Kernel) -> bool:
        """Is a kernel that is in no batch a launch of its own? One of a single op takes fuel, for its text may be wrong too."""
        if not self.rules.pays(kernel):
            return False
        wanted = self.slots_in_kernels and any(reads_slots(step.op) for step in kernel.steps)
        if not wanted and not self.costs.alone(kernel, _has_out_form(kernel)):
            return False
        if parts.fuel is None or len(kernel.steps) > 1:
            return True
        parts.fuel -= 1
        return parts.fuel >= 0

    def _micros(self, graph: Graph) -> Callable[[Work], float]:
        rates = self.costs.rates

        def micros(work: Work) -> float:
            if work.kernels:
                return rates.launch_us + sum(kernel_micros(kernel, rates) for kernel in work.kernels)
            return rates.launch_us + op_micros(graph.ops[work.numbers[0]], rates)

        return micros


@dataclass(frozen=True)
class SlotPlanner(Planner):
    """Plans for CUDA graphs of regions that are run op by op: kernels for the ops that take moving numbers only."""

    def why_not_fused(self, op: Op) -> str | None:
        """Why an op may be in no kernel."""
        return super().why_not_fused(op) if reads_slots(op) else f"{op.target} takes no number that moves"


def plan_for(graph: Graph, arch: str = "sm_90", show: Show | None = None) -> Plan:
    """The plan that a device of `arch` would get for a graph, wherever this runs."""
    return planner_for(arch).plan(graph, show)


def planner_for(arch: str, rules: Rules = ANYTHING, numerics: str | None = None, n_streams: int | None = None) -> Planner:
    """The planner with today's knobs, and a context's rules. Raises ValueError for an architecture of unknown rates."""
    if arch not in RATES:
        raise ValueError(f"Kitsune can plan for {' and '.join(RATES)}, not for {arch!r}.")
    toolkit = not torch.cuda.is_available() or toolkit_libdevice() is not None
    grade = numerics or config.numerics
    knobs = (config.fuel, config.verify, toolkit, config.graphs, config.layouts and grade != "bitwise")
    # A context may ask for more or fewer than usual; with the knob at 1 there are none beside the first.
    n = config.streams if n_streams is None or config.streams == 1 else n_streams
    strictly = torch.are_deterministic_algorithms_enabled()
    return Planner(Costs(RATES[arch]), *knobs, n_streams=n, rules=rules, numerics=grade, deterministic=strictly)


def slot_planner_for(arch: str, n_streams: int | None = None) -> SlotPlanner:
    """What plans CUDA graphs of regions that are run op by op."""
    planner = planner_for(arch, n_streams=n_streams)
    knobs = (None, planner.verify, planner.toolkit, True, False, (), planner.n_streams)
    return SlotPlanner(planner.costs, *knobs, numerics="bitwise")


def _has_out_form(kernel: Kernel) -> bool:
    """Can every op of a kernel be a library call on memory that it is given?"""
    return all(step.op.rewritten or out_form(step.op) is not None for step in kernel.steps)


def _batch_key(kernel: Kernel) -> Hashable | None:
    return (text_key(kernel), tile_of(kernel)) if why_not_batched(kernel) is None else None


def _drops(graph: Graph, lives: list[Lifetime], offsets: dict[int, int], n_launches: int) -> tuple[tuple[int, ...], ...]:
    """For each launch the storages outside of the arena, and not returned, that nobody uses any more after it."""
    returned = {v.storage for v in graph.outputs}
    drops: list[list[int]] = [[] for _ in range(n_launches)]
    for life in lives:
        if life.storage not in offsets and life.storage not in returned:
            drops[life.uses.bit_length() - 1].append(life.storage)
    return tuple(map(tuple, drops))
