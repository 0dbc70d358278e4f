"""A call of one of torch's own modules that is known at its place: the calls that it makes go to their matchers at once.

Most of the 12 us that a batch norm's Python takes are for hooks, for finding its parameters and for reaching the call lane twice.
The modules here compute from their attributes and their arguments alone; what could have them do something else is looked at each
time.
"""

import contextlib
import weakref
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from kitsune.lazy.hands_off import HARMLESS
from kitsune.lazy.matcher_steps import MISS
from kitsune.lazy.matcher_writer import Unsuited
from kitsune.lazy.module_writer import ModuleWriter, ways
from kitsune.lazy.trusted_modules import may_learn

# Sights of a module at a place from which on it is looked at closely, once for each: its calls may have no matchers yet. The
# third is mostly in a step that is captured, which has room for them: an MLP's fourth took 6 ms with them and 2 without (H200).
_LOOKS = (3, 5, 9)
# A module that has changed is looked at again, each time after twice as many sights, up to this many times as many: where a
# program gives all parameters other memory in each step, what is learned of them is good for nothing.
PATIENCE = 64
# Of a program of so many operators the third step has no room: GPT-2's took 146 ms, six of them for eight looks, where 1.5 times
# eager's and 50 are 138 (a slow host of an H200); its fourth waits for the device for 55.
MANY_OPS = 512
# Looks in one region, of 0.4 ms each (a CPU host): ResNet-50 would have 158 in its third step. With 40 of them its sixth took
# 46 ms, where 43 are 1.5 times eager's.
MOST_LOOKS = 8


class _Heard(TorchFunctionMode):
    """Notes the calls of torch's API that are made while it is entered, and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in HARMLESS:
            self.calls.append((func, args, kwargs, result))
        return result


class NotYet:
    """Takes the calls of a module at a place where it is not known yet. (Not a function: it counts them.)"""

    def __init__(self, matchers: dict[Any, Any]) -> None:
        self._n = self._n_looks = 0
        self._patience = 1
        self._matchers = matchers

    def __call__(self, lane: Any, region: Any, node: Any, module: Any, args: Any, kwargs: Any) -> Any:
        """Have the module called, and learn from it."""
        self._n += 1
        first = _LOOKS[self._n_looks] + (lane.recorder.n_nodes > MANY_OPS)
        if self._n < first * self._patience or region.n_looks >= MOST_LOOKS:
            return MISS
        self._n_looks += 1
        if self._n_looks == len(_LOOKS):
            node.matchers[id(module)] = _never
        if region.slow or region.real or kwargs or not may_learn(module):
            return MISS
        region.n_looks += 1
        n_followed, heard = lane.recorder.tally.followed, _Heard()
        with heard:
            result = nn.Module.__call__(module, *args)
        recorder = lane.recorder
        if recorder.region is region and recorder.tally.followed - n_followed == len(heard.calls) and heard.calls:
            for way in ways(node, heard.calls, region.node):
                with contextlib.suppress(Unsuited):
                    writer = ModuleWriter(module, args, recorder.arrivals, self.anew, self.hooked)
                    node.matchers[id(module)] = writer.known(way, heard.calls, result)
                    return result
        return result

    def anew(self, node: Any, module: Any) -> Any:
        """The module has changed, and may stay as it is now."""
        self._n = self._n_looks = 0
        self._patience = min(2 * self._patience, PATIENCE)
        self._matchers[id(module)] = self
        return MISS

    def hooked(self, node: Any, module: Any) -> Any:
        """The module has hooks. What takes its calls, anywhere, holds them and what they refer to, which may be the module."""
        for taker in list(_takers.get(module, ())):
            taker.anew(node, module)
        return MISS


# By module, at all places.
_takers: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[NotYet]] = weakref.WeakKeyDictionary()


def at_first(node: Any, module: Any) -> NotYet:
    """From now on calls of a module at a node are looked at."""
    number, matchers, modules = id(module), node.matchers, node.modules

    def dead(_: Any) -> None:
        matchers.pop(number, None)
        modules.pop(number, None)

    matchers[number] = taker = NotYet(matchers)
    _takers.setdefault(module, weakref.WeakSet()).add(taker)
    # An id is good for as long as its module lives.
    modules[number] = weakref.ref(module, dead)
    return taker


def _never(lane: Any, region: Any, node: Any, module: Any, args: Any, kwargs: Any) -> Any:
    return MISS
