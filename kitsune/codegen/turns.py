"""Kernels over rows that add up, beside what they reduce along each row, places of all rows: a block has one row after the other.

The sums of a block stay in registers, a number for each place of its tile; it writes them when its last row is done. What is the
same for all rows, such as a weight, is loaded once.
"""

import re
from dataclasses import dataclass, field

import torch

from kitsune.codegen.body import Named
from kitsune.codegen.dtypes import LANGUAGE
from kitsune.codegen.machine_code import INDEX
from kitsune.codegen.reducers import at_once
from kitsune.codegen.rows import PLACES_IN_ROW, Rows, Statement
from kitsune.ir.plan import Step
from kitsune.ir.program import Size

# Bytes of a turn up to which two more are under way: three blocks of a multiprocessor hold as much of its shared memory each.
# On an H200 the backward of ViT-B/16's layer norms, with a residual and three sums, takes 44 us with turns ahead and 55
# without, where its bytes take 37; GPT-2's takes 29 instead of 36, of 24.
AHEAD = 32 << 10
_TURN = re.compile(r"\bturn\b")


@dataclass(slots=True)
class Turns(Rows):
    """A kernel whose blocks go through rows in turn."""

    # Is the step that is being written a sum of all rows? The names of those that were.
    adds: bool = False
    totals: set[str] = field(default_factory=set)

    @property
    def extents(self) -> list[Named]:
        """The rows that blocks share, their columns, and the turns."""
        return [*Rows.extents.fget(self), Named("turns", INDEX, Size(0, False))]  # type: ignore[attr-defined]

    def step(self, number: int, step: Step) -> None:
        """The statements of an op."""
        self.adds = number in self.kernel.gathered
        Rows.step(self, number, step)
        self.adds = False

    def reduce(self, kind: str, dtype: torch.dtype, text: str) -> tuple[str, ...]:
        """The names of a reduction's results."""
        if not self.adds:
            return Rows.reduce(self, kind, dtype, text)
        assert kind == "sum"
        text = self.let(text)
        name = f"a{self.n_temporaries}"
        self.n_temporaries += 1
        _, phase = self.known[name] = (True, self._nature(text)[1])
        self.totals.add(name)
        self.statements.append(Statement((name,), text, True, phase, "", "total", dtype))
        return (name,)

    def _held(self, stores: list[tuple[int, Statement]], columns: list[str]) -> list[str]:
        """A loop over rows, with what all of them have in common before it, and what is known after the last behind it."""
        before, inside, after = [*PLACES_IN_ROW, *columns], list[str](), list[str]()
        done = set(self.totals)
        for s in self.statements:
            if not done.isdisjoint(self._words(s.text)):
                after.append(s.line)
                done.update(s.targets)
            elif s.kind == "total":
                before.append(f"{s.targets[0]} = tl.full([XBLOCK, RBLOCK], 0.0, {LANGUAGE[s.dtype]})")
                inside.append(f"{s.targets[0]} += {s.text}")
            elif s.kind:
                inside += at_once(s)
            else:
                (before if "tl.load(" in s.text and not _TURN.search(s.text) else inside).append(s.line)
        for _, s in stores:
            (inside if done.isdisjoint(self._words(s.text)) else after).append(s.text)
        # What a later turn reads is on its way while this one is worked on, if there is room for it.
        each = sum(
            a.value.type.dtype.itemsize for a in self.kernel.loads if a.strides[0] and any(a.strides[-self.kernel.reduced :])
        )
        stages = f"3 if XBLOCK * RBLOCK * {each} <= {AHEAD} else 1"
        return [*before, f"for turn in tl.range(0, turns, num_stages={stages}):", *(f"    {line}" for line in inside), *after]
