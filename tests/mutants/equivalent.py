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
}
