"""Doors that write, doors to random state, other threads, and those of a CUDA device."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kitsune


def lazily() -> Any:
    return kitsune.accelerate(warmup=0, device="cpu")


def flushed() -> dict[str, int]:
    causes: dict[str, int] = kitsune.counters()["flushed"]
    return causes


@pytest.fixture(autouse=True)
def forgotten() -> None:
    kitsune.reset()


# ---- writing through memory ----


def test_a_write_through_numpy_is_seen_by_later_operators() -> None:
    base = torch.zeros(3)
    with lazily():
        result = base + 1
        base.numpy()[0] = 5
        later = base + 1
    assert (result.tolist(), later.tolist()) == ([1.0, 1.0, 1.0], [6.0, 1.0, 1.0])


def test_a_write_through_the_numpy_of_a_pending_result_stays() -> None:
    with lazily():
        result = torch.zeros(3) + 1
        result.numpy()[1] = 7
        doubled = result * 2
    assert (result.tolist(), doubled.tolist()) == ([1.0, 7.0, 1.0], [2.0, 14.0, 2.0])


def test_an_operator_issued_before_a_write_by_dlpack_reads_the_old_value() -> None:
    base = torch.ones(3)
    with lazily():
        before = base * 2
        torch.from_dlpack(base.__dlpack__()).fill_(9)
        after = base * 2
    assert (before.tolist(), after.tolist()) == ([2.0] * 3, [18.0] * 3)


# ---- .data ----


def test_data_shares_memory_and_has_no_history() -> None:
    weight = torch.ones(3, requires_grad=True)
    with lazily():
        y = weight * 2
        y.data.add_(1)
    assert y.tolist() == [3.0] * 3
    assert not y.data.requires_grad and y.data.data_ptr() == y.data_ptr()


@pytest.mark.parametrize("pending_value", [False, True])
@pytest.mark.parametrize("pending_target", [False, True])
def test_data_can_be_set(pending_target: bool, pending_value: bool) -> None:
    target, value = torch.zeros(2), torch.ones(2, 2)
    with lazily():
        kept = target + 0
        target = target + 1 if pending_target else target
        value = value * 3 if pending_value else value
        target.data = value
        value.mul_(2)
        result = target + 1
    expected = 6.0 if pending_value else 2.0
    assert (kept.tolist(), target.tolist()) == ([0.0, 0.0], [[expected] * 2] * 2)
    assert result.tolist() == [[expected + 1] * 2] * 2


def test_data_of_a_parameter_with_a_pending_write_can_be_set() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    with lazily():
        with torch.no_grad():
            parameter.add_(1)
        alias = parameter.detach()
        parameter.data = parameter.data * 10
        parameter.grad = torch.ones(2)
    assert (parameter.tolist(), alias.tolist(), type(parameter)) == ([10.0, 10.0], [1.0, 1.0], nn.Parameter)


def test_a_shallow_copy_shares_memory() -> None:
    with lazily():
        tensor = torch.zeros(2) + 1
        twin = copy.copy(tensor)
        tensor.add_(1)
    assert twin.tolist() == [2.0, 2.0]


def test_a_module_is_copied_deeply_with_its_pending_writes() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with lazily():
        with torch.no_grad():
            layer.weight.fill_(3)
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            layer.weight.fill_(4)
    assert (twin.weight.tolist(), layer.weight.tolist()) == ([[3.0, 3.0]], [[4.0, 4.0]])
    assert type(twin.weight) is nn.Parameter


# ---- random state ----


def draws(between: Callable[[], Any]) -> list[list[float]]:
    torch.manual_seed(3)
    first = torch.rand(4)
    between()
    return [first.tolist(), torch.rand(4).tolist()]


def set_state_again() -> None:
    state = torch.get_rng_state()
    torch.rand(3)
    torch.set_rng_state(state)


def forked() -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        return torch.rand(3)


def default_generator_again() -> None:
    state = torch.default_generator.get_state()
    torch.rand(3)
    torch.default_generator.set_state(state)


RANDOM_STATE: dict[str, Callable[[], Any]] = {
    "manual_seed": lambda: torch.manual_seed(11),
    "get and set": set_state_again,
    "fork": forked,
    "a pending seed": lambda: torch.manual_seed(int(torch.tensor(4) + 1)),
    "the generator's own seed": lambda: torch.default_generator.manual_seed(11),
    "the generator's own state": default_generator_again,
}


@pytest.mark.parametrize("name", RANDOM_STATE)
def test_random_state_is_touched_after_what_was_drawn_before(name: str) -> None:
    expected = [draws(RANDOM_STATE[name]), torch.rand(1).item()]
    with lazily():
        found = draws(RANDOM_STATE[name])
    assert [found, torch.rand(1).item()] == expected


def test_reading_random_state_flushes_by_its_own_cause() -> None:
    with lazily():
        torch.rand(2)
        torch.get_rng_state()
    assert flushed() == {"RANDOM_STATE": 1}


def test_seeding_flushes_nothing_when_nothing_random_is_pending() -> None:
    with lazily():
        torch.zeros(2).add_(1)
        torch.manual_seed(0)
        assert flushed() == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_with_dropout_draws_the_same_mask_again(reentrant: bool) -> None:
    def gradient() -> list[list[float]]:
        torch.manual_seed(5)
        x = torch.ones(4, 8, requires_grad=True)
        y = checkpoint(lambda x: F.dropout(x * x, 0.5), x, use_reentrant=reentrant)
        y.pow(2).sum().backward()
        assert x.grad is not None
        return [y.flatten().tolist(), x.grad.flatten().tolist()]

    expected = gradient()
    with lazily():
        assert gradient() == expected
    assert flushed().get("RANDOM_STATE", 0) > 0


# ---- other threads ----


def elsewhere(function: Callable[[], Any]) -> Any:
    """The function's result, computed in another thread."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def test_another_thread_reads_a_pending_result() -> None:
    with lazily():
        pending = torch.ones(3) * 4
        assert elsewhere(pending.tolist) == [4.0] * 3


