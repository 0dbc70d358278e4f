"""`KitsuneOptimizer`: a torch optimizer that records the training steps around it; nothing else changes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kitsune.amp import HalfForward
from kitsune.binding import Binding, unwatch, watch
from kitsune.dataflow import DataflowScheduler, streams_note
from kitsune.optimizer_options import OptimizerOptions, described, take_apart
from kitsune.optimizer_profiler import OptimizerProfiler, metrics_of
from kitsune.optimizer_state import checked_state, mended, own_state
from kitsune.profiler import summary_text, write_metrics
from kitsune.scaled_backward import scale_backwards_of
from kitsune.scaled_step import check_place, scaled_step

__all__ = ["KitsuneOptimizer"]


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

        opt = KitsuneOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), enable_fusion=True)
        opt = KitsuneOptimizer(torch.optim.AdamW, model.parameters(), lr=1e-3, enable_fusion=True)

    Recording begins with the first forward, gradients enabled, of a module that owns one of the parameters, and ends
    with `step()`, or with `close()` where steps are taken in the hooks of gradients. Hooks live on the wrapped optimizer: they
    run once and are given that one. In a context that the program has opened itself (`with kitsune.accelerate():`) that context's
    options hold, and fusion, graphs and pool are its own.

    - `enable_amp`: forwards run under autocast, and what they return is float32. `amp_config` says in which precision; without
      one it is bfloat16 where the device has it. Gradients of float16 forwards are computed times a scale, and divided by it
      when `loss.backward()` is done, so that clipping sees true ones; hooks inside of the backward see the scaled ones. A step
      whose gradients are not finite is skipped. With `fused=True` in the optimizer nothing of this waits for the device.
      Forwards without gradients, and those that the program runs under its own autocast, are left as they are.
    - `enable_fusion`: fused kernels, as `fusion_config` allows. Without it every operator is a kernel of the library.
    - `num_streams`, `stream_config`: streams that the launches of a CUDA graph are spread over, where that is worth it. The
      roles of streams in a `StreamConfig` are not used yet.
    - `memory_pool_size`: bytes, or a text such as "2GB", that are kept of arenas which nobody uses at the moment.
    - `capture_graph`: repeating steps are replayed as CUDA graphs.
    - `profile`: the time of every step is taken, for `profiler`, `print_summary()` and `save_profile()`.
    - `model` (or `attach`) names the module instead of looking for it; `warmup` and `device` are those of `kitsune.accelerate`.
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
    _options: OptimizerOptions
    _amp: HalfForward | None
    _n_steps: int
    _profiler: OptimizerProfiler | None

    def __init__(self, optimizer: Optimizer | type[Optimizer], *args: Any, **kwargs: Any) -> None:
        base, own = take_apart(optimizer, args, kwargs)
        model = own.pop("model", None)
        self._bind(base, OptimizerOptions(**own))
        if model is not None:
            self.attach(model)

    def _bind(self, base: Optimizer, options: OptimizerOptions) -> None:
        amp = HalfForward(options.amp_config) if options.uses_amp else None
        note = streams_note(options.streams)
        binding = Binding(base, options.warmup, options.device, options.engine(), amp, note)
        self.__dict__.update(_base=base, _binding=binding, _options=options, _amp=amp, _n_steps=0, _profiler=None)
        if amp is not None:
            scale_backwards_of(amp.scale, base)
        if options.profile:
            self.__dict__["_profiler"] = profiler = OptimizerProfiler(self)
            binding.batch = profiler.forward_begins
        watch(binding)
        weakref.finalize(self, unwatch, binding).atexit = False

    @property
    def base_optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._base

    @property
    def profiler(self) -> OptimizerProfiler | None:
        """What has measured the steps so far; None without `profile=True`."""
        return self._profiler

    @property
    def scheduler(self) -> DataflowScheduler:
        """What plans regions, with the number of streams that it may use."""
        return DataflowScheduler(stream_config=self._options.streams, rules=self._options.engine().rules)

    def attach(self, model: nn.Module) -> None:
        """Begin recording at the forward of `model` and of no module that is not attached; may be called again."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"attach takes the torch.nn.Module to record, but got {described(model)}.")
        if not self._binding.owns(model):
            raise ValueError(f"{type(model).__name__} owns none of the parameters of this optimizer.")
        self._binding.attach(model)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """The wrapped optimizer's step, inside the recording, which ends here. Returns what the closure does, if there is one."""
        if self._amp is not None:
            check_place(self._amp.scale)
        try:
            if self._amp is not None and self._amp.may_scale:
                return scaled_step(self._base, self._amp.scale, closure, kwargs)
            # Through the attribute: a scheduler that was made for the wrapped optimizer has replaced it there.
            step: Callable[..., Any] = self._base.step
            return step(**kwargs) if closure is None else step(closure, **kwargs)
        finally:
            self._binding.close()
            self.__dict__["_n_steps"] += 1
            if self._profiler is not None:
                self._profiler.step_ended()

    # Optimizer would wrap step() to run the hooks and a profiler range; the wrapped step() does both already.
    step.hooked = True  # type: ignore[attr-defined]

    def close(self) -> None:
        """Ends a recording that no `step()` will end, after an interrupted training step for instance. A step or a `close()`
        inside of a backward, in a hook, ends none: the next one outside does."""
        self._binding.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's zero_grad; a recording that is open stays open."""
        self._base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The wrapped optimizer's add_param_group."""
        self._base.add_param_group(param_group)
        self._binding.forget()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, which loads without Kitsune too, and under "kitsune" our own."""
        return {**self._base.state_dict(), "kitsune": own_state(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state that this or a plain torch optimizer of the same kind has saved."""
        state, own = checked_state(self._base, state_dict)
        self._base.load_state_dict(state)
        self.__dict__["_n_steps"] = own.get("steps", self._n_steps)
        if self._amp is not None and "scale" in own:
            self._amp.scale.load_state_dict(own)

    def print_summary(self) -> None:
        """Prints speed, streams, fusion, memory and precision: what was measured or counted, and "n/a" for the rest."""
        print(summary_text(metrics_of(self)))

    def save_profile(self, filepath: str | os.PathLike[str] = "profile.json") -> None:
        """Writes what `profiler.get_metrics()` returns as JSON. Without `profile=True` no times are in it."""
        write_metrics(metrics_of(self), filepath)

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
        return {"base": self._base, "options": self._options, "own": own_state(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bind(mended(state["base"]), state["options"])
        self.__dict__["_n_steps"] = state["own"]["steps"]
        if self._amp is not None and "scale" in state["own"]:
            self._amp.scale.load_state_dict(state["own"])
