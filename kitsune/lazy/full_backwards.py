"""Why a backward was made by the autograd engine, in a sentence."""

from typing import Any

import torch

MORE = "it was asked for more than gradients (retain_graph, create_graph, inputs), or `torch.autograd.backward` was replaced"
ANOMALY = "anomaly detection is on, which looks at every node"
DISTRIBUTED = "torch.distributed is initialized: hooks that wait for other processes may run in it"
HOOKS = "a hook runs in it, of a tensor that gets a gradient or of its node in the graph"
GRAPH = (
    "the graph of its calls was asked for before, or not all of it is known: of an operator or a function that cannot be "
    "followed, or of a leaf that was made here"
)
OBSERVED = "its region was observed, or had an operator that cannot be recorded"
UNCOMPARED = "it takes something that calls cannot be compared by"
NOT_WHOLE = "what it begins at was not made by calls that were followed"
ANEW = "it was new at this place"


def runs_hooks(leaves: Any) -> bool:
    """Have these tensors hooks of Python's?"""
    return any(leaf._backward_hooks or leaf._post_accumulate_grad_hooks for leaf in leaves)


def is_distributed() -> bool:
    """May collectives be part of a backward?"""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def why_full(lane: Any, region: Any, plain: bool, key: Any, leaves: dict[int, Any]) -> str:
    """Of a backward that is about to be made, and was not followed. Nothing is asked here that was not asked before in order to
    follow it: of some leaves autograd refuses to tell, and to look for hooks makes nodes."""
    if not plain:
        return MORE
    if torch.is_anomaly_enabled():
        return ANOMALY
    if is_distributed():
        return DISTRIBUTED
    if region.past is None:
        return OBSERVED if region.observed_from is not None or region.slow else GRAPH
    if key is None and (runs_hooks(leaves.values()) or lane.hooked(leaves.values())):
        return HOOKS
    if region.observed_from is not None or region.slow:
        return OBSERVED
    if region.real:
        return GRAPH
    if key is None:
        return UNCOMPARED
    return NOT_WHOLE if key in region.node.calls else ANEW
