"""Every knob of Kitsune, one row each: `kitsune.config.warmup`, `KITSUNE_WARMUP`, `kitsune.config.patch(warmup=0)`.

A value comes from the default, from the environment (read once, at import), from an assignment, or from a `patch`
that is open; `kitsune.config.show()` says which.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ContextDecorator
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from kitsune.accepts import Accepts, accepted, device_name, flag, folder, n_bytes, nearest, one_of, optional, whole

__all__ = ["Config", "KitsuneWarning", "Options", "config", "knob_table"]


class KitsuneWarning(UserWarning):
    """The category of every warning that Kitsune gives."""


def knob(default: Any, variable: str, accepts: Accepts, effect: str) -> Any:
    return field(default=default, metadata={"variable": variable, "accepts": accepts, "effect": effect})


@dataclass(frozen=True)
class Options:
    """The value of every knob at one moment; `kitsune.config.options()` takes one."""

    enabled: bool = knob(True, "KITSUNE", flag, "0 turns Kitsune off: plain PyTorch")
    warmup: int = knob(1, "KITSUNE_WARMUP", whole(0), "times a region is observed before it is recorded lazily")
    device: str | None = knob(None, "KITSUNE_DEVICE", device_name, "device to record; None: cuda if available, else cpu")
    max_pending_ops: int = knob(20000, "KITSUNE_MAX_PENDING_OPS", whole(1), "operators that may be pending before a flush")
    max_pending_bytes: int | None = knob(
        None, "KITSUNE_MAX_PENDING_BYTES", n_bytes, "bytes that may be pending, such as 2GB; None: half of the device's memory"
    )
    gate: bool = knob(True, "KITSUNE_GATE", flag, "leave to eager what keeps changing, is slower than eager or runs on a CPU")
    follow: bool = knob(True, "KITSUNE_FOLLOW", flag, "follow whole calls of torch's API, and `backward()`, once they are known")
    early_reads: bool = knob(
        True,
        "KITSUNE_EARLY_READS",
        flag,
        "values that the program reads as numbers are computed first, and sent to the host at once",
    )
    audit: int | None = knob(
        None,
        "KITSUNE_AUDIT",
        optional(whole(0)),
        "one call in so many of a static function goes through Python; 0: none; None: one in 100, or as takes 5 % of its time",
    )
    fuse: bool = knob(True, "KITSUNE_FUSE", flag, "0 runs every region op by op: no planning, no kernels of Kitsune's own")
    numerics: str = knob(
        "strict",
        "KITSUNE_NUMERICS",
        one_of("strict", "bitwise", "fast"),
        "strict: eager's bits but for reductions, which are fused in an order of their own; bitwise: no reduction is fused; "
        "fast: as strict, without rounding to 16 bits inside of a kernel",
    )
    fuel: int | None = knob(
        None, "KITSUNE_FUEL", optional(whole(0)), "only so many fusions in each region: bisects a wrong answer; None: all"
    )
    streams: int = knob(
        4, "KITSUNE_STREAMS", whole(1, 32), "streams that the launches of a CUDA graph are spread over; 1: one by one"
    )
    layouts: bool = knob(True, "KITSUNE_LAYOUTS", flag, "0 keeps eager's layouts: no padded products, no channels-last inside")
    pool: bool = knob(True, "KITSUNE_POOL", flag, "0 gives each arena back to torch when its region has run")
    graphs: bool = knob(True, "KITSUNE_GRAPHS", flag, "0 launches every region anew each time: no CUDA graphs")
    pages: bool = knob(
        True,
        "KITSUNE_PAGES",
        flag,
        "CUDA graphs read in the host's memory where their batch is; 0: the driver copies it first",
    )
    early_starts: bool = knob(
        True,
        "KITSUNE_EARLY_STARTS",
        flag,
        "a kernel's blocks come to the device while the launch before it ends (compute capability 9.0); 0: once it is over",
    )
    warm_start: bool = knob(
        True,
        "KITSUNE_WARM_START",
        flag,
        "what a program's last run has needed, plans, kernels and cuDNN's own, is made ready beside its first step; 0: later",
    )
    max_graphs: int = knob(64, "KITSUNE_MAX_GRAPHS", whole(1), "CUDA graphs that are kept; the least recently used goes first")
    graph_memory: int | None = knob(
        None, "KITSUNE_GRAPH_MEMORY", n_bytes, "bytes that CUDA graphs may keep, such as 4GB; None: half of the device's memory"
    )
    cache_dir: str | None = knob(
        None, "KITSUNE_CACHE_DIR", folder, "kernels and plans are kept here; None: in XDG_CACHE_HOME or ~/.cache"
    )
    tuning: str = knob(
        "on",
        "KITSUNE_TUNING",
        one_of("on", "off"),
        "on: the tiles of large kernels are timed beside the steps, and the fastest remembered; off: they have the first choice",
    )
    compile_workers: int | None = knob(
        None, "KITSUNE_COMPILE_WORKERS", optional(whole(0)), "processes that compile in the background; None: 1 to 8, by cores"
    )
    debug: int = knob(
        0,
        "KITSUNE_DEBUG",
        whole(0, 5),
        "prints to stderr: 1 each flush, 2 each launch of a new plan, 3 passes and refusals, 4 kernels, 5 graphs after each pass",
    )
    dump: str | None = knob(None, "KITSUNE_DUMP", folder, "writes each new region's graphs, plan and kernels into this folder")
    verify: bool = knob(False, "KITSUNE_VERIFY", flag, "1 checks every new graph and plan for consistency")
    check: bool = knob(False, "KITSUNE_CHECK", flag, "1 runs every region by eager's operators, too, and says what differs")


KNOBS: Mapping[str, Field[Any]] = {row.name: row for row in fields(Options)}
VARIABLES: Mapping[str, str] = {row.metadata["variable"]: name for name, row in KNOBS.items()}


def _unknown(name: str) -> str:
    return f"Kitsune has no option {name!r}.{nearest(name, KNOBS)}"


def checked(name: str, value: object) -> Any:
    """`value` as the knob `name` stores it, or a ValueError that says what it accepts; TypeError if there is none."""
    if name not in KNOBS:
        raise TypeError(_unknown(name))
    return accepted(name, value, KNOBS[name].metadata["accepts"])


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The knobs that `environment` sets. An empty variable counts as unset, an unknown `KITSUNE_*` one warns."""
    found = {}
    for variable, text in environment.items():
        if variable in VARIABLES and text.strip():
            name = VARIABLES[variable]
            found[name] = _read(variable, text.strip(), KNOBS[name].metadata["accepts"])
        elif variable.startswith("KITSUNE_") and variable not in VARIABLES:
            message = f"Kitsune knows no environment variable {variable}.{nearest(variable, VARIABLES)}"
            warnings.warn(message, KitsuneWarning, stacklevel=2)
    return found


