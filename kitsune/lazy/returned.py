"""What a call returned, in terms of its region."""

from typing import Any

import torch

from kitsune.ir.graph import Operand, Result
from kitsune.lazy.edges import Made, cell_in, history_of
from kitsune.lazy.tensor import LazyTensor, wrapper_maker
from kitsune.lazy.trie import GENERAL, NOTHING, ONE, SELF


class Returned:
    """What a call returned, in terms of the region; `fits` is False where it cannot be made again without the call."""

    def __init__(self, result: Any, flat: list[Any], region: Any, first: int, turned: list[Made] | None) -> None:
        self.made: list[Made] = []
        # Who shares memory with what has got a history has got one as well: nobody is known who could.
        self.fits = turned is not None
        self.graded = False
        self._ids = {id(t): k for k, t in reversed(list(enumerate(flat)))}
        self._seen: set[int] = set()
        self._region, self._first = region, first
        self.structure = self._described(result)

    @property
    def form(self) -> int:
        """How the result is put together; see the trie."""
        if isinstance(self.structure, Result):
            return ONE
        if isinstance(self.structure, Operand):
            return SELF
        return NOTHING if self.structure is None else GENERAL

    def _described(self, result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return self._tensor(result)
        if type(result) in (tuple, list) or type(result).__module__ == "torch.return_types":  # as `max` along a dimension has
            return type(result)([self._described(x) for x in result])
        if result is not None and type(result) not in (int, bool, str):
            self.fits = False
        return result

    def _tensor(self, tensor: Any) -> Any:
        if id(tensor) in self._ids:
            return Operand(self._ids[id(tensor)])
        made = self.new(tensor)
        if made is None:
            self.fits = False
            return None
        self.made.append(made)
        return Result(len(self.made) - 1)

    def new(self, tensor: Any) -> Made | None:
        """A tensor that the call has made; None if it is another one, or came twice."""
        cell = cell_in(tensor, self._region) if type(tensor) is LazyTensor else None
        if cell is None or cell.external or id(tensor) in self._seen or cell.ref.id < self._first:
            return None
        self._seen.add(id(tensor))
        graded = None
        if tensor.requires_grad:
            if tensor.is_leaf:
                return None
            graded = history_of(tensor)
            self.graded = True
        return Made(cell.ref, cell.type, cell.storage, wrapper_maker(cell.type), graded)
