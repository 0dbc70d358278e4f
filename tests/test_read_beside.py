"""Functions of torch's that read a tensor's numbers in C++, where no operator tells of it: in every step, eager's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import kitsune

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    kitsune.reset()
    with kitsune.config.patch(gate=False):
        yield
    kitsune.reset()


def same(program: Callable[..., Any], given: Sequence[Any], warmup: int) -> None:
    """Called with each of these, in one context after the other."""
    expected = [program(one) for one in given]
    got = []
    for one in given:
        with kitsune.accelerate(warmup=warmup, device="cpu"):
            got.append(program(one))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def sizes(*lengths: int) -> Tensor:
    """How many sequences of these lengths are still there at each position."""
    return torch.tensor([sum(length > at for length in lengths) for at in range(max(lengths))])


# As many numbers in each, for as many positions.
SIZES = [sizes(5, 3, 3), sizes(5, 4, 2), sizes(5, 5, 1)] * 3


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("kind", RECURRENT)
def test_a_packed_sequence_of_other_lengths_and_of_the_same_size_is_not_followed(kind: Any, warmup: int) -> None:
    torch.manual_seed(0)
    net, data = kind(2, 3), torch.randn(11, 2)

    def step(batch_sizes: Tensor) -> list[Tensor]:
        net.zero_grad()
        output, _ = net(PackedSequence(data, batch_sizes))
        output.data.square().sum().backward()
        return [output.data.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]

    same(step, SIZES, warmup)


def test_numbers_that_a_function_computes_with_in_c_are_looked_at_in_each_step() -> None:
    def step(x: Tensor) -> Any:
        return torch.choose_qparams_optimized(x, 4, 2, 0.16, 8)

    same(step, [torch.arange(4.0) * k for k in (1, 2, 1, 5, 3, 2)], 1)
