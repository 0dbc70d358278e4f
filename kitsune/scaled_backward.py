"""`loss.backward()` after a float16 forward: computed times a scale, and divided by it before anybody sees a gradient.

The scale multiplies the loss, and the gradients are divided by it right after the backward, by two of torch's own kernels and no
hook: a hook on a parameter would keep the backward from being followed.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from kitsune.amp import LossScale, scales_in_use, smallest, unscale
from kitsune.contexts import here

# Of scales: the parameters that each is for, as their optimizer has them now.
_owners: weakref.WeakKeyDictionary[LossScale, Any] = weakref.WeakKeyDictionary()
# By id: leaves of others that a scaled backward may have reached, as it may again through a graph that was kept.
_met: dict[int, weakref.ref[Any]] = {}
_inside = threading.local()


def scale_backwards_of(scale: LossScale, optimizer: torch.optim.Optimizer) -> None:
    """From now on a `backward()` between a forward that uses the scale and the step of its optimizer is scaled."""
    _owners[scale] = weakref.ref(optimizer)
    if getattr(torch.Tensor.backward, "scales", None) is None:
        torch.Tensor.backward = _scaling(torch.Tensor.backward)  # type: ignore[method-assign]


def _scaling(original: Any) -> Any:
    @functools.wraps(original)
    def backward(self: Any, gradient: Any = None, retain_graph: Any = None, create_graph: Any = False, inputs: Any = None) -> Any:
        scales = scales_in_use()
        # Gradients with a history are for computing with: they are made unscaled.
        if not scales or create_graph or getattr(_inside, "busy", False):
            return original(self, gradient, retain_graph, create_graph, inputs=inputs)
        _inside.busy = True
        try:
            return _scaled(original, scales, self, gradient, retain_graph, inputs)
        finally:
            _inside.busy = False

    backward.scales = True  # type: ignore[attr-defined]
    return backward


def _scaled(original: Any, scales: list[LossScale], loss: Any, gradient: Any, retain_graph: Any, inputs: Any) -> Any:
    owned = [_parameters_of(scale) for scale in scales]
    own = {id(parameter): parameter for parameters in owned for parameter in parameters}
    others = [leaf for leaf in _leaves(loss) if id(leaf) not in own]
    _remember(others)
    everyone = [*own.values(), *others]
    before = _set_aside(everyone)
    scale = smallest(scales, loss.device)
    for one in scales:
        one.busy = True
    try:
        result = original(loss * scale, gradient, retain_graph, False, inputs=inputs)
        with torch.no_grad():
            _divide(scales, owned, own, scale)
            unscale(others, scale)
    finally:
        for one in scales:
            one.busy = False
        _put_back(everyone, before)
    return result


def _divide(scales: list[LossScale], owned: list[list[Tensor]], own: dict[int, Tensor], scale: Tensor) -> None:
    if len(own) < sum(map(len, owned)):
        # Optimizers that share parameters skip their steps together.
        found = unscale(own.values(), scale)
        for one in scales:
            one.note(found)
        return
    for one, parameters in zip(scales, owned, strict=True):
        one.note(unscale(parameters, scale))


def _parameters_of(scale: LossScale) -> list[Tensor]:
    reference = _owners.get(scale)
    optimizer = None if reference is None else reference()
    return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def _set_aside(leaves: list[Tensor]) -> list[Tensor | None]:
    """Take away the gradients of earlier backwards, which are divided already."""
    with torch._C.DisableTorchFunction():
        grads = [leaf.grad for leaf in leaves]
        for leaf, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                leaf.grad = None
    return grads


def _put_back(leaves: list[Tensor], before: list[Tensor | None]) -> None:
    """Add what the backward has brought to what was there, as autograd would have."""
    for leaf, old in zip(leaves, before, strict=True):
        if old is not None:
            new, leaf.grad = leaf.grad, old
            if new is not None:
                with torch.no_grad():
                    old.add_(new)


def _leaves(loss: Any) -> list[Tensor]:
    """Every leaf that a backward of `loss` may reach, and perhaps more."""
    with torch._C.DisableTorchFunction():
        recorders = [pipeline.recorder for pipeline in here.depth if pipeline.on]
        found = [leaf for recorder in recorders for known in recorder.leaves.values() if (leaf := known()) is not None]
        outer = any(recorder.outer_graph for recorder in recorders) or not all(leaf.is_leaf for leaf in found)
    if outer or not recorders:
        found += _reached(loss)
    with torch._C.DisableTorchFunction():
        met = [leaf for known in _met.values() if (leaf := known()) is not None]
        leaves = {id(leaf): leaf for leaf in (*found, *met) if leaf.is_leaf and leaf.requires_grad}
    return list(leaves.values())


def _remember(leaves: list[Tensor]) -> None:
    def forget(number: int) -> Any:
        return lambda _: _met.pop(number, None)

    for leaf in leaves:
        if id(leaf) not in _met:
            _met[id(leaf)] = weakref.ref(leaf, forget(id(leaf)))


def _reached(loss: Any) -> list[Tensor]:
    """Go through the autograd graph, at 1 us a node: where nobody records, nobody has noted the leaves."""
    found, waiting, seen = [], [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.append(leaf)
        waiting.extend(before for before, _ in node.next_functions)
    return found
