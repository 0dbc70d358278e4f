"""Calls of torch's own modules go to the matchers of what they call. What makes a module do something else is seen at once."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import kitsune
from kitsune.lazy import module_calls, module_writer, trusted_modules
from kitsune.lazy.matcher_steps import MISS
from kitsune.lazy.recorder import Recorder

WARM_UP = 6
pytestmark = pytest.mark.usefixtures("taken")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The classes of the modules whose calls were taken."""
    calls: list[str] = []
    taker_of = module_writer._taker

    def counting(writer: Any) -> Any:
        taker = taker_of(writer)

        def counted(lane: Any, region: Any, node: Any, module: Any, args: Any, kwargs: Any) -> Any:
            result = taker(lane, region, node, module, args, kwargs)
            if result is not MISS:
                calls.append(type(module).__name__)
            return result

        return counted

    monkeypatch.setattr(module_writer, "_taker", counting)
    # A batch norm's count of batches is on the device on a GPU, and an operator like others there.
    monkeypatch.setattr(Recorder, "_is_host_counter", lambda recorder, args: False)
    # What optimizers of other tests that are still there have put on each call of a module.
    left = [(hooks, dict(hooks)) for hooks in trusted_modules.GLOBAL_HOOKS]
    for hooks, _ in left:
        hooks.clear()
    kitsune.reset()
    with kitsune.config.patch(gate=False, fuse=False):
        yield calls
    kitsune.reset()
    for hooks, before in left:
        hooks.update(before)


class Net(nn.Module):
    """One of each, in a row. `seen` is what a program could notice of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.bn, self.relu = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.pool, self.mean, self.drop, self.linear = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Dropout(0.3), nn.Linear(3, 4)
        self.seen: list[Any] = []
        self.before_bn: Callable[[Tensor], Tensor] = lambda h: h

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.relu(self.bn(self.before_bn(self.conv(x.neg())))))
        return self.linear(self.drop(self.mean(h).flatten(1)))


def hooked(register: str, module: str, hook: Any) -> Callable[[Net], Callable[[], Any]]:
    """A change: a hook is registered, and removed again."""
    return lambda net: getattr(getattr(net, module), register)(hook).remove


def replaced(owner: str, name: str, value: Any) -> Callable[[Net], Callable[[], Any]]:
    """A change: an attribute of the net, or of a part of it."""

    def change(net: Net) -> Callable[[], Any]:
        part = getattr(net, owner) if owner else net
        is_tensor, is_own, before = name in ("weight", "bias", "running_mean"), name in vars(part), getattr(part, name)
        setattr(part, name, value(before) if is_tensor else value)
        return lambda: setattr(part, name, before) if is_tensor or is_own or name == "__class__" else delattr(part, name)

    return change


def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[Net], Callable[[], Any]]:
    """A change: something else in the place of what is torch's own."""

    def change(net: Net) -> Callable[[], Any]:
        original, is_own = getattr(owner, name), name in vars(owner)
        setattr(owner, name, make(original))
        return lambda: setattr(owner, name, original) if is_own else delattr(owner, name)

    return change


def frozen(net: Net) -> Callable[[], Any]:
    net.conv.weight.requires_grad_(False)
    return lambda: net.conv.weight.requires_grad_(True)


def renamed(net: Net) -> Callable[[], Any]:
    """Two buffers have each other's name, and all are in the same order."""
    buffers = net.bn._buffers

    def undo() -> None:
        items = [
            ({"running_mean": "running_var", "running_var": "running_mean"}.get(name, name), t) for name, t in buffers.items()
        ]
        buffers.clear()
        buffers.update(items)

    undo()
    return undo


def evaluated(net: Net) -> Callable[[], Any]:
    net.bn.eval()
    return net.bn.train


def hooked_everywhere(net: Net) -> Callable[[], Any]:
    def note(module: Any, args: Any) -> None:
        net.seen.append(type(module).__name__)

    return nn.modules.module.register_module_forward_pre_hook(note).remove


class Named(Net):
    """Passes its arguments by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(input=self.drop(input=self.mean(self.pool(self.relu(input=self.bn(self.conv(x.neg()))))).flatten(1)))


class Functional(Net):
    """Has its last layer called with other parameters."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.mean(self.pool(self.relu(self.bn(self.conv(x.neg()))))).flatten(1))
        return functional_call(self.linear, {"weight": self.linear.weight * 2, "bias": torch.zeros(4)}, (h,))


def refuse(norm: Any, x: Tensor) -> None:
    raise ValueError("refused")


def doubled(original: Any) -> Any:
    return lambda module, name: original(module, name) * 2 if name == "weight" else original(module, name)


