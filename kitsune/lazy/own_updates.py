"""A program without an optimizer has done a step when it has written its parameters and calls on with gradients.

Without an end there a loop that reads its loss before the backward, or reads nothing, would be one region that never comes back:
each of its operators is new, and an MLP's step took 14 to 43 times as long as eager's (CPU host).
"""

from typing import Any

import torch

from kitsune.ir import Barrier


def end_of_update(recorder: Any, region: Any) -> bool:
    """A call comes that is not known here. Does it begin another step? Then the region has ended, the next time as soon as it has
    come as far."""
    if not torch.is_grad_enabled() or not _is_updated(region):
        return False
    region.node.full = Barrier.UPDATE
    recorder.flush(Barrier.UPDATE)
    return recorder.region is not region


def _is_updated(region: Any) -> bool:
    """Were parameters written since the backward that came last?"""
    first = region.after_backward
    written = (cell for cell in region.plain.values() if cell.ref.id >= first and cell.ref.id != cell.came.id)
    return any(cell.real.requires_grad for cell in written)


def note_gradients(func: Any, region: Any) -> None:
    """Does a call ask for gradients, as a backward does?"""
    if func is torch.autograd.grad:
        region.after_backward = region.node.n_values
