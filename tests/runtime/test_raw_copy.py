"""Bytes copied past the dispatcher: which tensors may be, and that batches and losses come over whole."""

from __future__ import annotations

import pytest
import torch

import kitsune
from kitsune.config import config
from kitsune.runtime import lent_outputs, passing
from kitsune.runtime.raw_copy import is_solid, raw_copy
from tests.runtime.backends import lazily
from tests.runtime.repeated import graphs

x = torch.arange(24.0).view(2, 3, 4)
SOLID = {
    "rows": x,
    "columns": x.permute(2, 0, 1),
    "a number": x[0, 0, 0],
    "a part": x[1],
    "a dimension of one": x[:1].transpose(0, 1),
}
HOLES = {
    "every other": x[..., ::2],
    "expanded": x[:1].expand(2, 3, 4),
    "nothing": x[:0],
    "overlapping": x.as_strided((4, 4), (2, 1)),
}


@pytest.mark.parametrize("tensor", SOLID.values(), ids=SOLID)
def test_what_fills_its_bytes_may_be_copied_as_bytes(tensor: torch.Tensor) -> None:
    assert is_solid(tensor)
    other = torch.empty_strided(tensor.shape, tensor.stride())
    assert raw_copy(torch.device("cpu"))(other.data_ptr(), tensor.data_ptr(), tensor.numel() * 4)
    assert torch.equal(other, tensor)


@pytest.mark.parametrize("tensor", HOLES.values(), ids=HOLES)
def test_what_does_not_may_not(tensor: torch.Tensor) -> None:
    assert not is_solid(tensor)


def forms(k: int) -> list[torch.Tensor]:
    """Batches that lie in memory in all manner of ways, each time elsewhere."""
    made = torch.arange(24.0).view(2, 3, 4) + k
    return [
        made,
        made.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        made[:1].expand(2, 3, 4),
        (made[0, 0, 0] + 0),
        made.double(),
    ]


@pytest.mark.parametrize("can", [True, False])
def test_batches_and_losses_are_copied_whole(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    copy = raw_copy(torch.device("cpu"))
    for module in (passing, lent_outputs):
        monkeypatch.setattr(module, "raw_copy", lambda device: lambda *of: (asked.append(of[2]), can and copy(*of))[1])
    batches = [forms(k) for k in range(40)]
    with config.patch(gate=False, pages=False), graphs(kernels=False), lazily():
        got = []
        for parts in batches:
            got.append([(part * 2).sum() for part in parts])
            kitsune.flush()
        assert kitsune.counters()["replayed"] > 20
    for made, parts in zip(got, batches, strict=True):
        assert [total.item() for total in made] == [(part * 2).sum().item() for part in parts]
    # Both batches and, once they are held again and again, sums.
    assert {4, 8, 96, 192} <= set(asked)


@pytest.mark.gpu
def test_a_device_copies_on_its_current_stream() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    a, b = torch.randn(1000, device=device), torch.zeros(1000, device=device)
    copy = raw_copy(device)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        a.add_(1)
        assert copy(b.data_ptr(), a.data_ptr(), 4000)
        kept = b.clone()
    torch.cuda.synchronize()
    assert torch.equal(kept, a)
