"""A call of one of torch's own modules that is known at its place: the calls that it makes go to their matchers at once.

Most of the 12 us that a batch norm's Python takes are for hooks, for finding its parameters and for reaching the call lane twice.
The modules here compute from their attributes and their arguments alone; what could have them do something else is looked at each
time.
"""

import functools
import weakref
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _of_all
from torch.overrides import TorchFunctionMode

from kitsune.lazy.hands_off import HARMLESS
from kitsune.lazy.matchers import MISS
from kitsune.lazy.replaced import is_torchs
from kitsune.lazy.tensor import LazyTensor

# Torch's modules whose calls are taken, with the functions that they call. Their methods are looked at, too.
_CALLS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.LayerNorm: "layer_norm",
    nn.Embedding: "embedding",
    nn.Dropout: "dropout",
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.MaxPool2d: "max_pool2d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
}
_METHODS = ("forward", "__getattr__", "_call_impl", "_conv_forward", "_check_input_dim")
_BASE: Any = nn.Module.__call__
# By class, the methods and functions that its calls go through: (owner, name, what is there when nobody has put another there).
_Trusted = list[tuple[Any, str, Any]]


def _trusted(cls: type[nn.Module], function: str) -> _Trusted:
    found: _Trusted = [(cls, name, getattr(cls, name)) for name in _METHODS if hasattr(cls, name)]
    return [*found, (F, function, getattr(F, function)), (Tensor, "add_", Tensor.add_)]


_TRUSTED = {cls: _trusted(cls, name) for cls, name in _CALLS.items() if all(is_torchs(it) for *_, it in _trusted(cls, name))}
KNOWN = frozenset(_TRUSTED) if is_torchs(_BASE) else frozenset()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(_of_all, f"_global{name}") for name in _HOOKS]
# Attributes are compared by identity, which tells all of those of these types.
_FIXED = {bool, int, float, str, type(None)}
# Sights of a module at a place at which it is looked at closely: its calls may have no matchers yet.
_LOOKS = (3, 5, 9)


class Unsuited(Exception):
    """This module is left to torch."""


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

    def __init__(self) -> None:
        self._n = 0

    def __call__(self, lane: Any, region: Any, node: Any, module: Any, args: Any, kwargs: Any) -> Any:
        """Have the module called, and learn from it."""
        self._n += 1
        if self._n not in _LOOKS or kwargs or not _may_learn(module):
            return MISS
        n_followed, heard = lane.recorder.tally.followed, _Heard()
        with heard:
            result = nn.Module.__call__(module, *args)
        # Calls that cannot be followed are left to torch at once.
        if lane.recorder.tally.followed - n_followed == len(heard.calls):
            try:
                known = _Writer(module, args).known(heard.calls, result)
            except Unsuited:
                known = _never
            node.matchers[id(module)] = known
        elif self._n >= _LOOKS[-1]:
            node.matchers[id(module)] = _never
        return result


def at_first(node: Any, module: Any) -> NotYet:
    """From now on calls of a module at a node are looked at."""
    number, matchers, modules = id(module), node.matchers, node.modules

    def dead(_: Any) -> None:
        matchers.pop(number, None)
        modules.pop(number, None)

    matchers[number] = taker = NotYet()
    # An id is good for as long as its module lives.
    modules[number] = weakref.ref(module, dead)
    return taker


def _anew(node: Any, module: Any) -> Any:
    """The module has changed, and may stay as it is now."""
    node.matchers[id(module)] = NotYet()
    return MISS


def _may_learn(module: Any) -> bool:
    """Is it called as torch would by itself? What hooks do is no part of what it does."""
    if nn.Module.__call__ is not _BASE or any(getattr(owner, name) is not it for owner, name, it in _TRUSTED[type(module)]):
        return False
    return not (any(_GLOBAL_HOOKS) or any(getattr(module, name) for name in _HOOKS))


def _never(lane: Any, region: Any, node: Any, module: Any, args: Any, kwargs: Any) -> Any:
    return MISS


