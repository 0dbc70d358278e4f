"""What the call lane owes to autograd, and when that is told of it."""

import threading
import weakref
from typing import Any

import torch

from kitsune.lazy import sites
from kitsune.lazy.forgiven import forgive
from kitsune.lazy.learning import Learner
from kitsune.lazy.realize import attach_spent, realize, settle_spent, tensor_is_spent
from kitsune.lazy.rebuild import tensors_in
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.used_again import keep


class Debtor(Learner):
    """Owes the graph of calls that were followed."""

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self.spent: list[weakref.ref[LazyTensor]] = []  # wrappers whose graph a followed backward has used up
        # How many calls of torch's API torch is making now, and in which thread those are that come here.
        self.inside, self.thread = 0, threading.get_ident()

    def stray(self, args: Any, kwargs: Any) -> bool:
        """An op comes that no call of the API has brought: may autograd know of its operands? True if it must come again."""
        region = self.recorder.region
        region.unfold()
        keep((args, kwargs))
        if not torch.is_grad_enabled():
            return False
        tensors = tensors_in((args, kwargs))
        virtual = any(type(t) is LazyTensor and t.cell.owed is not None for t in tensors)
        if virtual or (not region.real and any(t.requires_grad for t in tensors)):
            self.own_up(tensors)
            region.real, region.past = True, None
        return virtual

    def region_ends(self, region: Any, for_good: bool) -> None:
        """What it owes is settled: by its end, or because it is run so far."""
        if for_good:
            forgive(region)
        self.own_up()

    def lose_track(self) -> None:
        """Something begins that builds or reads a graph where calls do not show it."""
        if not self.inside:
            self.own_up()
            settle_spent(self)
            self.recorder.region.real, self.recorder.region.past = True, None

    def own_up(self, tensors: Any = (), asked: bool = True) -> None:
        """From here on autograd is to know of every call so far; the program has `asked` for that, or a backward wants it."""
        # Another thread may flush, and do it at this moment.
        with self.recorder.lock:
            region = self.recorder.region
            region.unfold()
            if region.calls:
                inside = self.inside
                try:
                    # Another thread's is no call of this one's.
                    self.inside += threading.get_ident() == self.thread
                    self.recorder.tally.made_again(sites.user_site() if asked else sites.UNKNOWN)
                    realize(self.recorder, region)
                finally:
                    self.inside = inside
        self.attach(tensors)

    def attach(self, tensors: Any) -> None:
        """Let autograd know which of these had a graph that is used up: no call of the program's."""
        inside = self.inside
        try:
            self.inside += threading.get_ident() == self.thread
            for tensor in tensors:
                if tensor_is_spent(tensor):
                    attach_spent(self.recorder, tensor)
        finally:
            self.inside = inside
