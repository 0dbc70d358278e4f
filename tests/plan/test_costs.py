"""The cost model, by figures worked out by hand for a device of round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kitsune.ir import Access, Graph, Kernel, Kind, Launch, Load, Local, Op, Plan, Result, Step, Store, Tile, Value, default_type
from kitsune.scheduler import Costs, Rates, parts
from kitsune.scheduler.cost import Load as Asked, graph_micros, kernel_micros, op_micros, product_micros

aten = torch.ops.aten
# 1000 bytes and a million operations a microsecond, 2 us a launch, four multiprocessors.
COSTS = Costs(Rates(1e3, 1e6, 2.0, 4))


def value(number: int, *shape: int, dtype: torch.dtype = torch.float32) -> Value:
    return Value(number, default_type(dtype, shape), number)


def product(n: int, k: int, m: int) -> Op:
    a, b, out = value(0, n, k), value(1, k, m), value(2, n, m)
    return Op(aten.mm.default, Kind.GEMM, (a, b), (), (a, b), Result(0), (out,))


def kernel(domain: tuple[int, ...], *walks: tuple[int, ...], reduced: int = 0, n_steps: int = 1) -> Kernel:
    """A kernel that loads by all walks but the last, by which it stores, float32 numbers throughout."""
    loads = tuple(Access(value(k, 1), walk) for k, walk in enumerate(walks[:-1]))
    op = Op(aten.neg.default, Kind.POINTWISE, (), (), (), Result(0), (value(9, 1),))
    return Kernel(
        "k", domain, loads, (Step(op, (Load(0),)),) * n_steps, (Store(Local(0, 0), Access(value(9, 1), walks[-1])),), reduced
    )


def test_a_product_takes_its_operations_and_everything_else_its_bytes() -> None:
    large, small = product(1000, 1000, 1000), product(10, 1000, 10)
    assert product_micros(large, COSTS.rates) == 2000
    assert op_micros(large, COSTS.rates) == 12_000, "three matrices of 4 MB"
    assert op_micros(small, COSTS.rates) == 80.4
    graph = Graph((), (small, replace(small, kind=Kind.VIEW)), ())
    assert graph_micros(graph, COSTS.rates) == 82.4, "a view takes nothing, and is not launched"


def test_a_walk_with_jumps_reads_a_sector_for_each_element() -> None:
    assert kernel_micros(kernel((1000,), (1,), (1,)), COSTS.rates) == 8
    assert kernel_micros(kernel((1000,), (2,), (1,)), COSTS.rates) == 12, "every second number: both of two are read"
    assert kernel_micros(kernel((1000,), (100,), (1,)), COSTS.rates) == 36, "8 numbers of 4 bytes are read for each"
    assert kernel_micros(kernel((10, 100), (100, 1), (1, 0), reduced=1), COSTS.rates) == 4.04
    assert kernel_micros(kernel((100, 10), (1, 100), (1, 0), reduced=1), COSTS.rates) == 4.4, "neighbours are other rows'"


@pytest.mark.parametrize(
    ("rows", "share"), [(128 * 4, 1), (128 * 5, 5 / 8), (128 * 4 + 1, 5 / 8), (128, 1 / 4), (1, 1 / 4), (128 * 8, 1)]
)
def test_a_product_fills_the_device_in_rounds_of_tiles(rows: int, share: float) -> None:
    asked = COSTS.load(Launch(op=product(rows, 8, 128), micros=12.0))
    assert asked == Asked(2 + 10 / share, 10)


def test_anything_else_fills_it_with_bytes_under_way() -> None:
    half = kernel((1 << 18,), (1,), (1,))
    assert COSTS.load(Launch((half,), micros=12.0)) == Asked(22, 10)
    assert COSTS.load(Launch((kernel((1 << 20,), (1,), (1,)),), micros=12.0)) == Asked(12, 10)
    assert COSTS.load(Launch((kernel((16,), (1,), (1,)),), micros=12.0)) == Asked(202, 10), "a twentieth at least"
    assert COSTS.load(Launch((half,), micros=1.0)) == Asked(2, 0)


@pytest.mark.parametrize(
    ("saved_bytes", "saved_launches", "pays"), [(0, 0, False), (1, 0, True), (0, 1, True), (-2001, 1, False)]
)
def test_what_saves_anything_joins(saved_bytes: int, saved_launches: int, pays: bool) -> None:
    assert COSTS.joining(saved_bytes, saved_launches) is pays


def test_small_kernels_start_together() -> None:
    assert COSTS.batching(kernel((6249,), (1,), (1,)))
    assert not COSTS.batching(kernel((6250,), (1,), (1,))), "50 us"
    rows = (4 << 20) // 4 - 1
    assert COSTS.batching(kernel((1, rows), (0, 1), (0, 0), reduced=1)), "4 MiB with what is stored"
    assert not COSTS.batching(kernel((1, rows + 1), (0, 1), (0, 0), reduced=1))


@pytest.mark.parametrize(
    ("domain", "walk", "has_out_form", "pays"),
    [
        ((1 << 20,), (1,), False, True),
        ((1 << 20,), (1,), True, False),
        ((2048, 64), (100, 1), True, True),
        ((2047, 64), (100, 1), True, False),
        ((2048, 63), (100, 1), True, False),
        ((2048, 63), (100, 1), False, False),
        ((8, 64), (100, 1), False, True),
        ((2048, 64), (1, 100), True, False),
        ((2048, 64), (1, 100), False, False),
    ],
)
def test_one_op_beats_the_library_in_long_rows_with_gaps(
    domain: tuple[int, ...], walk: tuple[int, ...], has_out_form: bool, pays: bool
) -> None:
    store = (1,) if len(domain) == 1 else (domain[1], 1)
    assert COSTS.alone(kernel(domain, walk, store), has_out_form) is pays


def test_more_than_one_op_beats_the_library_anyway() -> None:
    assert COSTS.alone(kernel((8, 8), (1, 8), (8, 1), n_steps=2), True)
    assert COSTS.alone(kernel((8, 8), (8, 1), (1, 0), reduced=1), True)


@pytest.mark.parametrize(("n", "n_broadcast", "pays"), [(1 << 19, 5, True), (1 << 18, 5, False), (1 << 19, 4, False)])
def test_rows_pay_where_much_is_broadcast(n: int, n_broadcast: int, pays: bool) -> None:
    walks = [(0, 1)] * n_broadcast + [(16, 1)] * 2
    assert COSTS.in_rows(kernel((n // 16, 16), *walks)) is pays


def test_layouts_and_padding_pay_from_20_us_on() -> None:
    # 2 * 400 * 1000 * 5 operations: 4 us, of which padding gains five times as much.
    padded = product(400, 1000, 5)
    assert COSTS.worth_padding(padded) and not COSTS.worth_padding(product(399, 1000, 5))
    assert COSTS.padding(padded, 0, 0)
    assert not COSTS.padding(padded, 1, 0) and not COSTS.padding(padded, 0, 1)
    twice = product(800, 1000, 5)
    assert COSTS.padding(twice, 18_000, 1) and not COSTS.padding(twice, 18_001, 1)
    assert COSTS.as_product(10e6, 70_000) and not COSTS.as_product(10e6, 70_001)
    assert COSTS.channels_last(10_000, 0) and not COSTS.channels_last(10_000, 1)
    image = value(0, 1024, 1024, dtype=torch.float64)
    pooled = Op(aten.max_pool2d_with_indices.default, Kind.WINDOW, (image,), (), (image,), Result(0), (image,))
    assert COSTS.windows(pooled)
    assert not COSTS.windows(replace(pooled, results=(value(1, 1024, 1023, dtype=torch.float64),)))


@pytest.mark.parametrize(
    ("rows", "columns", "inner", "n"),
    [
        (1, 1 << 15, True, 1),
        (1, (1 << 15) + 1, True, 32),
        (1, 1 << 20, True, 512),
        (131, 1 << 20, True, 4),
        (132, 1 << 20, True, 1),
        (100, 512, True, 1),
        (64, 1 << 15, False, 1024),
        (65, 1 << 15, False, 512),
        (64, 1 << 14, False, 512),
        (64 * 131 + 1, 1 << 10, False, 1),
        (64 * 131, 1 << 10, False, 8),
    ],
)
def test_rows_are_cut_until_the_device_is_full(rows: int, columns: int, inner: bool, n: int) -> None:
    assert parts(rows, columns, inner) == n


def test_a_plan_has_other_tiles_where_any_differs() -> None:
    one, two = Launch((kernel((8,), (1,), (1,)),)), Launch((kernel((8,), (1,), (1,)),))
    plan = Plan(Graph((), (), ()), (one, two, Launch(op=product(1, 1, 1))), {}, 0, ())
    tile = Tile(1, 0, 1)
    changed = plan.with_tiles(lambda launch: tile if launch is one else None)
    assert [launch.tile for launch in changed.launches] == [tile, None, None]
    assert plan.with_tiles(lambda launch: None) is plan
    assert changed.with_tiles(lambda launch: launch.tile) is changed
