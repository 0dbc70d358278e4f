"""What an error of a backward says is what eager says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "alias": lambda w: torch.ops.aten.alias(w),
    "alias, in another shape": lambda w: torch.ops.aten._reshape_alias(w, (2, 8), (8, 1)),
    "as_strided": lambda w: w.as_strided((2, 2), (1, 2)),
    "chunk": lambda w: w.chunk(2)[1],
    "complex": lambda w: torch.view_as_real(torch.view_as_complex(w.view(8, 2))),
    "diagonal": lambda w: w.diagonal(),
    "expand": lambda w: w[None].expand(3, 4, 4),
    "narrow": lambda w: w.narrow(0, 1, 2),
    "permute": lambda w: w.permute(1, 0),
    "reshape": lambda w: w.reshape(2, 8),
    "select": lambda w: w[1],
    "squeeze": lambda w: w[:1].squeeze(),
    "squeeze, a dimension": lambda w: w[:1].squeeze(0),
    "squeeze, some": lambda w: w[:1].squeeze((0,)),
    "t": lambda w: w.t(),
    "transpose": lambda w: w.mT,
    "view": lambda w: w.view_as(w),
    "unbind": lambda w: w.unbind(0)[2],
    "unfold": lambda w: w.unfold(0, 2, 1),
    "unsqueeze": lambda w: w.unsqueeze(0),
}


def told(view: Callable[[Tensor], Tensor], of_result: bool, asks: bool, context: Callable[[], Any]) -> list[str]:
    """Of a view whose memory is written before the backward, three times."""
    words = []
    for _ in range(3):
        w = nn.Parameter(torch.ones(4, 4))
        with context():
            base = w * 2 if of_result else w
            seen = view(base)
            loss = seen.square().sum()
            with torch.no_grad():
                base.mul_(2)
            with pytest.raises(RuntimeError) as error:
                torch.autograd.grad(loss, w) if asks else loss.backward()
            words.append(str(error.value))
    return words


@pytest.mark.parametrize("asks", [False, True], ids=["backward", "grad"])
@pytest.mark.parametrize("of_result", [False, True], ids=["leaf", "result"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_that_was_written_is_told_in_eagers_words(name: str, of_result: bool, asks: bool) -> None:
    expected = told(VIEWS[name], of_result, asks, contextlib.nullcontext)
    kitsune.reset()
    assert told(VIEWS[name], of_result, asks, lambda: kitsune.accelerate(device="cpu")) == expected


HISTORY: dict[str, Callable[[Tensor], Any]] = {
    "a sum": lambda t: t.sum(),
    "its node": lambda t: t.grad_fn,
    "is it a leaf": lambda t: t.is_leaf,
}


@pytest.mark.parametrize("ask", HISTORY)
def test_a_history_that_torch_cannot_tell_is_a_sentence(ask: str) -> None:
    """Eager has a history for it that leads nowhere."""
    for context in (contextlib.nullcontext, lambda: kitsune.accelerate(device="cpu")):
        for _ in range(4):
            w, refused = nn.Parameter(torch.ones(4, 4)), None
            with context():
                t = w[..., ::2]
                (w * 2).sum().backward()
                with torch.no_grad():
                    w.mul_(2)
                w.requires_grad_(False)
                try:
                    HISTORY[ask](t)
                except RuntimeError as error:
                    refused = str(error)
            # A sum begins another step, before which the region has ended: then torch can tell.
            told = context is contextlib.nullcontext or ask == "a sum"
            assert refused is None if told else str(refused).startswith("this is a view of a tensor")
