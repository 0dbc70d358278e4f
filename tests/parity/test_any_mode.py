"""What torch itself does otherwise while any dispatch mode is on: Kitsune has the bits of a mode that does nothing."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kitsune
from kitsune.codegen.exactness import FORMULAS
from tests import _compare
from tests.parity.outcomes import AnyMode

pytest.importorskip("expecttest", reason="torch's databases need expecttest")

from tests import _opinfo
from tests.parity import sights, sweep

pytestmark = pytest.mark.usefixtures("afresh")

STEPS = 4
LABELS = torch.tensor([0, -100, 2, 1] * 25)


def smooth_loss(x: Tensor) -> Tensor:
    return F.cross_entropy(x, LABELS, weight=torch.linspace(0.1, 1, 3), label_smoothing=0.3)


# By the operators of which `kitsune.explain(numerics=True)` says so: a function, and the shapes of what it is given.
PROGRAMS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "prod": (lambda x: x.prod(), ((17,),)),
    "cumprod": (lambda x: x.cumprod(0), ((17,),)),
    "masked_fill": (lambda x, value: x.masked_fill(x > 1, value), ((400,), ())),
    "householder_product": (torch.linalg.householder_product, ((5, 3), (3,))),
    "cross_entropy_loss": (smooth_loss, ((100, 3),)),
    "matmul": (lambda x, weight: torch.matmul(x.detach(), weight), ((1, 37, 300), (300, 29))),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outcome(name: str, context: Any) -> list[Any]:
    """A result, and gradients."""
    function, shapes = PROGRAMS[name]
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.rand(shape, generator=generator).add_(0.5).requires_grad_() for shape in shapes]
    with context:
        result = function(*leaves)
        result.backward(torch.randn(result.shape, generator=generator))
    return [result, *(leaf.grad for leaf in leaves)]


def differences(a: list[Any], b: list[Any]) -> list[str]:
    found = (_compare.difference(x, y, skip=("history",)) for x, y in zip(a, b, strict=True))
    return [told for told in found if told]


@pytest.mark.parametrize("name", PROGRAMS)
def test_formulas_are_those_of_any_mode(name: str) -> None:
    expected = outcome(name, AnyMode())
    for _ in range(STEPS):
        assert not differences(expected, outcome(name, kitsune.accelerate(warmup=1, device="cpu")))


def test_each_formula_of_which_users_are_told_is_compared() -> None:
    assert PROGRAMS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", ["prod", "masked_fill", "cross_entropy_loss"])
def test_these_are_other_bits_than_eagers(name: str) -> None:
    """Or else what is above would show nothing."""
    assert differences(outcome(name, nullcontext()), outcome(name, AnyMode()))


def test_what_any_mode_does_otherwise_is_no_difference_of_kitsunes() -> None:
    verdicts = [sights.four_sights(sample) for sample in sights.samples("prod", torch.float16)]
    assert not any(verdict.differences or verdict.left_out for verdict in verdicts)
    assert any(verdict.of_any_mode for verdict in verdicts)
    assert sweep.not_as_in_eager([sweep.swept("prod", "float16", sys.maxsize)]) == ["as under any mode: prod"]


def test_what_torch_refuses_under_any_mode_is_left_out() -> None:
    """And Kitsune refuses it in the same words: it had asked a tensor for its number behind which a vmap stood."""
    row = sweep.swept("linspace.tensor_overload", "vmap", sys.maxsize)
    assert row["left_out"] and row["run"] and not row["different"] + row["crashed"]
    assert any(why.startswith("torch refuses it under any mode: RuntimeError") for why in row["why_left_out"])


def unmade(*_: Any, **__: Any) -> Iterator[Any]:
    yield from ()
    raise ArithmeticError("no such sample")


def test_what_the_database_cannot_make_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_opinfo._database()["neg"], "sample_inputs_func", unmade)
    row = sweep.swept("neg", "float32", sys.maxsize)
    assert (row["run"], row["left_out"], row["crashed"]) == (0, 1, 0)
    assert sweep.not_as_in_eager([row]) == [
        "neg[float32]: 1 left out: the database cannot make a sample: ArithmeticError: no such sample"
    ]


def test_what_raises_elsewhere_has_crashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sights, "samples", unmade)
    row = sweep.swept("neg", "float32", sys.maxsize)
    assert (row["left_out"], row["crashed"]) == (0, 1)
