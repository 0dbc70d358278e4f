"""Whole-region replay, without a device: when a region is captured, what it guards, and who holds its results."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.config import KitsuneWarning, config
from kitsune.ir import storage_of
from tests.property import steps as _steps, steps_autograd as _autograd  # noqa: F401  (they fill the table)
from tests.property.strategies import programs
from tests.property.test_programs import SLOW
from tests.property.world import Program, differences
from tests.runtime.backends import assert_equal, lazily, loop, runner, update
from tests.runtime.repeated import Repeated, counts, graphs

REGIONS = 1
BOTH = pytest.mark.parametrize("kernels", [True, False])


def train(context: Any, steps: int = 8, **how: Any) -> list[torch.Tensor]:
    """What training leaves, with everything that may go wrong in a loop chosen by `how`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    x, target = torch.randn(8, 6), torch.arange(8) % 3
    kept = []
    with context:
        for step in range(steps):
            if how.get("fresh"):
                kept.append(x := torch.randn(8, 6, generator=torch.Generator().manual_seed(step)))
            if step == how.get("seed"):
                torch.manual_seed(7)
            if step == how.get("replace"):
                model[0].weight = nn.Parameter(model[0].weight.detach().clone())
                optimizer.param_groups[0]["params"][0] = model[0].weight
            if step == how.get("load"):
                optimizer.load_state_dict(optimizer.state_dict())
            hidden = model[:3](x)
            loss = F.cross_entropy(model[3](hidden), target)
            update(loss, optimizer, schedule, step, how)
            if how.get("hold"):
                kept += [loss, hidden]
            kept.append(loss.detach())
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*(k.detach() for k in kept), *model.parameters(), *grads, *state, torch.rand(3)]


HOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a batch at another address": {"fresh": True},
    "losses and activations held": {"hold": True},
    "accumulation": {"every": 3, "steps": 18},
    "gradients kept": {"zero": False},
    "reseeded": {"seed": 5},
    "a parameter replaced": {"replace": 5, "steps": 12},
    "optimizer state loaded": {"load": 5, "steps": 12},
}


@BOTH
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_training_is_as_in_eager(how: dict[str, Any], kernels: bool) -> None:
    expected = train(kitsune.disable(), **how)
    with graphs(kernels), config.patch(fuse=kernels):
        assert_equal(train(lazily(), **how), expected)
        assert counts("replayed")[0] >= 3 or not kernels, kitsune.counters()
        assert not kitsune.explain().mended


def test_a_learning_rate_that_moves_is_no_new_capture() -> None:
    with graphs() as repeater:
        train(lazily(), steps=12)
        captured, replayed, refused = counts("captured", "replayed", "graph_refused")
        # A gradient's address on the heap may differ from one step to the next, which is another reason for a capture.
        assert not refused and REGIONS <= captured == repeater.n_recorded < 2 * REGIONS and replayed > REGIONS * 7


def test_without_kernels_what_takes_a_number_that_moves_follows_the_graph() -> None:
    expected = train(kitsune.disable(), steps=12)
    with graphs(kernels=False):
        assert_equal(train(lazily(), steps=12), expected)
        captured, replayed, refused = counts("captured", "replayed", "graph_refused")
        assert not refused and REGIONS <= captured < 3 * REGIONS and replayed > REGIONS * 5


def test_without_fuse_kernels_read_the_numbers_that_move() -> None:
    expected = train(kitsune.disable(), steps=12)
    with graphs(), config.patch(fuse=False):
        assert_equal(train(lazily(), steps=12), expected)
        captured, refused = counts("captured", "graph_refused")
        assert not refused and REGIONS <= captured < 2 * REGIONS


def test_reset_destroys_every_graph() -> None:
    with graphs() as repeater:
        train(lazily())
        assert 0 < repeater.n_alive <= REGIONS
        kitsune.reset()
        assert repeater.n_alive == 0
        train(lazily())
        assert counts("captured")[0] > 0


def test_graphs_can_be_switched_off() -> None:
    with graphs() as repeater, config.patch(graphs=False):
        train(lazily())
        assert repeater.n_recorded == 0 and counts("captured", "replayed") == [0, 0]


