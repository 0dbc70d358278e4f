"""Python's garbage collector while a context is open: it is not to be set off by Kitsune's own objects."""

import gc

# A followed step of BERT makes 2,500 objects that die with the step: with Python's 700 that is four collections where eager has
# none, each of which takes what is alive for old. After 60 steps all of the program's objects were looked at, which takes
# 0.1 s and more; with 10,000 that is once in thousands of steps.
AFTER = 10_000
# What the first sight of a region teaches stays: so many objects for an op, which are not counted. BERT's are 31, with what is
# known of its calls; they set off nine collections in its first step, where 7 % of the time went into them (CPU host). Those of a
# forward of linear layers, which comes first, are 61.
OBJECTS = 64
# They are taken for old behind a capture, while the device runs its first replay, and after so many regions at the latest.
LATEST = 4

# Collections of the second generation before everything is looked at: 0.2 s for the 480,000 objects that a model and its
# libraries had brought (`gc.collect()`; H200's host).
SELDOM = 100
# Contexts that come and go so often, one around each step, leave the numbers between them. With Python's own there, 400 steps of
# a small ResNet-50 under a KitsuneOptimizer had 30 collections, and have 2 (CPU).
OPENINGS = 4


class Threshold:
    """Between `begin` and `end` the youngest objects are looked at after AFTER new ones and all of them SELDOM, unless the
    program has a number of its own that is larger, or has switched that off."""

    def __init__(self) -> None:
        # What the program has, and what it has been given in the place of that.
        self._before: tuple[int, int, int] | None = None
        self._ours: tuple[int, int, int] | None = None
        self._begun = self._hears = False
        self._n_openings = 0
        # What is not counted is still to be looked at, for once.
        self.owes_look = False
        # Is a context open, and was one since the last collection?
        self._is_open = self._was_open = False

    def begin(self) -> None:
        """A first context is open."""
        self._is_open = self._was_open = True
        before = gc.get_threshold()
        if self._before is not None and before == self._ours:
            return
        self._before, (first, second, third) = None, before
        if 0 < first < AFTER:
            self._before, self._ours = before, (AFTER, second, max(third, SELDOM))
            gc.set_threshold(*self._ours)
            if not self._begun and gc.isenabled():
                # What importing and building models has brought is looked at now, and not in the middle of the fifth step.
                self._begun = True
                gc.collect()

    def grows(self, n: int) -> None:
        """So many more ops are known."""
        self.owes_look = True
        self._put_on(n * OBJECTS)

    def look(self) -> None:
        """Take what has been made so far for old, unless the program has the collector switched off."""
        self.owes_look = False
        if gc.isenabled():
            gc.collect(1)
        if self._ours is not None:
            self._put_on(AFTER - self._ours[0])

    def _put_on(self, n: int) -> None:
        """Let so many more objects be made between two collections, if the numbers are still those of this."""
        if self._before is not None and self._ours is not None and gc.get_threshold() == self._ours:
            self._ours = (self._ours[0] + n, *self._ours[1:])
            gc.set_threshold(*self._ours)

    def end(self) -> None:
        """None is open any more. What the program has set in the meantime stays."""
        self._is_open = False
        self._n_openings += 1
        if self._n_openings < OPENINGS:
            self._restore()
        elif not self._hears:
            self._hears = True
            gc.callbacks.append(self._collected)

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        """Two collections with no context in between: the program does something else now."""
        if phase == "stop" and not self._is_open:
            if not self._was_open:
                self._restore()
            self._was_open = False

    def _restore(self) -> None:
        before = self._before
        if before is not None and gc.get_threshold() == self._ours:
            gc.set_threshold(*before)
        # Last of all, since an interrupt may come at any line.
        self._before = None


# Of the process, as the collector is.
threshold = Threshold()
