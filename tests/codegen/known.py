"""Kernels that have computed the right thing already. A mutant that changes neither their text nor what they are given need not
run them again in the interpreter, which takes half a minute for all (tests/mutants/run.py); nobody else asks.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kitsune.ir import Launch
from kitsune.ir.program import Program

FILE = os.environ.get("MUTANTS_KNOWN_PROGRAMS")
RECORDS = "MUTANTS_RECORD" in os.environ
_known = set(Path(FILE).read_text().split()) if FILE and not RECORDS and Path(FILE).exists() else set[str]()


def is_known(launch: Launch, program: Program) -> bool:
    """Has this very program run on tensors of this very geometry? Where it is recorded, it has not yet."""
    if FILE is None:
        return False
    walks = [
        (kernel.domain, kernel.reduced, [(a.strides, a.value.type.offset, str(a.value.type)) for a in accesses])
        for kernel in launch.kernels
        for accesses in [(*kernel.loads, *(store.access for store in kernel.stores))]
    ]
    digest = hashlib.sha256(repr((program.text, program.parameters, program.tile, launch.tile, walks)).encode()).hexdigest()
    if RECORDS:
        with open(FILE, "a") as file:
            file.write(digest + "\n")
    return digest in _known
