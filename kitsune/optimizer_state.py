"""What `KitsuneOptimizer.state_dict()` has beside the wrapped optimizer's, and the check of what is loaded."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim import Optimizer

from kitsune.accepts import nearest

KEYS = ("state", "param_groups", "kitsune")


def own_state(optimizer: Any) -> dict[str, Any]:
    """Plain numbers and texts, which `torch.load(weights_only=True)` takes."""
    state: dict[str, Any] = {"optimizer": type(optimizer.base_optimizer).__name__, "steps": optimizer._n_steps}
    amp = optimizer._amp
    if amp is not None and amp.may_scale:
        state.update(amp.scale.state_dict())
    config = {name: getattr(optimizer._options, name) for name in ("enable_amp", "enable_fusion", "num_streams")}
    return {**state, "config": config}


def checked_state(optimizer: Optimizer, state_dict: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's own part of a state, and ours. Raises what says why it is not of this optimizer."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"load_state_dict takes the dictionary that state_dict() returns, not {state_dict!r}.")
    for key in KEYS[:2]:
        if key not in state_dict:
            hint = nearest(key, map(str, state_dict))
            raise ValueError(
                f"The state has no {key!r}, so it is not that of an optimizer: it has {sorted(map(str, state_dict))}.{hint}"
            )
    own = state_dict.get("kitsune", {})
    here, saved = type(optimizer).__name__, own.get("optimizer")
    strange = _strange_options(optimizer, state_dict["param_groups"])
    if (saved is not None and saved != here) or strange:
        whose = f"of {saved}" if saved else f"of another optimizer (its options are {', '.join(strange)})"
        raise ValueError(f"The state is {whose} and cannot be loaded into {here}: wrap the optimizer that it was saved from.")
    return {key: value for key, value in state_dict.items() if key != "kitsune"}, own


def mended(optimizer: Optimizer) -> Optimizer:
    """A copy of an optimizer that torch makes incomplete: LBFGS lacks the list of its parameters, and fails in its first step."""
    if isinstance(optimizer, torch.optim.LBFGS) and not hasattr(optimizer, "_params"):
        optimizer._params = optimizer.param_groups[0]["params"]
        optimizer._numel_cache = None
    return optimizer


def _strange_options(optimizer: Optimizer, groups: list[dict[str, Any]]) -> list[str]:
    """Options in saved groups that belong to other optimizers of torch. Schedulers and programs add names of their own."""
    ours = {name for group in optimizer.param_groups for name in group}
    theirs = {
        name for kind in vars(torch.optim).values() if isinstance(kind, type) for name in inspect.signature(kind).parameters
    }
    found = {name for group in groups for name in group}
    return sorted((found - ours) & theirs) if ours - found else []