@pytest.mark.parametrize("what", ["record", "replay"])
@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("no memory")])
def test_what_fails_is_computed_in_the_ordinary_way(what: str, error: Exception) -> None:
    expected = train(kitsune.disable())
    with graphs() as repeater, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", KitsuneWarning)
        repeater.broken[what] = error
        assert_equal(train(lazily()), expected)
        assert counts("replayed") == [0] and repeater.n_alive == 0
        told = [str(w.message) for w in said if issubclass(w.category, KitsuneWarning)]
        assert len(told) == (0 if what == "replay" and isinstance(error, torch.OutOfMemoryError) else REGIONS), told
        assert all("cannot be replayed as a CUDA graph" in sentence for sentence in told)


def test_only_so_many_graphs_are_kept() -> None:
    def step(n: int) -> torch.Tensor:
        x = torch.ones(n, 3)
        with kitsune.accelerate(warmup=0, device="cpu"):
            return ((x + 1) @ torch.ones(3, 2)).relu() * 2

    with graphs() as repeater, config.patch(max_graphs=2):
        for _ in range(6):
            for n in (2, 3, 4):
                assert torch.equal(step(n), torch.full((n, 2), 12.0))
        assert repeater.n_alive <= 2 < counts("captured")[0]


def test_a_run_between_replays_has_the_arena_of_the_graphs() -> None:
    def step(x: torch.Tensor) -> float:
        w = torch.ones(16, 16)
        # What is between the products is in the arena.
        return float((((x + 1) @ w - (x - 1) @ w) @ w).sum())

    with graphs() as repeater, lazily():
        x, y = torch.ones(16, 16), torch.ones(16, 16)
        expected = step(x)
        for _ in range(4):
            assert step(x) == expected
        # Another region is captured behind that: to make room, what nobody uses is let go of.
        for _ in range(4):
            assert [step(x), (x * 3 @ x).relu().sum().item()] == [expected, 16 * 16 * 48.0]
        assert repeater.n_alive == 2
        pool, arenas = runner().pool, runner().arenas
        before, replayed = pool.statistics, counts("replayed")
        # Inputs are elsewhere, so that it is an ordinary run.
        assert step(y) == expected and counts("replayed") == replayed
        after = pool.statistics
        assert after.misses == before.misses and after.hits > before.hits and len(arenas._alive) == 1
        kitsune.reset()
        assert pool.statistics.held_bytes == 0 and not arenas._alive


def test_a_graph_that_needs_too_much_is_refused() -> None:
    with graphs(), config.patch(graph_memory=1):
        train(lazily())
        assert "graph_memory" in next(iter(counts("graph_refused")[0]))


def state(x: torch.Tensor) -> torch.Tensor:
    return (x * 2 + 1).relu()


def test_what_comes_in_may_be_what_the_same_graph_returned() -> None:
    x = expected = torch.ones(4)
    with graphs(), lazily():
        for _ in range(9):
            x, expected = state(x), (expected * 2 + 1).relu()
            kitsune.flush()
            assert torch.equal(x, expected)
    assert torch.equal(x, expected)


def test_a_view_that_nobody_knows_of_keeps_its_content() -> None:
    with graphs(), lazily():
        views, results = [], []
        x = torch.ones(4)
        for k in range(8):
            x.add_(1)
            kitsune.flush()
            y = state(x)
            kitsune.flush()
            results.append(y)
            views.append(y.cell.real[1:3])  # behind Kitsune's back
            del y
            if k == 5:
                results.clear()
    assert [v.tolist() for v in views] == [[2 * k + 5] * 2 for k in range(8)]


@pytest.mark.parametrize("door", ["numpy", "detach", "view", "dlpack"])
def test_what_a_door_lets_out_keeps_its_content(door: str) -> None:
    let_out = []
    with graphs(), lazily():
        x = torch.ones(4)
        for _ in range(8):
            x.add_(1)
            kitsune.flush()
            y = state(x)
            kitsune.flush()
            let_out.append(
                {
                    "numpy": lambda y=y: y.numpy(),
                    "detach": lambda y=y: y.detach(),
                    "view": lambda y=y: y.view(2, 2),
                    "dlpack": lambda y=y: torch.from_dlpack(y),
                }[door]()
            )
            del y
        assert counts("replayed")[0] > 4
    assert [float(v.reshape(-1)[0]) for v in let_out] == [2 * k + 5 for k in range(8)]


def test_results_of_one_memory_stay_of_one_memory_when_they_move() -> None:
    held = []
    with graphs(), lazily():
        x = torch.ones(2, 3)
        for _ in range(6):
            x.add_(1)
            kitsune.flush()
            y = x * 2
            held.append((y, y.t()))
            kitsune.flush()
        assert counts("moved")[0] > 0
        for k, (y, turned) in enumerate(held):
            turned.add_(1)
            assert y.tolist() == [[2 * (k + 2) + 1.0] * 3] * 2
            assert y.data_ptr() == turned.data_ptr()


