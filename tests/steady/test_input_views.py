"""Views of tensors that only come in are taken at once, and neither the lane nor the recorder hears of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import kitsune
from kitsune.lazy import views
from kitsune.lazy.input_views import VIEWS
from kitsune.lazy.tensor import LazyTensor

pytestmark = pytest.mark.usefixtures("repeatable")
INDEX = torch.tensor([1, 0])

TAKEN: dict[str, Callable[[Tensor], Any]] = {
    "a row": lambda x: x[1],
    "columns": lambda x: x[:, 1:-1],
    "from the end": lambda x: x[..., -1],
    "a dimension": lambda x: x[None, ::2],
    "all": lambda x: x[:],
    "whole": lambda x: x[...],
    "of nothing": lambda x: x[()],
    "an empty part": lambda x: x[4:],
    "view": lambda x: x.view(2, -1),
    "view of a size": lambda x: x.view(torch.Size([12])),
    "view_as": lambda x: x.view_as(x.sum() + torch.zeros(6, 2)),
    "expand": lambda x: x[:, :1].expand(-1, 5),
    "expand_as": lambda x: x[:1].expand_as(x * 2),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "permute": lambda x: x.permute(1, 0),
    "permute a list": lambda x: x.permute([1, 0]),
    "select": lambda x: x.select(0, 2),
    "squeeze": lambda x: x[:1].squeeze(0),
    "squeeze all": lambda x: x[:1].squeeze(),
    "t": lambda x: x.t(),
    "transpose": lambda x: x.transpose(0, -1),
    "unsqueeze": lambda x: x.unsqueeze(1),
}
OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "elements": lambda x: x[[0, 2]],
    "elements of two": lambda x: x[[0, 1], [1, 1]],
    "by a tensor": lambda x: x[INDEX],
    "by a tensor and a slice": lambda x: x[:, INDEX],
    "as bytes": lambda x: x.view(torch.int32),
    "by name": lambda x: x.view(size=(12,)),
    "too far": lambda x: x[7],
    "too many": lambda x: x[0, 0, 0],
    "too small": lambda x: x.view(5),
    "by a float": lambda x: x[1.5],
    "by a word": lambda x: x["a"],
    "nowhere": lambda x: x.transpose(0, 3),
    "of a view that is none": lambda x: x.t().view(-1),
    "a number in a tensor": lambda x: x[torch.tensor(1)],
    "by a flag": lambda x: x[True],
}


@pytest.fixture(params=[0, 1], ids=["warmup=0", "warmup=1"])
def kitsunes(request: pytest.FixtureRequest) -> Any:
    kitsune.reset()
    return lambda: kitsune.accelerate(device="cpu", warmup=request.param)


def described(view: Tensor, base: Tensor) -> list[Any]:
    before = base._version
    values = view.tolist(), tuple(view.shape), view.stride(), view.storage_offset(), view.dtype, view._is_view()
    if view._is_view():
        # Their counts of writes are one.
        base.add_(1)
        return [*values, view._version - before, view._base is base or view._base is not None, (view * 2).tolist()]
    return [*values]


def bases() -> list[Tensor]:
    return [torch.arange(12.0).view(4, 3).clone() if k % 2 else torch.arange(24.0)[12:].view(4, 3) for k in range(6)]


def seen(take: Callable[[Tensor], Any], bases: list[Tensor]) -> list[Any]:
    found: list[Any] = []
    for x in bases:
        try:
            found += described(take(x), x)
        except (RuntimeError, IndexError, TypeError) as error:
            found.append((type(error), str(error).splitlines()[0]))
    return found


@pytest.mark.parametrize("take", [*TAKEN.values(), *OTHERS.values()], ids=[*TAKEN, *OTHERS])
def test_a_view_is_what_it_is_in_eager(take: Callable[[Tensor], Any], kitsunes: Any) -> None:
    expected, given = seen(take, bases()), bases()
    with kitsune.config.patch(gate=False), kitsunes():
        assert seen(take, given) == expected


@pytest.mark.parametrize("name", TAKEN)
def test_nobody_hears_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    passed = views.pass_through
    monkeypatch.setattr(views, "pass_through", lambda *args: heard.append(args[1]) or passed(*args))
    x = torch.arange(12.0).view(4, 3)
    with kitsune.accelerate(device="cpu"):
        TAKEN[name](x)
    assert not heard


def test_a_view_of_what_is_pending_is_one_of_the_region(kitsunes: Any) -> None:
    def steps() -> list[Any]:
        with kitsune.disable():
            x, found = torch.zeros(4, 3), list[Any]()
        for k in range(6):
            x.add_(k)
            v = x[1:].view(-1)
            x.mul_(2)
            found.append((v + x[0, 0]).tolist())
        return found

    expected = steps()
    with kitsune.config.patch(gate=False), kitsunes():
        assert steps() == expected


def test_what_wants_a_gradient_has_its_graph(kitsunes: Any) -> None:
    def steps() -> list[Any]:
        with kitsune.disable():
            weight, found = torch.nn.Parameter(torch.arange(12.0).view(4, 3)), list[Any]()
        for _ in range(8):
            weight.grad = None
            (weight.view(-1)[:6] * weight[1:3].view(-1)).square().sum().backward()
            assert weight.grad is not None
            found.append(weight.grad.tolist())
        return found

    expected = steps()
    with kitsune.config.patch(gate=False), kitsunes():
        assert steps() == expected
    assert kitsune.counters()["backwards_followed"] > 0


def test_what_copies_is_an_operator_of_the_region() -> None:
    x = torch.arange(12.0).view(4, 3)
    with kitsune.accelerate(device="cpu", warmup=0):
        for take in (OTHERS["elements"], OTHERS["elements of two"], OTHERS["by a tensor"]):
            assert type(take(x)) is LazyTensor


def test_modes_of_the_programs_see_it(kitsunes: Any) -> None:
    class Listening(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.ops.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(4, 3)
    with kitsunes(), Listening() as mode:
        x.view(-1).unsqueeze(0)
    assert "aten.view.default" in mode.ops and "aten.unsqueeze.default" in mode.ops


def test_a_transform_takes_views_of_its_own(kitsunes: Any) -> None:
    x, batched = torch.arange(12.0).view(4, 3), torch.arange(24.0).view(2, 4, 3)

    def both() -> list[Any]:
        found = torch.vmap(lambda b: b[1:].view(-1) + x[1:].view(-1))(batched)
        slope = torch.func.grad(lambda b: (b.view(-1)[:3] * x[0]).sum())(x)
        return [found.tolist(), slope.tolist()]

    expected = both()
    with kitsune.config.patch(gate=False), kitsunes():
        for _ in range(3):
            assert both() == expected


def test_a_forward_derivative_that_is_a_result_is_viewed_by_us(kitsunes: Any) -> None:
    """Below us it has no memory: the process ended with a segmentation fault."""
    x = torch.arange(12.0).view(4, 3)

    def both() -> list[Any]:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x) * 3)
            view = dual[:, :2].t()
            return [forward_ad.unpack_dual(t).tangent.tolist() for t in (view, view * 2, dual.view(-1))]

    expected = both()
    with kitsune.config.patch(gate=False), kitsunes():
        for _ in range(3):
            assert both() == expected


def test_what_is_like_a_tensor_of_another_class_is_made_by_that(kitsunes: Any) -> None:
    held: list[Tensor] = []

    class Asking(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            held.append(held[-1] + 1)
            return super().__torch_function__(func, types, args, kwargs or {})

    x, like = torch.arange(4.0), torch.ones(3, 4).as_subclass(Asking)

    def steps() -> list[Any]:
        held[:] = [x * 2]
        # Torch asks it as well what it is to return.
        return [x.expand_as(like).shape, *[t.tolist() for t in held[:2]]]

    expected = steps()
    with kitsune.config.patch(gate=False), kitsunes():
        for _ in range(3):
            assert steps() == expected


def test_an_inference_tensor_is_viewed_as_in_eager(kitsunes: Any) -> None:
    with torch.inference_mode():
        x = torch.arange(12.0).view(4, 3)

    def steps() -> list[Any]:
        with torch.inference_mode():
            inside = x[1:].is_inference()
        return [inside, x[1:].is_inference(), x.view(-1).is_inference(), (x[1:] * 2).tolist()]

    expected = steps()
    with kitsune.config.patch(gate=False), kitsunes():
        for _ in range(3):
            assert steps() == expected


def test_a_static_function_takes_it_anew_each_time() -> None:
    @kitsune.accelerate(static=True, device="cpu")
    def halved(x: Tensor) -> Tensor:
        return x[:, :2].t() * 0.5

    for k in range(10):
        x = torch.arange(12.0).view(4, 3) + k
        assert torch.equal(halved(x), x[:, :2].t() * 0.5)


def test_they_are_methods_of_tensors_by_which_calls_come() -> None:
    assert all(getattr(view, "__objclass__", None) is torch._C.TensorBase for view in VIEWS)
