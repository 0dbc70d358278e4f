"""What one context asks of the engine on top of the knobs: only less than they allow, so that a kill switch stays one."""

from __future__ import annotations

from dataclasses import dataclass

from kitsune.config import config
from kitsune.fusion import ANYTHING, Rules


@dataclass(frozen=True)
class EngineOptions:
    """Equal options share a pipeline, and what it knows of regions. The defaults are those of `kitsune.accelerate()`."""

    fuse: bool = True
    graphs: bool = True
    # Arenas that are kept while nobody uses them; None: a quarter of the device's memory.
    pool_bytes: int | None = None
    rules: Rules = ANYTHING
    # As the knob has it; None: what the knob says.
    numerics: str | None = None
    # Streams that the launches of a CUDA graph may be spread over; None: as many as the knob says.
    n_streams: int | None = None

    @property
    def knobs(self) -> tuple[object, ...]:
        """What plans depend on beside these options."""
        return self.fuses, config.fuel, config.layouts, config.graphs, self.grade, config.tuning

    @property
    def grade(self) -> str:
        """The numerics asked for now: the context's, if it has any, but the knob's "bitwise" goes before."""
        return "bitwise" if config.numerics == "bitwise" else self.numerics or config.numerics

    @property
    def fuses(self) -> bool:
        """Are regions planned now?"""
        return self.fuse and config.fuse

    @property
    def captures(self) -> bool:
        """Are regions captured as CUDA graphs now?"""
        return self.graphs and config.graphs


DEFAULT = EngineOptions()