def test_a_region_that_writes_an_input_at_another_address_each_time_is_refused() -> None:
    kept = []
    with graphs(), lazily():
        for k in range(30):
            kept.append(x := torch.full((4,), float(k)))
            kitsune.flush()
            x.mul_(2)
            kitsune.flush()
            del x
        assert "aten.mul_" in " ".join(counts("graph_refused")[0])
    assert [t[0].item() for t in kept] == [2.0 * k for k in range(30)]


def test_an_exception_in_between_changes_nothing() -> None:
    def program(context: Any) -> list[torch.Tensor]:
        x, kept = torch.ones(4), []
        for k in range(8):
            with contextlib.suppress(ValueError), context:
                y = state(x) + k * 1.0
                kept.append(y)
                if k in (3, 6):
                    raise ValueError
        return kept

    expected = program(kitsune.disable())
    with graphs():
        assert_equal(program(lazily()), expected)


def test_a_setting_of_the_libraries_is_another_graph() -> None:
    with graphs() as repeater, lazily():
        x = torch.ones(4)
        for k in range(16):
            torch._C._set_cudnn_benchmark(k % 8 > 3)
            y = state(x)
            kitsune.flush()
            assert y.tolist() == [3.0] * 4
        assert repeater.n_alive == 2
    torch._C._set_cudnn_benchmark(False)


@settings(SLOW, max_examples=100)
@given(program=programs())
@pytest.mark.parametrize("kernels", [True, False])
def test_random_programs(program: Program, kernels: bool) -> None:
    expected = program.run(contextlib.nullcontext(), eager=True)
    with graphs(kernels):
        for turn in range(5):
            got = program.run(lazily())
            assert not (found := differences(expected, got)), f"round {turn}: {found}"


def test_loops_of_other_tests_are_the_same_with_graphs() -> None:
    expected = loop(kitsune.disable(), steps=6)
    with graphs():
        assert_equal(loop(lazily(), steps=6), expected)
        assert counts("replayed")[0] > 2


def test_a_view_that_a_later_region_makes_of_a_result_moves_with_it() -> None:
    kept, xs, weight = [], torch.arange(36.0).view(12, 3), torch.ones(3, requires_grad=True)
    with graphs(), lazily():
        for x in xs:
            loss = (x * weight).exp()
            kitsune.flush()
            kept.append(loss.detach())
            kitsune.flush()
        assert counts("replayed")[0] > 5 and not counts("graph_missed")[0]
    assert all(map(torch.equal, kept, xs.exp()))


def test_a_graph_that_has_fitted_for_long_stays_while_its_inputs_are_elsewhere_for_a_moment() -> None:
    def places(k: int) -> int:
        return int(k in (14, 15, 16) or k >= 30)

    memory, expected, captured = [torch.zeros(6) for _ in range(2)], [torch.zeros(6) for _ in range(2)], []
    with graphs():
        for k in range(50):
            with kitsune.accelerate(device="cpu"):
                # Written, so that it cannot be copied to one place.
                memory[places(k)].add_(1).mul_(1.5)
            captured.append(kitsune.counters()["captured"])
    for k in range(50):
        expected[places(k)].add_(1).mul_(1.5)
    assert all(map(torch.equal, memory, expected))
    # Back where it was it is replayed at once; where it stays elsewhere it is captured there.
    assert captured[13] == captured[29] == 1 and captured[-1] == 2


def test_outputs_are_nobodys_when_their_graph_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    uses: list[int] = []
    destroy = Repeated.destroy

    def looked_at(graph: Repeated) -> None:
        # What a graph itself refers to is gone as well in CUDA's: here it is one tensor for each.
        uses.extend(torch._C._storage_Use_Count(storage_of(t)._cdata) for t in graph._memory)
        destroy(graph)

    monkeypatch.setattr(Repeated, "destroy", looked_at)
    alone = torch.ones(4)
    with graphs(), lazily():
        for _ in range(6):
            # More than what is copied for who asks.
            y = state(torch.ones(64))
            kitsune.flush()
            del y
        assert counts("replayed")[0] > 0
        kitsune.reset()
    assert uses and set(uses) == {torch._C._storage_Use_Count(storage_of(alone)._cdata)}
