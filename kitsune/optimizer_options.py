"""The keywords of `KitsuneOptimizer`: their defaults, their checks, and what each asks of the engine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.optim import Optimizer

from kitsune.accepts import Accepts, accepted, flag, n_bytes, nearest
from kitsune.amp import AMPConfig
from kitsune.config import checked
from kitsune.engine_options import EngineOptions
from kitsune.fusion import ANYTHING, FusionConfig, Rules
from kitsune.scheduler import StreamConfig

# In the order of their positions behind an optimizer that exists already.
POSITIONS = (
    "enable_amp",
    "enable_fusion",
    "num_streams",
    "profile",
    "amp_config",
    "fusion_config",
    "stream_config",
    "memory_pool_size",
    "capture_graph",
)
# These are no part of a copy: a model is found anew.
KEYWORDS = (*POSITIONS, "warmup", "device", "model")


def config_of(kind: type) -> Accepts:
    """An instance of this dataclass, or None."""

    def check(value: object) -> Any:
        if value is None or isinstance(value, kind):
            return value
        raise ValueError

    return Accepts(f"a {kind.__name__}({', '.join(f'{f.name}=...' for f in fields(kind))}) or None", check)


def _check_pool(value: object) -> int:
    if value is None:
        raise ValueError
    checked_bytes: int = n_bytes.check(value)
    return checked_bytes


ACCEPTS = {
    "enable_amp": flag,
    "enable_fusion": flag,
    "profile": flag,
    "amp_config": config_of(AMPConfig),
    "fusion_config": config_of(FusionConfig),
    "stream_config": config_of(StreamConfig),
    "memory_pool_size": Accepts("a number of bytes, or a text such as '512MB' or '2GB'", _check_pool),
    "capture_graph": flag,
}


@dataclass(frozen=True)
class OptimizerOptions:
    """What a `KitsuneOptimizer` was made with, checked."""

    enable_amp: bool = False
    enable_fusion: bool = False
    num_streams: int = 4
    profile: bool = False
    amp_config: AMPConfig | None = None
    fusion_config: FusionConfig | None = None
    stream_config: StreamConfig | None = None
    memory_pool_size: int = 512 * 1024 * 1024
    capture_graph: bool = True
    warmup: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name, accepts in ACCEPTS.items():
            object.__setattr__(self, name, accepted(name, getattr(self, name), accepts))
        # Also where stream_config wins: a wrong number is an error wherever it is given.
        StreamConfig(self.num_streams)
        object.__setattr__(self, "warmup", None if self.warmup is None else checked("warmup", self.warmup))
        object.__setattr__(self, "device", checked("device", self.device))

    @property
    def streams(self) -> StreamConfig:
        """`stream_config`, or what `num_streams` comes to."""
        return self.stream_config or StreamConfig(self.num_streams)

    @property
    def uses_amp(self) -> bool:
        """Are forwards run under autocast?"""
        return self.enable_amp and (self.amp_config is None or self.amp_config.enabled)

    def engine(self) -> EngineOptions:
        """What the contexts of this optimizer ask of the engine."""
        rules = ANYTHING if self.fusion_config is None else Rules(self.fusion_config)
        n_streams = self.streams.num_streams
        return EngineOptions(self.enable_fusion, self.capture_graph, self.memory_pool_size, rules, n_streams=n_streams)


def take_apart(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Optimizer, dict[str, Any]]:
    """The optimizer to wrap, made or given, and our own options of what came with it."""
    own = {name: kwargs.pop(name) for name in KEYWORDS if name in kwargs}
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        return _made(optimizer, args, kwargs), own
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"KitsuneOptimizer takes a torch.optim.Optimizer, or a class of one, but got {described(optimizer)}.")
    names = POSITIONS[: len(args)]
    twice = [name for name in names if name in own]
    if len(args) > len(POSITIONS) or kwargs or twice or (args and not isinstance(args[0], (bool, int))):
        found = ", ".join([*(f"a positional {described(arg)}" for arg in args), *map(repr, [*kwargs, *twice])])
        hints = "".join(nearest(name, KEYWORDS) for name in kwargs)
        raise TypeError(
            f"KitsuneOptimizer was given an optimizer that exists already, so it takes only {', '.join(KEYWORDS)}, each once; "
            f"unexpected: {found}.{hints}"
        )
    return optimizer, {**dict(zip(names, args, strict=True)), **own}


def _made(optimizer: type[Optimizer], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optimizer:
    try:
        return optimizer(*args, **kwargs)
    except TypeError as error:
        # A name that neither knows is the optimizer's to refuse, but may be one of ours.
        hints = "".join(nearest(name, KEYWORDS) for name in kwargs if name in str(error))
        raise TypeError(f"{optimizer.__name__} cannot be made with these arguments: {error}.{hints}") from error


def described(value: object) -> str:
    """A value by its type, for errors."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} object"


def devices_of(optimizer: Optimizer) -> set[torch.device]:
    """Where the parameters are."""
    return {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
