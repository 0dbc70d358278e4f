"""Python's garbage collector while a context is open: it is not to be set off by Kitsune's own objects."""

import gc

# A followed step of BERT makes 2,500 objects that die with the step: with Python's 700 that is four collections where eager has
# none, each of which takes what is alive for old. After 60 steps all of the program's objects were looked at, which takes
# 0.1 s and more; with 10,000 that is once in thousands of steps.
AFTER = 10_000
# What a first step teaches stays: 40,000 objects of BERT, which the second step would be held up by for 15 ms.
MANY_NODES = 1_000


def look_at_new() -> None:
    """Take what has just been made for old, unless the program has the collector switched off."""
    if gc.isenabled():
        gc.collect(1)


class Threshold:
    """Between `begin` and `end` the youngest objects are looked at after AFTER new ones, unless the program has a number of its
    own that is larger, or has switched that off."""

    def __init__(self) -> None:
        self._before: tuple[int, int, int] | None = None
        self._begun = False

    def begin(self) -> None:
        """A first context is open."""
        first, *others = before = gc.get_threshold()
        if 0 < first < AFTER:
            self._before = before
            gc.set_threshold(AFTER, *others)
            if not self._begun and gc.isenabled():
                # What importing and building models has brought is looked at now, and not in the middle of the fifth step.
                self._begun = True
                gc.collect()

    def end(self) -> None:
        """None is open any more. What the program has set in the meantime stays."""
        before, self._before = self._before, None
        if before is not None and gc.get_threshold() == (AFTER, *before[1:]):
            gc.set_threshold(*before)
