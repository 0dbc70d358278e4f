"""Quiet while steps are timed: what works in the background, or tries something beside the steps, waits for as long."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator

# Seconds that it lasts after it was asked for: it is asked for again at the end of each step, and who makes no more steps in the
# middle of a look holds nothing up.
LASTS = 0.5
# Who waits for its end looks so often. (No lock to wait at: a forked child would inherit it, held by a thread that is not there.)
LOOK_S = 0.05
# Seconds after which whoever is still busy is not waited for any more: a large kernel takes a compiler 0.7 s.
PATIENCE = 1.0


class Quiet:
    """Asked for by who times steps, in any thread, and kept by all others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = -math.inf
        # When it was first asked for.
        self._since: float | None = None
        # Threads in the middle of something.
        self._busy: set[int] = set()

    def ask(self) -> bool:
        """Nothing is to be begun for LASTS seconds. Is nothing going on any more, or has that been waited for long enough?"""
        now = self._clock()
        if self._since is None:
            self._since = now
        self._until = now + LASTS
        return not self._busy or now - self._since >= PATIENCE

    def end(self) -> None:
        """Nobody times steps any more, or somebody waits for what is being made."""
        self._until, self._since = -math.inf, None

    @property
    def is_on(self) -> bool:
        """Is nothing to be begun now?"""
        return self._clock() < self._until

    def wait(self, closing: Callable[[], bool]) -> None:
        """Return once something may be begun, or when it is `closing`."""
        while self.is_on and not closing():
            time.sleep(LOOK_S)

    def alone(self) -> None:
        """No other thread is there: in a forked child, which has inherited what they were in the middle of."""
        self._busy &= {threading.get_ident()}

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Something that cannot be interrupted is going on."""
        self._busy.add(threading.get_ident())
        try:
            yield
        finally:
            self._busy.discard(threading.get_ident())


quiet = Quiet()
os.register_at_fork(after_in_child=quiet.alone)
