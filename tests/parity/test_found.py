"""What the sweep of torch's databases has found, each with the shortest program that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional as F

import kitsune
from tests.parity.sweep import work

pytestmark = pytest.mark.usefixtures("afresh")

STEPS = 5
Step = Callable[[], Any]


def same_in_each_step(step: Step) -> None:
    """Observed, recorded, followed: each step has the bits of eager's."""
    expected = step()
    for _ in range(STEPS):
        with kitsune.accelerate(warmup=1, device="cpu"):
            got = step()
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def grads_of(*leaves: Tensor) -> list[Tensor]:
    assert all(leaf.grad is not None for leaf in leaves)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_torch_autograd_backward_of_a_loss_that_reads_a_value() -> None:
    ones, data = torch.ones(4, 3), torch.rand(3, 4, 3)

    def step() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in data]
        torch.autograd.backward(F.gaussian_nll_loss(*leaves, reduction="none"), ones)
        return grads_of(*leaves)

    same_in_each_step(step)


@pytest.mark.parametrize("reads", [False, True])
def test_kernels_that_conjugate_inside_see_the_conjugate(reads: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(4, 4, dtype=torch.complex64)

    def step() -> Tensor:
        inverse = torch.linalg.pinv(matrix)
        if reads:
            # Run while another op is being handled, where torch leaves the bit out.
            inverse.real.sum().item()
        return inverse

    same_in_each_step(step)
    with kitsune.accelerate(warmup=1, device="cpu"):
        inverse = step()
        wrong = (matrix @ inverse @ matrix - matrix).abs().max().item()
    assert wrong < 1e-4


@library.custom_op("kitsune_found::negated_imaginary", mutates_args=())
def negated_imaginary(x: Tensor) -> Tensor:
    return x.conj().imag + 0


def test_operators_of_others_see_the_conjugate() -> None:
    x = torch.randn(3, 3, dtype=torch.complex64)

    def step() -> Tensor:
        return negated_imaginary(x * 1)

    same_in_each_step(step)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ctc_loss_of_lists_of_lengths(reduction: str) -> None:
    torch.manual_seed(0)
    log_probs = torch.randn(20, 3, 6).log_softmax(2).requires_grad_()
    targets = torch.randint(1, 6, (3, 5), dtype=torch.int32)

    def step() -> tuple[Tensor, Tensor | None]:
        log_probs.grad = None
        loss = F.ctc_loss(log_probs, targets, (20, 18, 15), (5, 4, 2), reduction=reduction)
        loss.sum().backward()
        return loss.detach(), log_probs.grad

    same_in_each_step(step)


@pytest.mark.parametrize("split", [torch.tensor_split, Tensor.tensor_split])
@pytest.mark.parametrize("by_name", [False, True])
def test_tensor_split_at_places_that_are_pending(split: Callable[..., Any], by_name: bool) -> None:
    x = torch.arange(10.0)

    def step() -> tuple[Tensor, ...]:
        through = getattr(torch if split is torch.tensor_split else Tensor, "tensor_split")  # noqa: B009 - as it is by then
        places = torch.tensor([1, 3]) + 1
        given = {"tensor_indices_or_sections": places} if by_name else {}
        pieces: tuple[Tensor, ...] = through(x * 2, **given) if by_name else through(x * 2, places)
        return (*pieces, *through(x, torch.tensor(2) + 1))

    same_in_each_step(step)


def test_addbmm_in_place_gives_a_small_operand_the_size_of_the_product() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(5, 5, 5), torch.randn(5, 5, 10)

    def step() -> Tensor:
        return (torch.ones(()) + 1).addbmm_(left, right)

    same_in_each_step(step)
    assert step().shape == (5, 10)


def test_tensor_split_at_places_of_another_type_raises_as_in_eager() -> None:
    def message() -> str:
        with pytest.raises(RuntimeError) as raised:
            torch.tensor_split(torch.arange(10.0), torch.tensor([1.0, 3.0]))
        return str(raised.value)

    expected = message()
    with kitsune.accelerate(warmup=1, device="cpu"):
        assert message() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ctc_loss_on_a_gpu_takes_lengths_from_the_host(reduction: str) -> None:
    torch.manual_seed(0)
    scores, targets = torch.randn(6, 2, 5, device="cuda"), torch.tensor([[1, 2], [3, 1]], device="cuda")
    lengths = [torch.full((2,), n) for n in (6, 2)]

    def step() -> Tensor:
        return F.ctc_loss((scores * 2).log_softmax(2), targets, *lengths, reduction=reduction)

    expected = step()
    for _ in range(STEPS):
        with kitsune.accelerate(warmup=1, device="cuda"):
            got = step()
        assert torch.equal(got, expected)


def test_gradients_of_a_stale_view_are_looked_at_in_the_end() -> None:
    """`is_leaf` of a wrapper that is a view of what has been written never returned."""
    check, samples = work("as_strided_scatter", "gradgradcheck")
    for sample in samples:
        assert not check(sample).differences
