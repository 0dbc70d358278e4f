"""Horizontal fusion: kernels with one source and no order between them are started together, as one launch.

The casts of all weights of a model and the update of all its parameters are of this kind.
"""

from collections.abc import Callable, Hashable, Mapping

from kitsune.fusion.grouping import Partition, contract
from kitsune.ir import Kernel


def batch(
    p: Partition,
    kernels: Mapping[int, Kernel],
    key_of: Callable[[Kernel], Hashable | None],
    worth: Callable[[Kernel], bool],
) -> dict[int, list[int]]:
    """Nodes that are started together, by the first of them. `key_of` is None for a kernel that must be launched alone."""
    alike: dict[Hashable, list[int]] = {}
    for n, kernel in kernels.items():
        key = key_of(kernel)
        if key is not None and worth(kernel):
            alike.setdefault(key, []).append(n)
    batches: dict[int, list[int]] = {}
    for waiting in alike.values():
        while len(waiting) > 1:
            together, waiting = _independent(p, waiting)
            if p.fuel is not None:
                together = together[: p.fuel + 1]
                p.fuel -= len(together) - 1
            if len(together) > 1:
                batches[together[0]] = together
                contract(p, together[0], together[1:])
    return batches


def _independent(p: Partition, nodes: list[int]) -> tuple[list[int], list[int]]:
    """Nodes of which none comes before another, greedily, and the rest."""
    chosen, rest = [], []
    mask = before = 0
    for n in nodes:
        if p.anc[n] & mask or before >> n & 1:
            rest.append(n)
        else:
            chosen.append(n)
            mask |= 1 << n
            before |= p.anc[n]
    return chosen, rest
