"""The tiles that were measured to be the fastest, remembered from one process to the next beside the kernels."""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from kitsune.codegen.cache import versions
from kitsune.codegen.keys import text_key
from kitsune.codegen.machine_code import read_sealed, write_sealed
from kitsune.codegen.tiles import candidates, keeps_bits, tile_of
from kitsune.codegen.walks import accesses
from kitsune.ir import Launch
from kitsune.ir.plan import Kernel
from kitsune.ir.program import Tile

# A kernel that moves less takes 2 us, which no tile changes by much.
WORTH_BYTES = 4 << 20
# Another tile than the first choice is to be faster by this much: noise decides nothing.
FASTER = 0.97


@dataclass(frozen=True)
class Choice:
    """The tile of a kernel, with the microseconds of each that was tried, the first choice first. `known`: from before."""

    kernel: str
    domain: tuple[int, ...]
    tile: Tile
    micros: Mapping[Tile, float]
    known: bool = False

    @property
    def gain(self) -> float:
        """Microseconds of a launch that it saves."""
        return next(iter(self.micros.values())) - self.micros[self.tile]


class Choices:
    """What was chosen on the devices of one kind, by kernel. Each choice is a file, written whole; where that is not possible it
    lasts as long as the process."""

    def __init__(self, directory: str | os.PathLike[str], device_name: str) -> None:
        self.directory, self.device_name = Path(directory) / "tiles", device_name
        self._chosen: dict[str, Choice | None] = {}
        self._lock = threading.Lock()

    def of(self, kernel: Kernel) -> Choice | None:
        """What was chosen for a kernel, here or in an earlier process."""
        key = self.key(kernel)
        with self._lock:
            if key not in self._chosen:
                self._chosen[key] = _read(self._path(key), kernel)
            return self._chosen[key]

    def tile_for(self, launch: Launch, reproducible: bool) -> Tile | None:
        """The tile that a launch is to have, where another was found to be faster than the first choice.

        With `reproducible`, bits do not depend on what was measured: where a tile changes them, it is the first choice.
        """
        if why_not_tried(launch, reproducible):
            return None
        found = self.of(launch.kernels[0])
        return None if found is None or found.tile == tile_of(launch.kernels[0]) else found.tile

    def keep(self, kernel: Kernel, micros: Mapping[Tile, float]) -> Choice:
        """Choose by microseconds, of which the first are the first choice's, and remember it."""
        choice, key = _choice(kernel, dict(micros)), self.key(kernel)
        with self._lock:
            self._chosen[key] = choice
        with suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_sealed(self._path(key), json.dumps([[*astuple(t), us] for t, us in micros.items()]).encode())
        return choice

    def key(self, kernel: Kernel) -> str:
        """Equal for kernels that are the same to a device: by text, sizes and strides."""
        sizes = (kernel.domain, kernel.reduced, [(a.strides, a.value.type.offset % 16) for a in accesses(kernel)])
        what = (self.device_name, versions(), text_key(kernel), sizes)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:32]

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.json"


def why_not_tried(launch: Launch, reproducible: bool) -> str | None:
    """A sentence saying why a launch has the first choice of a tile without others being tried; None if they are."""
    if len(launch.kernels) != 1:
        return "several kernels share a launch, and have one tile"
    kernel = launch.kernels[0]
    if launch.nbytes < WORTH_BYTES:
        return "it moves too little for a tile to matter"
    if reproducible and not keeps_bits(kernel):
        return "deterministic algorithms are asked for, and another tile adds up in another order"
    return None if len(candidates(kernel)) > 1 else "there is no other tile for it"


def _read(path: Path, kernel: Kernel) -> Choice | None:
    text = read_sealed(path)
    if text is None:
        return None
    with suppress(ValueError, TypeError):
        rows: list[list[Any]] = json.loads(text)
        micros = {Tile(*row[:3]): float(row[3]) for row in rows}
        # What another version would have tried is not to be started.
        if set(micros) <= set(candidates(kernel)) and next(iter(micros), None) == tile_of(kernel):
            return _choice(kernel, micros, known=True)
    return None


def _choice(kernel: Kernel, micros: dict[Tile, float], known: bool = False) -> Choice:
    first, fastest = next(iter(micros)), min(micros, key=micros.__getitem__)
    tile = fastest if micros[fastest] < FASTER * micros[first] else first
    return Choice(kernel.name, kernel.domain, tile, micros, known)