CHANGES: dict[str, Callable[[Net], Callable[[], Any]]] = {
    "another weight": replaced("conv", "weight", lambda weight: nn.Parameter(weight.detach() * 2)),
    "no bias": replaced("linear", "bias", lambda bias: None),
    "another buffer": replaced("bn", "running_mean", lambda mean: torch.ones(3)),
    "buffers renamed": renamed,
    "momentum": replaced("bn", "momentum", 0.5),
    "a stride": replaced("conv", "stride", (2, 2)),
    "more is dropped": replaced("drop", "p", 0.7),
    "an evaluation": evaluated,
    "in place": replaced("relu", "inplace", True),
    "a hook before": hooked("register_forward_pre_hook", "linear", lambda module, args: (args[0] * 2,)),
    "a hook behind": hooked("register_forward_hook", "relu", lambda module, args, output: output * 2),
    "a hook on all modules": hooked_everywhere,
    "its own forward": replaced("relu", "forward", torch.sigmoid),
    "compiled": replaced("relu", "_compiled_call_impl", torch.sigmoid),
    "another class": replaced("relu", "__class__", nn.Sigmoid),
    "by keyword": replaced("", "__class__", Named),
    "other parameters": replaced("", "__class__", Functional),
    "forward patched": patched(nn.Linear, "forward", lambda original: lambda module, x: original(module, x) * 2),
    "a method patched": patched(nn.Conv2d, "_conv_forward", lambda original: lambda *args: original(*args) * 2),
    "every call patched": patched(nn.Module, "_call_impl", lambda original: lambda module, *args: original(module, *args) * 1.5),
    "calls patched": patched(nn.Module, "__call__", lambda original: lambda module, *args: original(module, *args) * 1.5),
    "the function patched": patched(F, "linear", lambda original: lambda *args: original(*args) * 2),
    "a tensor's method patched": patched(Tensor, "add_", lambda original: lambda count, n: count.mul_(2)),
    "a dimension less": replaced("", "before_bn", lambda h: h.flatten(2)),
    "a check patched": patched(nn.BatchNorm2d, "_check_input_dim", lambda original: refuse),
    "attributes patched": patched(nn.Linear, "__getattr__", lambda original: doubled(original)),
    "a hook before gradients": hooked("register_full_backward_pre_hook", "linear", lambda module, grads: (grads[0] * 2,)),
    "a hook on gradients": hooked("register_full_backward_hook", "linear", lambda module, grads, _: (grads[0] * 2,)),
    "a frozen weight": frozen,
    "eps": replaced("bn", "eps", 0.1),
}


def train(changes: list[str], taken: list[str]) -> tuple[dict[str, list[Any]], list[set[str]]]:
    """A training with a step of each change, and others before it: what they gave, and what was taken in the last before it."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, foreach=True)
    x, y = torch.randn(2, 1, 8, 8), torch.randint(0, 4, (2,))
    found: dict[str, list[Any]] = {}
    usual: list[set[str]] = []

    def step() -> list[Any]:
        taken.clear()
        optimizer.zero_grad()
        try:
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
        except ValueError as error:
            return [str(error)]
        return [loss]

    for name in changes:
        # A module that has changed is known again from its third call on.
        for _ in range(WARM_UP):
            step()
        usual.append(set(taken))
        undo = CHANGES[name](net)
        found[name] = step()
        undo()
        found[name] += [*step(), *net.seen, *[t.detach().clone() for t in net.state_dict().values()]]
        # A region ends here, so that the next step begins one.
        net.linear.weight.sum().item()
    return found, usual


def test_one_that_is_changed_does_what_it_then_does(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_calls, "PATIENCE", 1)
    expected, _ = train([*CHANGES], [])
    with kitsune.accelerate(device="cpu"):
        found, usual = train([*CHANGES], taken)
    for name, values in expected.items():
        assert len(found[name]) == len(values), name
        for a, b in zip(found[name], values, strict=True):
            assert torch.equal(a, b) if isinstance(b, Tensor) else a == b, name
    # What is changed would have been taken, but for the last: a module that has had such hooks is another one for a while, and
    # three ways of one module are too many to know.
    for name, modules in zip([*CHANGES][:-3], usual[:-3], strict=True):
        assert modules == {type(module).__name__ for module in Net().children()}, name


def test_one_whose_weight_got_another_size_makes_what_that_makes(taken: list[str]) -> None:
    conv, x = nn.Conv2d(1, 2, 3), torch.randn(2, 1, 8, 8)
    small = torch.randn(2, 1, 1, 1)
    with kitsune.accelerate(device="cpu"), torch.no_grad():
        for _ in range(WARM_UP):
            conv(x.neg()).sum().item()
        assert taken
        conv.weight.data = small
        found = conv(x.neg()) * 2
        assert found.shape == (2, 2, 8, 8)
    assert torch.equal(found, F.conv2d(x.neg(), conv.weight, conv.bias) * 2)


def test_a_traced_module_has_its_operators(taken: list[str]) -> None:
    norm, x = nn.LayerNorm(3), torch.randn(2, 3)
    with kitsune.accelerate(device="cpu"), torch.no_grad():
        for _ in range(WARM_UP):
            (norm(x) * 2).sum().item()
        assert taken
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(norm, x)
    assert "aten::layer_norm" in str(traced.inlined_graph)


def test_what_is_known_of_a_module_goes_with_it(taken: list[str]) -> None:
    x = torch.randn(2, 3)
    with kitsune.accelerate(device="cpu"), torch.no_grad():
        norm = nn.LayerNorm(3)
        weight = weakref.ref(norm.weight)
        for _ in range(WARM_UP):
            (norm(x) * 2).sum().item()
        assert taken
        root = next(iter(kitsune.session._thread.depth)).recorder.region.node
        assert root.modules
        del norm
        assert weight() is None and not root.modules


def test_who_traces_modules_sees_each_call(taken: list[str]) -> None:
    with kitsune.accelerate(device="cpu"):
        assert "__call__" in vars(nn.Linear)
        graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "call_module", "output"]


class Tied(nn.Module):
    """Its last layer has the weight of its first, and one layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tokens, self.twice, self.last = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.last.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(self.twice(self.tokens(x))))


