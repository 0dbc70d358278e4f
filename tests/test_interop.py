"""Other people's tensors, modes, transforms, compilers and operators: they run as in eager, and Kitsune goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import library
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import kitsune
from kitsune.dispatch import describe
from kitsune.ir import Barrier


def lazily() -> Any:
    return kitsune.accelerate(warmup=0, device="cpu")


@pytest.fixture(autouse=True)
def clean() -> Any:
    kitsune.reset()
    yield
    assert not _get_current_dispatch_mode_stack()


def same_in_context(program: Callable[[], list[Any]]) -> dict[str, Any]:
    """Run a program in eager and twice in a context: equal answers. Returns the counters of the last run."""
    torch.manual_seed(1)
    expected = program()
    for _ in range(2):
        kitsune.reset()
        torch.manual_seed(1)
        with lazily():
            found = program()
            counters = kitsune.counters()
        assert found == expected
    return counters


# ---- foreign subclasses ----


class Named(torch.Tensor):
    """A subclass that sees calls before autograd."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class Boxed(torch.Tensor):
    """A wrapper subclass around a plain tensor, as quantised or distributed tensors are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Boxed:
        boxed = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        boxed.inner = inner
        return boxed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = [a.inner if isinstance(a, Boxed) else a for a in args]
        return Boxed(func(*inner, **(kwargs or {})))


def test_a_subclass_with_torch_function() -> None:
    def program() -> list[Any]:
        tensor = (torch.arange(3.0) * 2).as_subclass(Named)
        result = tensor * 2 + torch.ones(3)
        return [type(result).__name__, result.tolist()]

    assert program() == ["Named", [1.0, 5.0, 9.0]]
    same_in_context(program)
    assert Named.calls > 0


def test_a_subclass_with_torch_dispatch() -> None:
    def program() -> list[Any]:
        plain = torch.arange(3.0) * 2
        result = Boxed(plain) * 2 + plain
        return [type(result).__name__, result.inner.tolist()]

    assert program() == ["Boxed", [0.0, 6.0, 12.0]]
    same_in_context(program)


# ---- foreign modes ----


class Doubling(TorchDispatchMode):
    """A mode that changes what an operator does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.add.Tensor else result


def test_a_foreign_mode_inside() -> None:
    def program() -> list[Any]:
        x = torch.ones(2) * 3
        with Doubling():
            y = x + 1
        return [y.tolist(), (y + 1).tolist()]

    assert program() == [[8.0, 8.0], [9.0, 9.0]]
    same_in_context(program)


def test_a_foreign_mode_outside() -> None:
    with Doubling():
        with lazily():
            y = torch.ones(2) + 1
        assert y.tolist() == [4.0, 4.0]
    assert kitsune.counters()["passed_through"].get("FOREIGN_MODE", 0) > 0


# ---- transforms and compilers ----


def test_a_functorch_gradient() -> None:
    def program() -> list[Any]:
        x = torch.arange(3.0) * 2
        return [torch.func.grad(lambda x: (x**3).sum())(x).tolist(), (x + 1).tolist()]

    same_in_context(program)


def test_vmap() -> None:
    def program() -> list[Any]:
        x = torch.arange(6.0).view(2, 3) * 2
        return [torch.func.vmap(lambda row: row.softmax(0) + x.sum())(x).tolist(), (x + 1).tolist()]

    same_in_context(program)


def test_per_sample_gradients_of_a_module() -> None:
    def program() -> list[Any]:
        model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
        parameters = dict(model.named_parameters())

        def loss(parameters: Any, row: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, parameters, row).pow(2).sum()

        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        return [g.tolist() for g in gradients.values()]

    same_in_context(program)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_derivatives() -> None:
    def program() -> list[Any]:
        x = torch.arange(3.0) + 1
        return [t.tolist() for t in torch.func.jvp(torch.sin, (x,), (torch.ones(3),))]

    same_in_context(program)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function() -> None:
    compiled = torch.compile(lambda x: (x * 2).sin() + 1, backend="eager")

    def program() -> list[Any]:
        x = torch.arange(3.0) * 2
        return [compiled(x).tolist(), (compiled(x) + x).tolist()]

    same_in_context(program)


# ---- foreign operators and layouts ----


