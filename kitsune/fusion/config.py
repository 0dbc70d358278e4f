"""`FusionConfig`: which families of operators are fused, how many at once, and from which measured benefit on."""

from __future__ import annotations

from dataclasses import dataclass

from kitsune.accepts import Accepts, accepted, flag, whole
from kitsune.ir import Kind, Op


def _check_benefit(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError
    return float(value)


ACCEPTS = {
    "enable_elementwise": flag,
    "enable_reduction": flag,
    "enable_matmul": flag,
    "max_fusion_size": whole(1),
    "min_fusion_benefit": Accepts("a number of 0 or more, such as 1.2 for 1.2 times as fast", _check_benefit),
}
# The switch of each kind of operator that a kernel may hold.
SWITCHES = {
    Kind.POINTWISE: "enable_elementwise",
    Kind.REDUCTION: "enable_reduction",
    Kind.GEMM: "enable_matmul",
}


@dataclass(frozen=True)
class FusionConfig:
    """What may be fused.

    The three switches are for elementwise operators, reductions (sums, softmax, norms with statistics) and matrix products
    with what surrounds them. A kernel holds at most `max_fusion_size` operators. `min_fusion_benefit` is measured: where
    kernels run, each one is timed once against its operators run one by one, and is not used if it is less than so many times
    as fast. Without this object (`kitsune.accelerate()`) kernels hold up to 64 operators, and none is timed.
    """

    enable_elementwise: bool = True
    enable_reduction: bool = True
    enable_matmul: bool = False
    max_fusion_size: int = 8
    min_fusion_benefit: float = 1.1

    def __post_init__(self) -> None:
        for name, accepts in ACCEPTS.items():
            object.__setattr__(self, name, accepted(name, getattr(self, name), accepts))

    def why_not(self, op: Op) -> str | None:
        """Why an operator's family is not to be fused; None if it may be."""
        switch = SWITCHES.get(op.kind)
        if switch is None or getattr(self, switch):
            return None
        return f"FusionConfig({switch}=False) keeps {op.target._opname} out of kernels"
