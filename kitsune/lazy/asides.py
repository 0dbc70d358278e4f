"""What the program makes of a former step's results, with their history, while this step's calls are followed: metrics behind
`optimizer.step()`, a sum of losses.

Autograd knows of such a call at once, as in eager. It has to do with no call that is owed, so that those are followed all the
same. What it makes is marked: no key tells its history, and a call that is given it is made for real, each time.
"""

from typing import Any

from kitsune.lazy.advance import is_without_history
from kitsune.lazy.cell import FORMER, GONE, Aside
from kitsune.lazy.realize import tensor_is_spent
from kitsune.lazy.rebuild import tensors_in
from kitsune.lazy.tensor import LazyTensor


def aside(lane: Any, flat: list[Any], written: list[Any]) -> Aside | None:
    """What the history of a call's results is, if none of the tensors that it is given has one of this region's calls."""
    region, graded = lane.recorder.region, [t for t in flat if t.requires_grad]
    if not all(_is_aside(region, t) for t in graded) or not all(t.requires_grad for t in written):
        return None
    lane.attach(graded)
    if not region.calls:
        return GONE if _are_gone(graded) else FORMER
    # Autograd goes back from what was made last, and runs hooks in that order: what came before is made before it.
    return GONE if _are_gone(graded) and not written else None


def _is_aside(region: Any, tensor: Any) -> bool:
    if type(tensor) is not LazyTensor:
        return False
    cell = tensor.cell
    if cell.owed is not None or type(cell.spent) is Aside:
        return cell.owed is None or tensor_is_spent(tensor)
    return (cell.region is not region or cell.external) and not is_without_history(tensor)


def _are_gone(tensors: list[Any]) -> bool:
    return all(t.cell.spent is GONE for t in tensors)


def mark(history: Aside | None, flat: list[Any], result: Any) -> None:
    """From now on no key tells the history of those that have one, of what such a call was given and of what it has made."""
    for tensor in [] if history is None else [*flat, *tensors_in(result)]:
        if type(tensor) is LazyTensor and tensor.requires_grad and tensor.cell.spent is False:
            tensor.cell.spent = history
