"""Writes what takes the calls of one of torch's modules at one place, from calls that were heard; see `module_calls.py`."""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.nn import Parameter, functional as F

from kitsune.lazy.cell import Ref
from kitsune.lazy.edges import Edge
from kitsune.lazy.matcher_steps import compiled, followed, only_under, tuple_of, under_lock
from kitsune.lazy.matcher_writer import Fresh, Unsuited, Writer, example_of, value_in
from kitsune.lazy.matchers import learned_by
from kitsune.lazy.recording import PLAIN
from kitsune.lazy.tensor import LazyTensor
from kitsune.lazy.trusted_modules import BASE, GLOBAL_HOOKS, HOOKS, TRUSTED

# Attributes are compared by identity, which tells all of those of these types.
_FIXED = {bool, int, float, str, type(None)}
# Others of a module's that do not change what a call does.
_OTHERS = ("_non_persistent_buffers_set", "_reversed_padding_repeated_twice")
_TABLES = {"p": "_parameters", "b": "_buffers"}


class ModuleWriter(Writer):
    """Writes what takes the calls of one module at one place. What they are given of its attributes is compared as these."""

    def __init__(
        self, module: Any, args: Any, arrivals: dict[int, Any], anew: Callable[[Any, Any], Any], hooked: Callable[[Any, Any], Any]
    ) -> None:
        super().__init__()
        self._module, self._args, self._arrivals, self._anew, self._hooked = module, args, arrivals, anew, hooked
        # The module's own tensors, by the names that they get: p0, p1 of its parameters, b0, b1 of its buffers.
        self._own = {f"{sign}{k}": t for sign, table in _TABLES.items() for k, t in enumerate(vars(module)[table].values())}
        # Serials of those that come into the region, by name.
        self._come: dict[str, int] = {}

    def known(self, edges: list[tuple[Edge, Any, Any]], calls: list[Any], result: Any) -> Any:
        """What takes calls that do along these edges what the calls have done that were heard."""
        if result is not calls[-1][-1] or any(edge.modes is not edges[0][0].modes for edge, *_ in edges):
            raise Unsuited
        only_under(self, edges[0][0])
        self._as_it_was()
        self.lines.append(f"if kwargs or len(args) != {len(self._args)}: return MISS")
        start, then, returned = "node", [], ""
        for (func, args, kwargs, _), (edge, key, matcher) in zip(calls, edges, strict=True):
            # Where more has been learned of the function's calls, or something forgotten, another matcher is there.
            at_place = f"{start}.matchers.get({self.bind(func)}) is {self.bind(matcher)}"
            self.lines.append(f"if not ({at_place}): return anew(node, module)")
            lines, returned = self._call(edge, key, args, kwargs, alone=len(calls) == 1)
            then += lines
            start = self.bind(edge.node)
        unknown = [f"id({name}) != {self.bind(id(t))}" for name, t in self._own.items() if name not in self._come]
        if unknown:
            self.lines.insert(self._after_tensors, f"if {' or '.join(unknown)}: return anew(node, module)")
        under_lock(self, then, returned)
        return _taker(self)

    def _as_it_was(self) -> None:
        """Is the module as it was, its hooks, its parameters; and is torch as it is by itself?"""
        kept = vars(self._module)
        for name, value in kept.items():
            if not (_is_fixed(value) or isinstance(value, dict) or name in _OTHERS):
                raise Unsuited
        if kept.get("padding_mode", "zeros") != "zeros" or kept["_modules"]:
            raise Unsuited
        cls = self.bind(type(self._module))
        trusted = TRUSTED[type(self._module)]
        methods = self.bind(attrgetter(*[name for owner, name, _ in trusted if owner is type(self._module)]))
        as_known = self.bind(tuple(it for owner, _, it in trusted if owner is type(self._module)))
        others = [f"{self.bind(owner)}.{name} is not {self.bind(it)}" for owner, name, it in trusted if owner in (F, Tensor)]
        own_hooks = [self.bind(kept[name]) for name in HOOKS]
        hooks = [self.bind(hooks) for hooks in GLOBAL_HOOKS]
        values = self.bind(list(kept.values()))
        base, anew = self.bind(BASE), self.bind(self._anew)
        self.lines += [
            f"if type(module) is not {cls} or Module.__call__ is not {base} or {' or '.join(others)}: return MISS",
            f"if {methods}({cls}) != {as_known}: return MISS",
            f"own, anew = module.__dict__, {anew}",
            f"if len(own) != {len(kept)} or not all(map(is_, own.values(), {values})): return anew(node, module)",
            f"if {' or '.join(own_hooks)}: return {self.bind(self._hooked)}(node, module)",
            f"if {' or '.join(hooks)} or own['_modules'] or tracing() is not None: return MISS",
        ]
        for sign, table in _TABLES.items():
            names = list(kept[table])
            self.lines.append(
                f"if [*own['{table}']] != {self.bind(names)}: return anew(node, module)"
                if names
                else f"if own['{table}']: return anew(node, module)"
            )
            if names:
                self.lines.append(", ".join(f"{sign}{k}" for k in range(len(names))) + f", = own['{table}'].values()")
        self._after_tensors = len(self.lines)

    def _call(self, edge: Edge, key: Any, args: Any, kwargs: Any, alone: bool) -> tuple[list[str], str]:
        """Compare one call, and what follows."""
        self.begin()
        came = {storage for *_, storage, _ in edge.arrivals}
        if edge.node.full or edge.plain or not (alone or came.issuperset(edge.dirty)):
            raise Unsuited
        given = [self._given(a, part, alone) for a, part in zip(args, key[2 : 2 + len(args)], strict=True)]
        parts = key[3 + len(args) :: 2]
        options = [f"{name!r}: {self._given(a, part, alone)}" for (name, a), part in zip(kwargs.items(), parts, strict=True)]
        known = [self.constants[name] for name in self.floats]
        if not edge.moves and [*map(float.hex, known)] != [*map(float.hex, edge.floats)]:
            raise Unsuited
        found = followed(self, edge, tuple_of(given), "{" + ", ".join(options) + "}" if options else "None")
        return found

    def _given(self, a: Any, key: Any, alone: bool) -> str:
        """An argument of a call, compared."""
        name = self._named(a)
        if type(a) is float:
            self.floats.append(name)
        elif name in self._own:
            self._own_tensor(name, a, key)
        elif isinstance(a, Tensor):
            if not alone and type(a) is not LazyTensor:
                # What comes in with one call is known to the next.
                raise Unsuited
            in_region = isinstance(key, Ref) or key[0] == "graded"
            if type(a) is LazyTensor and in_region and value_in(key)[1] is not (a.cell.owed is not None):
                # The way of a call without a graph, to the same operators.
                raise Unsuited
            name = self.name(name)
            self.part(name, example_of(a), key)
        return name

    def _named(self, a: Any) -> str:
        """An argument of a call in terms of the module's, or of its attributes."""
        if not isinstance(a, Tensor):
            if not _is_fixed(a) or (type(a) is tuple and float in map(type, a)):
                raise Unsuited
            return self.bind(a)
        names = [name for name, tensor in self._own.items() if a is tensor]
        names += [f"args[{k}]" for k, given in enumerate(self._args) if a is given]
        # What stands for two things now need not the next time.
        if len(names) != 1:
            raise Unsuited
        return names[0]

    def _own_tensor(self, name: str, tensor: Tensor, key: Any) -> None:
        """The recorder has an entry of each tensor that comes in, which goes when the tensor does, or may have changed."""
        cls, entry = "Parameter" if type(tensor) is Parameter else "Tensor", self._arrivals.get(id(tensor))
        if name in self._come:
            raise Unsuited
        if type(tensor) not in PLAIN or isinstance(key, Ref) or key[0] == "graded":
            # It was made in the context, or is in the region: an embedding's weight is that of the last layer, too.
            self.part(name, example_of(tensor), key)
            return
        if entry is None or entry[2] is not key or key[1] is not None or entry[1] in self._come.values():
            raise Unsuited
        serial, number = self.bind(entry[1]), self.bind(id(tensor))
        same = f"type({name}) is {cls} and arrivals.get(id({name})) is {self.bind(entry)}"
        self.lines.append(f"if not ({same}): return anew(node, module)")
        self._come[name] = entry[1]
        self.flat.append(name)
        self.cells.append(f"{name}_cell")
        self.enters(Fresh(name, f"{name}_cell", serial, number))

    def may_share(self, new: Fresh, other: Fresh) -> bool:
        """Those that are known by their entries are known to be different."""
        return not (new.tensor in self._come and other.tensor in self._come)


def ways(node: Any, calls: list[Any], end: Any) -> Iterator[list[tuple[Edge, Any, Any]]]:
    """The edges along which calls in a row may have led from one node to another, with their keys and the matchers that take
    them."""
    func, args, kwargs, _ = calls[0]
    matcher = node.matchers.get(func)
    for edge, key in learned_by(matcher):
        # Calls of another form may lead there as well.
        alike = len(key) == 2 + len(args) + 2 * len(kwargs) and list(key[2 + len(args) :: 2]) == list(kwargs)
        if alike and len(calls) > 1:
            yield from ([(edge, key, matcher), *way] for way in ways(edge.node, calls[1:], end))
        elif alike and edge.node is end:
            yield [(edge, key, matcher)]


def _is_fixed(value: Any) -> bool:
    """Can this be told by its identity?"""
    return type(value) in _FIXED or (type(value) is tuple and {*map(type, value)} <= _FIXED)


def _taker(writer: Writer) -> Any:
    return compiled(writer, "lane, region, node, module, args, kwargs")