def test_another_thread_computes_with_a_pending_result() -> None:
    with lazily():
        pending = torch.ones(3) * 4
        assert elsewhere(lambda: (pending + 1).tolist()) == [5.0] * 3
        assert (pending + 1).tolist() == [5.0] * 3


def test_another_thread_reads_a_parameter_with_a_pending_write() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    with lazily():
        with torch.no_grad():
            parameter.add_(2)
        assert elsewhere(lambda: parameter.detach().tolist()) == [2.0] * 3


def test_threads_record_apart() -> None:
    def work(start: float) -> list[float]:
        x = torch.full((4,), start)
        with lazily():
            for _ in range(50):
                x = x * 1.01 + 0.5
        values: list[float] = x.tolist()
        return values

    expected = [work(float(i)) for i in range(4)]
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, work(float(i)))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [found[i] for i in range(4)] == expected


# ---- a CUDA device ----


@pytest.fixture
def on_gpu() -> Any:
    with kitsune.accelerate(warmup=0, device="cuda"):
        yield torch.ones(1000, device="cuda")


def synchronised(x: torch.Tensor) -> None:
    torch.cuda.synchronize()


def event_recorded(x: torch.Tensor) -> None:
    torch.cuda.Event().record()


def on_another_stream(x: torch.Tensor) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("door", [synchronised, event_recorded, on_another_stream])
def test_the_device_is_synchronised_after_what_was_issued(on_gpu: torch.Tensor, door: Callable[..., None]) -> None:
    result = on_gpu * 3
    door(result)
    assert set(flushed()) == {"SYNCHRONIZE"}
    assert result.sum().item() == 3000


@pytest.mark.gpu
def test_an_event_times_what_was_issued_before_it(on_gpu: torch.Tensor) -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = on_gpu
    for _ in range(100):
        result = result * 1.01
    end.record()
    recorded = kitsune.counters()["recorded"]
    torch.cuda.synchronize()
    assert recorded >= 100 and start.elapsed_time(end) > 0


@pytest.mark.gpu
def test_the_cuda_array_interface_shows_computed_memory(on_gpu: torch.Tensor) -> None:
    result = on_gpu * 3
    pointer = result.__cuda_array_interface__["data"][0]
    assert pointer == result.data_ptr() != 0
    assert flushed() == {"DOOR": 1}


@pytest.mark.gpu
def test_a_jiterator_reads_computed_memory(on_gpu: torch.Tensor) -> None:
    plus_one = torch.cuda.jiterator._create_jit_fn("template <typename T> T plus_one(T x) { return x + 1; }")
    pending = plus_one(on_gpu * 3)
    written = plus_one(on_gpu.add_(1))
    assert (pending.sum().item(), written.sum().item()) == (4000, 3000)


@pytest.mark.gpu
def test_a_users_triton_kernel_reads_and_writes_computed_memory(on_gpu: torch.Tensor) -> None:
    pytest.importorskip("triton")
    from tests.triton_kernel import add_one

    x, out = on_gpu * 3, torch.zeros_like(on_gpu)
    add_one[(1,)](x, out, 1000, BLOCK=1024)
    assert (out * 2).sum().item() == 8000


@pytest.mark.gpu
def test_a_copy_to_the_host_is_computed(on_gpu: torch.Tensor) -> None:
    assert (on_gpu * 3).cpu().sum().item() == 3000


@pytest.mark.gpu
def test_work_on_another_stream_sees_what_was_issued(on_gpu: torch.Tensor) -> None:
    result = on_gpu * 3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        total = result.sum()
    torch.cuda.current_stream().wait_stream(stream)
    assert total.item() == 3000


@pytest.mark.gpu
def test_random_state_of_the_device_is_touched_in_order() -> None:
    def found() -> list[float]:
        torch.cuda.manual_seed(3)
        first = torch.rand(4, device="cuda")
        state = torch.cuda.get_rng_state()
        second = torch.rand(4, device="cuda")
        torch.cuda.set_rng_state(state)
        return [*first.tolist(), *second.tolist(), *torch.rand(4, device="cuda").tolist()]

    expected = found()
    with kitsune.accelerate(warmup=0, device="cuda"):
        assert found() == expected