def tied() -> list[Tensor]:
    net = Tied()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=True)
    losses = []
    for k in range(WARM_UP + 2):
        optimizer.zero_grad()
        # The last short batch of an epoch, now and then.
        tokens = torch.arange(5 - k % 3 // 2)
        loss = F.cross_entropy(net(tokens), tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *net.state_dict().values()]


def test_a_weight_that_is_in_the_region_already_is_taken_too(taken: list[str]) -> None:
    expected = tied()
    with kitsune.accelerate(device="cpu"):
        found = tied()
        assert taken[-4:] == ["Embedding", "Linear", "Linear", "Linear"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_calls_that_were_taken_are_made_again_for_their_graph(taken: list[str]) -> None:
    def gradients(context: Any) -> list[Tensor]:
        net, x = Net(), torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
        given: list[Tensor] = []
        with context:
            for k in range(WARM_UP):
                net.zero_grad()
                taken.clear()
                loss = net(x).square().sum()
                if k == WARM_UP - 1:
                    # Asks for the graph, which no backward before had to have.
                    given.extend(torch.autograd.grad(loss, [net.conv.weight, net.bn.weight], retain_graph=True))
                loss.backward()
                loss.item()
            given += [p.grad for p in net.parameters()]
            given += [torch.tensor(buffer._version) for buffer in net.buffers()]
        return [t.detach().clone() for t in [*given, *net.buffers()]]

    expected, found = gradients(contextlib.nullcontext()), gradients(kitsune.accelerate(device="cpu"))
    assert "BatchNorm2d" in taken
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_many_modules_are_learned_a_few_in_each_step(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_calls, "MOST_LOOKS", 4)
    net, x = nn.Sequential(*(nn.Linear(3, 3) for _ in range(10))), torch.ones(2, 3)
    n_taken = []
    with kitsune.accelerate(device="cpu"):
        for _ in range(7):
            taken.clear()
            net(x.neg()).sum().item()
            n_taken.append(len(taken))
    # The first two are one region: a backward might have come.
    assert n_taken == [0, 0, 0, 0, 4, 8, 10]


@pytest.mark.parametrize(("many", "first"), [(100, 3), (1, 4)], ids=["few operators", "many"])
def test_the_step_that_is_captured_has_room_for_looks_at_small_programs_only(
    many: int, first: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_calls, "MANY_OPS", many)
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    optimizer, known = torch.optim.SGD(layer.parameters(), 0.1), []
    kitsune.reset()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        for _ in range(6):
            taken.clear()
            layer(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            known.append(bool(taken))
    kitsune.reset()
    # It is taken from the step behind its look on.
    assert known == [k >= first for k in range(6)]


def test_a_module_that_changes_in_each_step_is_looked_at_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    known = module_writer.ModuleWriter.known

    def counted(self: Any, *args: Any) -> Any:
        looks.append(k)
        return known(self, *args)

    monkeypatch.setattr(module_writer.ModuleWriter, "known", counted)
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    kitsune.reset()
    with kitsune.config.patch(gate=False), kitsune.accelerate(device="cpu"):
        for k in range(60):  # noqa: B007 - counted
            layer(x.neg()).sum().item()
            layer.weight.data = layer.weight.data.clone()
    kitsune.reset()
    # After 3, 3 * 2, 3 * 4 and 3 * 8 more; each is found to be out of date in the step behind it.
    assert looks == [2, 9, 22, 47]


@pytest.mark.parametrize("called", [True, False], ids=["by the next call", "by a reset"])
@pytest.mark.parametrize("ways", [1, 2])
def test_a_program_that_a_hook_refers_to_is_freed(ways: int, called: bool) -> None:
    """What takes a module's calls refers to its hooks, at each place where it was called."""

    class Program:
        def __init__(self) -> None:
            self.layer = nn.Linear(4, 4)

    def run() -> weakref.ref[Program]:
        program = Program()
        for k in range(16 * ways):
            x = torch.ones(2, 4) * 2 if k % ways else torch.ones(2, 4)
            program.layer(x).sum().backward()
            program.layer.zero_grad()
            kitsune.flush()
        program.layer.register_forward_hook(lambda *_: program and None)
        if called:
            program.layer(torch.ones(2, 4)).sum().backward()
        return weakref.ref(program)

    kitsune.reset()
    with kitsune.accelerate(device="cpu"):
        program = run()
    if not called:
        kitsune.reset()
    gc.collect()
    assert program() is None