@library.custom_op("interop_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy() * factor)


@scaled.register_fake
def _(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


@library.custom_op("interop_tests::bump", mutates_args={"x"})
def bump(x: torch.Tensor) -> None:
    x.detach().numpy()[...] += 1


def test_an_operator_of_another_library() -> None:
    def program() -> list[Any]:
        x = torch.arange(3.0) * 2
        y = scaled(x, 1.5) + 1
        return [y.tolist(), x.tolist()]

    assert "FOREIGN_NAMESPACE" in same_in_context(program)["passed_through"]


def test_an_operator_of_another_library_that_writes() -> None:
    plain = torch.zeros(3)

    def program() -> list[Any]:
        plain.zero_()
        x = plain + 1
        before = plain * 2
        bump(x)
        bump(plain)
        return [(x * 2).tolist(), before.tolist(), (plain * 2).tolist()]

    assert "FOREIGN_NAMESPACE" in same_in_context(program)["passed_through"]


def test_a_custom_autograd_function() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    def program() -> list[Any]:
        x = (torch.arange(3.0) + 1).requires_grad_()
        (Cube.apply(x) * 2).sum().backward()
        assert x.grad is not None
        return [x.grad.tolist()]

    assert same_in_context(program)["recorded"] > 0


def test_sparse_tensors() -> None:
    def program() -> list[Any]:
        dense = torch.eye(3) * 2
        sparse = dense.to_sparse()
        product = torch.sparse.mm(sparse, dense + 1)
        return [product.tolist(), (sparse + sparse).to_dense().tolist(), (product * 2).tolist()]

    assert "FOREIGN_LAYOUT" in same_in_context(program)["passed_through"]


def test_sparse_gradients() -> None:
    def program() -> list[Any]:
        table = torch.nn.Embedding(5, 2, sparse=True)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        table(torch.tensor([1, 3, 3])).sum().backward()
        assert table.weight.grad is not None and table.weight.grad.is_sparse
        optimizer.step()
        return [table.weight.tolist()]

    same_in_context(program)


@pytest.mark.filterwarnings("ignore")
def test_nested_and_quantised_tensors() -> None:
    def program() -> list[Any]:
        nested = torch.nested.nested_tensor([torch.ones(2) * 2, torch.ones(3)])
        quantised = torch.quantize_per_tensor(torch.arange(3.0) * 2, 0.1, 0, torch.quint8)
        return [(nested * 2).to_padded_tensor(0.0).tolist(), quantised.dequantize().tolist()]

    same_in_context(program)


@pytest.mark.parametrize("name", ["sym_size", "sym_stride", "size", "is_non_overlapping_and_dense", "is_strides_like_format"])
def test_a_question_that_the_dispatcher_does_not_know_has_a_row(name: str) -> None:
    """C++ asks for a subclass's sizes by it, and ends the process if that raises."""
    assert describe(getattr(torch.ops.aten, name).default).barrier is Barrier.PYTHON_RESULT


@pytest.mark.filterwarnings("ignore")
def test_a_layer_of_jagged_tensors_is_asked_for_its_sizes() -> None:
    layer = torch.nn.Linear(3, 2)
    rows = [torch.arange(3.0 * n).reshape(n, 3) for n in (2, 1, 4)]

    def program() -> list[Any]:
        layer.zero_grad()
        out = layer(torch.nested.nested_tensor(rows, layout=torch.jagged))
        normed = torch.nn.functional.layer_norm(out * 2, (2,))
        normed.values().square().sum().backward()
        sizes = [list(normed.shape)[::2], normed.is_contiguous(), normed.numel(), normed.stride(1)]
        gradients = [p.grad.tolist() for p in layer.parameters() if p.grad is not None]
        return [sizes, [row.tolist() for row in normed.unbind()], gradients]

    same_in_context(program)


def test_a_generator_of_the_users_own() -> None:
    def program() -> list[Any]:
        generator = torch.Generator().manual_seed(4)
        mine = torch.rand(3, generator=generator)
        return [mine.tolist(), torch.rand(2).tolist(), torch.randperm(4, generator=generator).tolist()]

    same_in_context(program)


def test_deterministic_algorithms_are_asked_for_in_order() -> None:
    def program() -> list[Any]:
        x = torch.arange(4.0) * 2
        torch.use_deterministic_algorithms(True)
        y = x.cumsum(0)
        torch.use_deterministic_algorithms(False)
        return [y.tolist()]

    same_in_context(program)


class Watching(TorchDispatchMode):
    """Sees ops and does nothing about them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def names_of_function_modes() -> list[str]:
    return [type(mode).__name__ for mode in _get_current_function_mode_stack()]


def test_the_end_of_a_device_behind_a_users_mode_takes_off_nothing_else() -> None:
    """It takes off whatever function mode is on top; a program that followed was computed with its device."""
    x = torch.ones(3)
    with lazily():
        y = x * 2
        before = names_of_function_modes()
        with torch.device("meta"):
            with Watching():
                y = y + 1
            assert torch.zeros(2).device.type == "meta"
        assert names_of_function_modes() == before
        assert torch.zeros(2).device.type == "cpu"
        assert y.tolist() == [3.0] * 3
    assert not names_of_function_modes()


def test_a_device_around_a_context_is_beneath_its_calls_also_behind_another_context() -> None:
    with lazily():
        inside = names_of_function_modes()
    with torch.device("cpu"):
        around = names_of_function_modes()
        with lazily():
            assert names_of_function_modes() == around + inside
        assert names_of_function_modes() == around


def test_a_default_device_that_is_set_inside_of_a_users_mode_stays_at_the_bottom() -> None:
    with lazily():
        y = torch.ones(3) * 2
        with Watching():
            torch.set_default_device("meta")
            y = y + 1
        assert torch.zeros(2).device.type == "meta"
        torch.set_default_device(None)
        assert torch.zeros(2).device.type == "cpu"
        assert y.tolist() == [3.0] * 3
    assert not names_of_function_modes()
