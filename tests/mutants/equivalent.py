"""Mutants that no test can find, each with the reason: what they compute is the same, or only another way to the same end."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {
    (
        'kitsune/codegen/windows.py Windows._backward: f" & (i{self.at[3]} + {padding[1]} - x * {stride[1]} < '
        "{size[1]})\" -> f' & (i{self.at[3]} + {padding[1]} - x * {stride[1]} <= {size[1]})'"
    ): ("a window that ends just before a place has its largest elsewhere, as the position that is compared next says"),
    (
        "kitsune/scheduler/streams.py assign_streams: sorted(n for other, n in frontier.items() if other != stream) -> "
        "(list((n for other, n in frontier.items() if other != stream)))"
    ): ("a launch waits for all of these before it starts, in whatever order they are listed"),
    (
        "kitsune/scheduler/joining.py _Joins._join: {whole.storage, *(v.storage for v in parts)} -> ({*(v.storage for v"
        " in parts)})"
    ): ("the write to a joined tensor is one of its readers, so that no copy of it is left out, and it is not its own then"),
    (
        "kitsune/scheduler/made_again.py _rewritten: any(v.id not in known for v in graph.ops[n].results) -> "
        "(all((v.id not in known for v in graph.ops[n].results)))"
    ): ("an op that is made again has all of its results made again, so that none or all are known, and it has one at least"),
    "kitsune/scheduler/made_again.py _Search._recipe: sorted(ops) -> (list(ops))": (
        "the ops of several recipes are joined in a set, and sorted, where they are put in; before, only their number counts"
    ),
    "kitsune/scheduler/formats.py _compare (1): 1 -> 2": ("only the sign of what is returned is looked at"),
    "kitsune/codegen/rules_math.py _literal_power: f\"tl.where({x} == {x}, 1.0, 1.0)\" -> f'tl.where({x} != {x}, 1.0, 1.0)'": (
        "both branches are one: the condition only gives the constant the operand's shape"
    ),
    "kitsune/scheduler/split.py split_reductions: not any(op.kind is Kind.REDUCTION for op in graph.ops) -> False": (
        "of a graph without reductions nothing is cut, and every op is put into the copy; to look first saves time"
    ),
    "kitsune/scheduler/channels_last.py _pointwise: 1 -> 2": (
        "the operators that keep strides have one tensor among their operands"
    ),
}
