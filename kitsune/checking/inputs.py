"""What a region begins with, kept so that it can begin again: memory that it writes, and the state of generators."""

from typing import Any

import torch

from kitsune.ir import Graph, n_values, storage_of

# The methods themselves: while a context is open the generator's are doors.
_get_state, _set_state = torch.Generator.get_state, torch.Generator.set_state
_set = torch.ops.aten.set_.source_Storage_storage_offset
_offset = torch._C.TensorBase.storage_offset


class Draws:
    """The state that random operators draw from."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.default_generator
        if device.type == "cuda":
            self._generator = torch.cuda.default_generators[device.index or 0]

    def now(self) -> torch.Tensor:
        """The state, to be set again."""
        state: torch.Tensor = _get_state(self._generator)
        return state

    def set(self, state: torch.Tensor) -> None:
        """Draw from this state next."""
        _set_state(self._generator, state)


class Start:
    """The inputs of one run. Tensors that the region does not write are used as they are."""

    def __init__(self, graph: Graph, values: list[Any]) -> None:
        self.graph = graph
        self._tensors = {v.id: values[v.id] for v in graph.inputs}
        written = {storage for op in graph.ops for storage in op.effects.writes}
        self.written = {v.id for v in graph.inputs if v.storage in written}
        first = {v.storage: values[v.id] for v in graph.inputs if v.id in self.written}
        self._saved = {storage: storage_of(tensor).clone() for storage, tensor in first.items()}
        self._sums = self._sums_now()

    def values(self) -> list[Any]:
        """The inputs by number: those that are written as copies on memory of their own."""
        found: list[Any] = [None] * n_values(self.graph)
        memory: dict[int, Any] = {}
        for v in self.graph.inputs:
            tensor = self._tensors[v.id]
            if v.id in self.written:
                if v.storage not in memory:
                    memory[v.storage] = self._saved[v.storage].clone()
                tensor = on_storage(tensor, memory[v.storage])
            found[v.id] = tensor
        return found

    def changed(self) -> list[int]:
        """The inputs that the region does not write, and that are others now than they were."""
        now = self._sums_now()
        return [number for number, before in self._sums.items() if now[number] != before]

    def _sums_now(self) -> dict[int, int]:
        numbers = [v.id for v in self.graph.inputs if v.id not in self.written]
        by_device: dict[torch.device, list[int]] = {}
        for number in numbers:
            by_device.setdefault(self._tensors[number].device, []).append(number)
        sums: dict[int, int] = {}
        for same in by_device.values():
            # One copy to the host for all of them.
            sums.update(zip(same, torch.stack([_sum(self._tensors[n]) for n in same]).tolist(), strict=True))
        return sums


def on_storage(like: torch.Tensor, storage: Any) -> torch.Tensor:
    """A tensor as another one is, on other memory of the same layout."""
    made = torch.empty(0, dtype=like.dtype, device=like.device)
    _set(made, storage, _offset(like), like.shape, like.stride())
    torch._C._set_conj(made, like.is_conj())
    torch._C._set_neg(made, like.is_neg())
    return made


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor's elements, added up: tells whether it was written."""
    if not tensor.numel():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits = tensor.resolve_conj().resolve_neg()
    bits = torch.view_as_real(bits) if bits.is_complex() else bits
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return bits.contiguous().view(kinds[bits.itemsize]).sum(dtype=torch.int64)