def _read(variable: str, text: str, accepts: Accepts) -> Any:
    try:
        return accepts.check(accepts.read(text))
    except ValueError:
        raise ValueError(f"{variable}={text!r} is not possible: the variable accepts {accepts.words}.") from None


class Config:
    """The knobs as attributes: read, assign (checked), `patch` for a while, `show`."""

    # The same rows again for type checkers, because these can be assigned and those of Options cannot.
    enabled: bool
    warmup: int
    device: str | None
    max_pending_ops: int
    max_pending_bytes: int | None
    gate: bool
    follow: bool
    early_reads: bool
    audit: int | None
    fuse: bool
    numerics: str
    fuel: int | None
    streams: int
    layouts: bool
    pool: bool
    graphs: bool
    pages: bool
    early_starts: bool
    warm_start: bool
    max_graphs: int
    graph_memory: int | None
    cache_dir: str | None
    tuning: str
    compile_workers: int | None
    debug: int
    dump: str | None
    verify: bool
    check: bool

    def __init__(self, environment: Mapping[str, str]) -> None:
        found = from_environment(environment)
        # Values lie in the instance dictionary: the hot path reads them, and a plain attribute is the cheapest read.
        self.__dict__.update({name: found.get(name, row.default) for name, row in KNOBS.items()})
        self.__dict__["_n_changes"] = 0
        self.__dict__["_sources"] = {name: "environment" if name in found else "default" for name in KNOBS}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_unknown(name))

    def __setattr__(self, name: str, value: object) -> None:
        if name not in KNOBS:
            raise AttributeError(_unknown(name))
        self._put(name, checked(name, value), "set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"The option {name!r} cannot be deleted; assign its default instead.")

    def __repr__(self) -> str:
        return f"kitsune.config({', '.join(f'{name}={getattr(self, name)!r}' for name in KNOBS)})"

    def patch(self, **options: Any) -> Patch:
        """Change knobs inside a `with` block or a decorated function; afterwards they are as before, also on errors."""
        return Patch(self, {name: checked(name, value) for name, value in options.items()})

    @property
    def n_changes(self) -> int:
        """Counts assignments: while it is the same, so is every knob."""
        return self.__dict__["_n_changes"]  # type: ignore[no-any-return]

    def options(self) -> Options:
        """The present value of every knob, as one immutable object."""
        return Options(**{name: self.__dict__[name] for name in KNOBS})

    def show(self) -> str:
        """One line per knob: its value, where that comes from, its environment variable and its effect."""
        rows = [(name, repr(value), self._sources[name]) for name, value in asdict(self.options()).items()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = []
        for name, value, source in rows:
            meta = KNOBS[name].metadata
            head = f"{name:{widths[0]}s} = {value:{widths[1]}s}  {source:{widths[2]}s}"
            lines.append(f"{head}  {meta['variable']:25s}  {meta['effect']}")
        return "\n".join(lines)

    def _put(self, name: str, value: object, source: str) -> None:
        self.__dict__[name] = value
        self.__dict__["_n_changes"] += 1
        self._sources[name] = source


class Patch(ContextDecorator):
    """What `kitsune.config.patch` returns: a context manager and a decorator, which may be entered again while open."""

    def __init__(self, target: Config, options: dict[str, Any]) -> None:
        self._target = target
        self._options = options
        self._saved: list[dict[str, tuple[Any, str]]] = []

    def __enter__(self) -> Config:
        before = {name: (getattr(self._target, name), self._target._sources[name]) for name in self._options}
        self._saved.append(before)
        for name, value in self._options.items():
            self._target._put(name, value, "patch")
        return self._target

    def __exit__(self, *error: object) -> None:
        for name, (value, source) in self._saved.pop().items():
            self._target._put(name, value, source)


def knob_table() -> str:
    """The table of the README, between its `<!-- knobs -->` marks."""
    lines = ["| option | variable | default | effect |", "|---|---|---|---|"]
    for name, row in KNOBS.items():
        meta = row.metadata
        lines.append(f"| `{name}` | `{meta['variable']}` | `{row.default!r}` | {meta['effect']} |")
    return "\n".join(lines)


config = Config(os.environ)
