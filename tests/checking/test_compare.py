"""How far from eager a sum in another order may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kitsune.checking.eager_run import Origin, far_from
from tests.plan.recorded import recorded_again


def sum_of(x: torch.Tensor) -> Origin:
    (op,) = recorded_again(lambda: x.sum(0)).ops
    return Origin(op, {op.inputs[0].id: x}, op.results[0].id, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_terms_that_cancel_their_rounding_is_the_measure_and_nothing_more(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(4096, 8, generator=generator)
    # What is left of each column is a ten-millionth of a term: as of the gradient of a bias before a batch norm.
    x = torch.cat([half, -half + 1e-7 * torch.randn(4096, 8, generator=generator)]).to(dtype)
    origin, eager = sum_of(x), x.sum(0)
    for other in (torch.randperm(8192, generator=generator) for _ in range(20)):
        # Rows one after another in float32, as a kernel adds those of a part, and then the parts.
        parts = np.add.accumulate(x[other].float().view(128, 64, 8).numpy(), 1, np.float32)[:, -1]
        got = torch.from_numpy(np.add.accumulate(parts, 0, np.float32)[-1]).to(dtype)
        assert far_from(got, eager, origin, []) is None
    # A row that was left out, one that was counted twice, and a factor where nothing cancels.
    for wrong in (x[1:].sum(0), torch.cat([x, x[:1]]).sum(0)):
        assert "from float64, where" in (far_from(wrong, eager, origin, []) or "")
    some = x[:4096].abs()
    assert "from float64, where" in (far_from(some.sum(0) * 1.05, some.sum(0), sum_of(some), []) or "")
