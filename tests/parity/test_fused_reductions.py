"""Programs with reductions on a GPU, as the planner fuses them: as near to float64 as eager is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune.config import config
from tests.behind import behind
from tests.codegen.reductions import (
    CASES,
    DTYPES,
    SIZES,
    Case,
    differs,
    draw,
    exactly,
    layouts,
    of_special,
    special,
    tensors,
)
from tests.runtime.checked import forget

pytestmark = pytest.mark.gpu
# More rows than blocks fit onto a device, too many for 16-bit numbers of blocks.
MANY = 70000


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are compiled anew, and nothing is left of them."""
    forget()
    with config.patch(cache_dir=str(tmp_path_factory.mktemp("kernels")), numerics="strict"):
        yield
    forget()


def by_plan(program: Callable[..., Any], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    kitsune.reset()
    for _ in range(2):  # at first, some ops are made at once
        with kitsune.accelerate(warmup=0, device="cuda"):
            found = tensors(program(*inputs))
    assert not (mended := kitsune.explain().mended), mended
    return [t.detach() * 1 for t in found]


def check(program: Callable[..., Any], inputs: list[torch.Tensor], precision: torch.dtype | None = None) -> None:
    inputs = [behind(t.cuda()) for t in inputs]
    found = by_plan(program, inputs)
    eager, exact = tensors(program(*inputs)), exactly(program, inputs)
    wrong = [(k, said) for k, three in enumerate(zip(found, eager, exact, strict=True)) if (said := differs(*three, precision))]
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom is <= 0")
def test_results_are_as_near_to_float64_as_eagers(case: Case, n: int, dtype: torch.dtype) -> None:
    check(case.program, draw(case.shapes(n), dtype), dtype if case.rounds else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [98, 1000, 30522])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sizes_that_are_multiples_of_a_few_elements(case: Case, n: int, dtype: torch.dtype) -> None:
    check(case.program, draw(case.shapes(n), dtype), dtype if case.rounds else None)


def test_a_softmax_of_two_has_eagers_bits() -> None:
    # There is one order for a sum of two, and quotients are rounded correctly. Below 1e-31 they are not.
    x = torch.stack([torch.zeros(1 << 20), torch.linspace(-70, 0, 1 << 20)], 1).cuda()
    (found,) = by_plan(lambda x: [(x + 0.0).softmax(1)], [x])
    assert kitsune.counters()["kernels"] and torch.equal(found, x.softmax(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_layouts(dtype: torch.dtype) -> None:
    for _, program, inputs in layouts(dtype):
        check(program, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [33, 5000])
def test_nan_infinities_and_zeros(n: int, dtype: torch.dtype) -> None:
    check(of_special, [special(dtype, n)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(dtype: torch.dtype) -> None:
    x, weight = draw([(MANY, 96), (96,)], dtype)
    check(lambda x, w: [torch.nn.functional.layer_norm(x, (96,), w).relu(), x.sum(0), x.sum(), x.softmax(1)], [x, weight])


def test_sums_come_out_the_same_each_time() -> None:
    x = draw([(4096, 768)], torch.bfloat16)[0].cuda()
    first = by_plan(lambda x: [x.sum(0), (x * 2).sum(), x.float().mean(0)], [x])
    for _ in range(5):
        again = by_plan(lambda x: [x.sum(0), (x * 2).sum(), x.float().mean(0)], [x])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_of_small_layers_share_a_launch_with_their_updates(tmp_path: Path) -> None:
    def losses(context: Any) -> list[float]:
        torch.manual_seed(0)
        sizes = [torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(3)]
        model = torch.nn.Sequential(*sizes).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        x, found = torch.randn(4096, 64, device="cuda"), []
        with context:
            for _ in range(8):
                optimizer.zero_grad()
                loss = (model(x) - x).square().mean()
                loss.backward()
                optimizer.step()
                found.append(loss.detach())
        return [float(loss) for loss in found]

    kitsune.reset()
    got = losses(kitsune.accelerate(device="cuda"))
    assert kitsune.counters()["kernels"] and not kitsune.explain().mended
    expected = losses(kitsune.disable())
    assert got == pytest.approx(expected, rel=1e-4)


def test_a_sum_in_parts_and_one_of_the_memory_before_it() -> None:
    memory = torch.randn(32768 * 768 + 200, device="cuda", dtype=torch.float64)
    x, rows = memory[100:][: 32768 * 768].view(32768, 768), torch.tensor([1, 5], device="cuda")

    def program(*_: torch.Tensor) -> list[torch.Tensor]:
        x.index_fill_(0, rows, 3.0)
        return [x.sum(0), torch.as_strided(x, (512, 64, 768), (49152, 768, 1), 0).sum(0)]

    for found, expected in zip(by_plan(program, []), program(), strict=True):
        torch.testing.assert_close(found, expected)
