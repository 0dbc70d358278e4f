"""Two parts of a region by plans that fit together, and what the first of them leaves for the second."""

from collections.abc import Callable
from typing import Any

import torch

from kitsune.dispatch import below_autograd
from kitsune.ir import Graph, Op, n_values
from kitsune.ready import Ready
from kitsune.runtime.calls import call
from kitsune.scheduler import Pair, Restoring


class Joined:
    """Two parts by plans that fit together, ready to run."""

    def __init__(self, pair: Pair, first: Ready, second: Ready) -> None:
        self.pair, self.first, self.second = pair, first.graph, second.graph
        self.readies = first, second
        self.compiling = [*first.compiling, *second.compiling]
        first.compiling, second.compiling = [], []
        # Operators that are to be run once before, a few at a time.
        self.to_try: list[Op] = []
        self.restoring = Restoring(pair, self.first)
        self.n_values = max(n_values(self.first), n_values(self.second))
        seen = {v.id for v in pair.first.outputs} - pair.kept
        came = {v.id for v in pair.first.inputs}
        self.handed = tuple(v.id for v in self.first.outputs if v.id not in seen)
        # Of what came in for the first part, what is needed once more: the program may not hold it any longer.
        self.again = tuple(({v.id for v in self.second.inputs} | self.restoring.given.keys()) & (came | seen))
        self.n_runs = self.n_restored = 0
        # Has the second part been run?
        self.follows = False


class Left:
    """What a first part has left for the second: see `kitsune.ir.Carried`."""

    def __init__(
        self, joined: Joined, values: list[Any], scalars: list[float], stands: Callable[[], bool], relieve: Callable[[], None]
    ) -> None:
        self.joined = joined
        self._stands, self._relieve, self._scalars = stands, relieve, scalars
        self._tensors = {n: values[n] for n in (*joined.handed, *joined.again)}

    def goes_to(self, graph: Graph) -> bool:
        """Is this the graph that it was left for, and can that be run so now?"""
        return graph is self.joined.pair.second and self._stands()

    def put(self, values: list[Any]) -> None:
        """Put it in for the second part."""
        values.extend([None] * (self.joined.n_values - len(values)))
        for number, tensor in self._tensors.items():
            values[number] = tensor

    def restored(self) -> dict[int, torch.Tensor]:
        """What was kept, by number, as it was recorded. Raises torch.OutOfMemoryError."""
        self.joined.n_restored += 1
        try:
            return self._made_again()
        except torch.OutOfMemoryError:
            pass
        # Outside of the handler: the error would keep alive what was made until then.
        self._relieve()
        return self._made_again()

    def _made_again(self) -> dict[int, torch.Tensor]:
        restoring, values = self.joined.restoring, [None] * n_values(self.joined.pair.first)
        with below_autograd(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            for number, value in restoring.given.items():
                values[number] = _laid_out(self._tensors[number], value.type.stride)  # type: ignore[call-overload]
            for op in restoring.ops:
                call(op, values, self._scalars)
        return {number: values[number] for number in restoring.kept}  # type: ignore[misc]


def _laid_out(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
