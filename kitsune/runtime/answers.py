"""Numbers that the program asks for: read from where the device has left them for the host, while it goes on."""

from collections.abc import Callable
from typing import Any

import torch


class Answers:
    """What is known of a region's results before it has ended: for tensor number k, `number(k)` waits for its number and no
    longer; None once another run has taken its place.

    They hold while nobody writes these tensors: whoever keeps them has to see to that.
    """

    __slots__ = ("_number", "_tensors")

    def __init__(self, tensors: list[torch.Tensor], number: Callable[[int], Any]) -> None:
        self._tensors, self._number = tensors, number

    def to(self, tensor: Any) -> Any:
        """The number that a tensor of one element holds; None if that is not known."""
        for k, known in enumerate(self._tensors):
            if known is tensor:
                return self._number(k)
        return None
