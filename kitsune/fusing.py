"""What `kitsune.fusion.FusionEngine` has done by the stages: planning, recording of names, running, attention."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from kitsune.attention_rewrite import with_attention
from kitsune.engine_options import EngineOptions
from kitsune.fusion import Rules, engine
from kitsune.ir import Graph, Plan
from kitsune.named_ops import record
from kitsune.pipeline import listeners, planned_for
from kitsune.session import Accelerate


class Works:
    """See `kitsune.fusion.engine.Works`."""

    def plan(self, graph: Graph, rules: Rules) -> Plan:
        """The plan of a graph for the GPU that is here and, where there is none, an sm_90."""
        return planned_for(graph, None, rules)

    def record(self, names: Sequence[str]) -> tuple[Graph, list[int]]:
        """A graph of the named operators, each on what the one before has made."""
        return record(names)

    def with_attention(self, fn: Any) -> tuple[Any, int, str | None]:
        """Library attention for product, softmax, product."""
        return with_attention(fn)

    def running(self, fn: Any, rules: Rules, seen: Callable[[Graph], None], took: Callable[[float], None]) -> Any:
        """A function that does the same inside a context with these rules; of a module, a copy that shares everything."""
        context = Accelerate(options=EngineOptions(rules=rules))
        if not isinstance(fn, nn.Module):
            return _inside(fn, context, seen, took)
        twin = copy.copy(fn)
        twin.__dict__ = fn.__dict__.copy()
        twin.forward = _inside(fn.forward, context, seen, took)
        return twin


def _inside(fn: Callable[..., Any], context: Accelerate, seen: Any, took: Callable[[float], None]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def fused(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        listeners.append(seen)
        try:
            with context:
                result = fn(*args, **kwargs)
        finally:
            listeners.remove(seen)
        took(time.perf_counter() - start)
        return result

    return fused


engine.works = Works()
