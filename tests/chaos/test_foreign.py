"""Foreign modes, subclasses and higher-order operators in mid-training: they see what eager shows them, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

import kitsune
from tests.chaos.counting import Counts, Loop

Visitor = Callable[[Loop, int], Any]
VISITORS: dict[str, Visitor] = {}


def visitor(function: Visitor) -> Visitor:
    VISITORS[function.__name__] = function
    return function


@visitor
def fake_tensors(loop: Loop, i: int) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = torch.ones(3, 4) @ torch.ones(4, 2)
    return (tuple(made.shape), type(made).__name__)


@visitor
def fake_tensors_below_a_mode(loop: Loop, i: int) -> Any:
    with FlopCounterMode(display=False), FakeTensorMode():
        return tuple(torch.ones(3, 4).shape)


@visitor
def a_tracer(loop: Loop, i: int) -> Any:
    traced = make_fx(lambda x: x.sin() + 1)(loop.xs[i])
    return ([str(node.target) for node in traced.graph.nodes], traced(loop.xs[i]).clone())


@visitor
def a_count_of_flops(loop: Loop, i: int) -> Any:
    with FlopCounterMode(display=False) as counter:
        loop.loss(i).backward()
    return counter.get_total_flops()


@visitor
def two_tensors_in_one(loop: Loop, i: int) -> Any:
    both = TwoTensor(loop.xs[i] * 2, loop.xs[i] * 3) * 2 + 1
    return [both.a.clone(), both.b.clone()]


@visitor
def a_branch_on_a_value(loop: Loop, i: int) -> Any:
    x = loop.xs[i] * 1
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)).detach().clone()


@visitor
def a_mode_that_changes_results(loop: Loop, i: int) -> Any:
    class Doubles(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            return result * 2 if func is torch.ops.aten.tanh.default else result

    with Doubles():
        loss = loop.loss(i)
    loss.backward()
    return loss.detach().clone()


@visitor
def a_function_mode(loop: Loop, i: int) -> Any:
    class Halves(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            return result * 0.5 if func is torch.nn.functional.cross_entropy else result

    with Halves():
        loss = loop.loss(i)
    loss.backward()
    return loss.detach().clone()


@visitor
def gradients_of_each_sample(loop: Loop, i: int) -> Any:
    parameters = {name: p.detach() for name, p in loop.model.named_parameters()}

    def loss(parameters: Any, x: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(loop.model, parameters, (x[None],))
        return torch.nn.functional.cross_entropy(out, y[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, loop.xs[i], loop.ys[i])
    return [g.clone() for g in found.values()]


@visitor
def an_ensemble_with_dropout(loop: Loop, i: int) -> Any:
    torch.manual_seed(i)
    x = loop.xs[i] * 2
    dropped = torch.func.vmap(lambda row: torch.nn.functional.dropout(row, 0.5), randomness="different")(x)
    return [dropped.clone(), torch.get_rng_state()]


@visitor
def a_sparse_gradient(loop: Loop, i: int) -> Any:
    table = torch.nn.Embedding(5, 3, sparse=True)
    with torch.no_grad():
        table.weight.copy_(torch.arange(15.0).view(5, 3))
    table(torch.tensor([1, 3])).sum().backward()
    assert table.weight.grad is not None
    return table.weight.grad.to_dense()


@visitor
def a_custom_operator(loop: Loop, i: int) -> Any:
    return (torch.ops.kitsune_chaos.twice(loop.xs[i] * 1) + 1).clone()


@library.custom_op("kitsune_chaos::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", VISITORS)
def test_in_mid_training(name: str, counts: Counts) -> None:
    """Steps 3 and 4 and 7 have a visitor; the steps between are followed."""

    def program(context: Callable[[], Any]) -> list[Any]:
        loop, seen = Loop(), []
        with context():
            for i in range(11):
                if i in (3, 4, 7):
                    seen.append(VISITORS[name](loop, i))
                    loop.optimizer.zero_grad()
                loop.step(i)
        return [*seen, loop.state()]

    counts.check(name, program)
    assert not _get_current_dispatch_mode_stack() and not torch._C._len_torch_function_stack()
    # The tracer ends while a mode of its own still sees calls: until the next context nothing is followed.
    assert kitsune.counters()["backwards_followed"] >= (1 if name == "a_tracer" else 4)