class _Writer:
    """Writes what takes the calls of one module at one place, from a call that was heard."""

    def __init__(self, module: Any, args: Any) -> None:
        self._module, self._args = module, args
        self._constants: dict[str, Any] = {}

    def _bind(self, value: Any) -> str:
        name = f"K{len(self._constants)}"
        self._constants[name] = value
        return name

    def known(self, calls: Any, result: Any) -> Any:
        lines = [*self._as_it_was(), *self._as_called(len(calls))]
        for k, (func, args, kwargs, _) in enumerate(calls):
            given = "".join(f"{self._name(a)}, " for a in args)
            # One for all calls: nobody writes to it.
            options = self._bind(kwargs) if not any(isinstance(a, Tensor) for a in kwargs.values()) else self._dict(kwargs)
            f = self._bind(func)
            lines.append(f"a{k} = ({given}); node = region.node; matcher = node.matchers.get({f})")
            lines.append(f"r{k} = MISS if matcher is None else matcher(lane, region, node, a{k}, {options})")
            # What is begun is finished, as the module would.
            lines.append(f"if r{k} is MISS: " + (f"r{k} = {f}(*a{k}, **{options})" if k else "return MISS"))
        if result is not calls[-1][-1]:
            raise Unsuited
        lines.append(f"return r{len(calls) - 1}")
        return _maker("\n        ".join(lines), tuple(self._constants))(*self._constants.values())

    def _as_it_was(self) -> list[str]:
        """Is the module as it was, its hooks, its parameters; and is torch as it is by itself?"""
        kept = vars(self._module)
        for name, value in kept.items():
            is_whole = type(value) in _FIXED or isinstance(value, (tuple, dict))
            if not is_whole and name not in ("_non_persistent_buffers_set", "_reversed_padding_repeated_twice"):
                raise Unsuited
        cls = self._bind(type(self._module))
        trusted = _TRUSTED[type(self._module)]
        methods = self._bind(attrgetter(*[name for owner, name, _ in trusted if owner is type(self._module)]))
        as_known = self._bind(tuple(it for owner, _, it in trusted if owner is type(self._module)))
        others = [f"{self._bind(owner)}.{name} is not {self._bind(it)}" for owner, name, it in trusted if owner in (F, Tensor)]
        hooks = [self._bind(kept[name]) for name in _HOOKS] + [self._bind(hooks) for hooks in _GLOBAL_HOOKS]
        values = self._bind(list(kept.values()))
        return [
            f"if type(module) is not {cls} or Module.__call__ is not BASE or {' or '.join(others)}: return MISS",
            f"if {methods}({cls}) != {as_known}: return MISS",
            "own = module.__dict__; parameters, buffers = own['_parameters'], own['_buffers']",
            f"if len(own) != {len(kept)} or not all(map(is_, own.values(), {values})): return anew(node, module)",
            f"if {' or '.join(hooks)}: return MISS",
            self._same_tensors("parameters"),
            self._same_tensors("buffers"),
        ]

    def _same_tensors(self, table: str) -> str:
        ids = [*map(id, vars(self._module)[f"_{table}"].values())]
        return f"if [*map(id, {table}.values())] != {self._bind(ids)}: return anew(node, module)"

    def _as_called(self, n_calls: int) -> list[str]:
        """Are the arguments those that it was called with? With one call its matcher says so, before anything has happened."""
        lines = [f"if kwargs or len(args) != {len(self._args)}: return MISS"]
        for k, a in enumerate(self._args):
            if n_calls > 1:
                if type(a) is not LazyTensor:
                    raise Unsuited
                known = self._bind(a.cell.ref)
                lines.append(f"if type(args[{k}]) is not LazyTensor or args[{k}].cell.region is not region: return MISS")
                lines.append(f"if args[{k}].cell.ref is not {known}: return MISS")
        return lines

    def _dict(self, kwargs: Any) -> str:
        return "{" + ", ".join(f"{name!r}: {self._name(a)}" for name, a in kwargs.items()) + "}"

    def _name(self, a: Any) -> str:
        """An argument of a call, in terms of the module's."""
        if isinstance(a, Tensor):
            names = [f"args[{k}]" for k, given in enumerate(self._args) if a is given]
            for table in ("parameters", "buffers"):
                names += [f"{table}[{name!r}]" for name, tensor in vars(self._module)[f"_{table}"].items() if a is tensor]
            # What stands for two things now need not the next time.
            if len(names) != 1:
                raise Unsuited
            return names[0]
        if type(a) in _FIXED or (type(a) is tuple and {*map(type, a)} <= _FIXED):
            return self._bind(a)
        raise Unsuited


@functools.lru_cache(maxsize=256)
def _maker(body: str, names: tuple[str, ...]) -> Any:
    text = f"""
def make({", ".join(names)}):
    def taker(lane, region, node, module, args, kwargs{"".join(f", {name}={name}" for name in names)}):
        {body}
    return taker
"""
    names_in: dict[str, Any] = {
        "BASE": _BASE,
        "LazyTensor": LazyTensor,
        "MISS": MISS,
        "anew": _anew,
        "Module": nn.Module,
        "is_": is_,
    }
    exec(compile(text, "<kitsune module call>", "exec"), names_in)
    return names_in["make"]
