"""`KitsuneOptimizer`: a torch optimizer that records the training steps around it; nothing else changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kitsune.accepts import nearest
from kitsune.binding import Binding, unwatch, watch
from kitsune.config import checked

__all__ = ["KitsuneOptimizer"]

OWN_KEYWORDS = ("model", "warmup", "device")


def _through(name: str) -> Any:
    """A property that reads, writes and deletes `name` on the wrapped optimizer."""

    def read(self: KitsuneOptimizer) -> Any:
        return getattr(self._base, name)

    def write(self: KitsuneOptimizer, value: Any) -> None:
        setattr(self._base, name, value)
        self._binding.forget()  # only one of these names matters, and none is written often

    def delete(self: KitsuneOptimizer) -> None:
        delattr(self._base, name)

    return property(read, write, delete)


class KitsuneOptimizer(Optimizer):
    """Wraps any torch optimizer and makes the training step around it faster, with the results of plain PyTorch.

        opt = KitsuneOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
        opt = KitsuneOptimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)

    Recording begins with the first forward, gradients enabled, of a module that owns one of the parameters, and ends
    with `step()`. `model` (or `attach`) names the module instead of looking for it; `warmup` and `device` are those
    of `kitsune.accelerate`. Hooks live on the wrapped optimizer: they run once and are given that one.
    """

    # Optimizer.__init__ is not called: it would make a second set of everything that the wrapped one has. These all
    # lead there, so a learning rate that a scheduler writes here is the one that the wrapped step() reads.
    param_groups = _through("param_groups")
    state = _through("state")
    defaults = _through("defaults")
    _optimizer_step_pre_hooks = _through("_optimizer_step_pre_hooks")
    _optimizer_step_post_hooks = _through("_optimizer_step_post_hooks")
    _optimizer_state_dict_pre_hooks = _through("_optimizer_state_dict_pre_hooks")
    _optimizer_state_dict_post_hooks = _through("_optimizer_state_dict_post_hooks")
    _optimizer_load_state_dict_pre_hooks = _through("_optimizer_load_state_dict_pre_hooks")
    _optimizer_load_state_dict_post_hooks = _through("_optimizer_load_state_dict_post_hooks")
    # GradScaler hands its scale to a fused step() by setting these two on the optimizer and deleting them afterwards.
    grad_scale = _through("grad_scale")
    found_inf = _through("found_inf")
    _step_supports_amp_scaling = _through("_step_supports_amp_scaling")

    _base: Optimizer
    _binding: Binding

    def __init__(
        self,
        optimizer: Optimizer | type[Optimizer],
        *args: Any,
        model: nn.Module | None = None,
        warmup: int | None = None,
        device: str | torch.device | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        base = _build(optimizer, args, optimizer_kwargs)
        self._bind(base, None if warmup is None else checked("warmup", warmup), checked("device", device))
        if model is not None:
            self.attach(model)

    def _bind(self, base: Optimizer, warmup: int | None, device: str | None) -> None:
        self.__dict__["_base"] = base
        self.__dict__["_binding"] = binding = Binding(base, warmup, device)
        watch(binding)
        weakref.finalize(self, unwatch, binding).atexit = False

    @property
    def base_optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._base

    def attach(self, model: nn.Module) -> None:
        """Begin recording at the forward of `model` and of no module that is not attached; may be called again."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"attach takes the torch.nn.Module to record, but got {_described(model)}.")
        if not self._binding.owns(model):
            raise ValueError(f"{type(model).__name__} owns none of the parameters of this optimizer.")
        self._binding.attach(model)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """The wrapped optimizer's step, inside the recording, which ends here."""
        try:
            # Through the attribute: a scheduler that was made for the wrapped optimizer has replaced it there.
            step: Callable[..., Any] = self._base.step
            return step(**kwargs) if closure is None else step(closure, **kwargs)
        finally:
            self._binding.close()

    # Optimizer would wrap step() to run the hooks and a profiler range; the wrapped step() does both already.
    step.hooked = True  # type: ignore[attr-defined]

    def close(self) -> None:
        """Ends a recording that no `step()` will end, after an interrupted training step for instance."""
        self._binding.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's zero_grad; a recording that is open stays open."""
        self._base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The wrapped optimizer's add_param_group."""
        self._base.add_param_group(param_group)
        self._binding.forget()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state: it loads without Kitsune too."""
        return self._base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state that this or a plain torch optimizer of the same kind has saved."""
        self._base.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"KitsuneOptimizer({self._base!r})"

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("_base")
        if base is None:  # while unpickling
            raise AttributeError(name)
        return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What this class has stays here: a scheduler puts its own `step` on the object that it was given, and on the
        # wrapped one that would call itself without end.
        if not hasattr(type(self), name) and name in vars(self._base):
            setattr(self._base, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # Neither a scheduler's step nor an open recording goes along, and not the model: a copy finds its own.
        return {"base": self._base, "warmup": self._binding.warmup, "device": self._binding.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bind(**state)


def _build(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optimizer:
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        return optimizer(*args, **kwargs)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"KitsuneOptimizer takes a torch.optim.Optimizer, or a class of one, but got {_described(optimizer)}.")
    if args or kwargs:
        found = ", ".join([*(f"a positional {_described(arg)}" for arg in args), *map(repr, kwargs)])
        hints = "".join(nearest(name, OWN_KEYWORDS) for name in kwargs)
        raise TypeError(
            f"KitsuneOptimizer was given an optimizer that exists already, so it takes only the keywords "
            f"{', '.join(OWN_KEYWORDS)}; unexpected: {found}.{hints}"
        )
    return optimizer


def _described(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} object"
