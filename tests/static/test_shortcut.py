"""The short way to the next call: what it notices, when it is gone, and what it falls back on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kitsune
from kitsune.config import KitsuneWarning, config
from kitsune.pipeline import Follower
from kitsune.runtime.slots import SlotTable
from kitsune.static import StaticFunction
from kitsune.static.moment import Moment
from tests.runtime.repeated import graphs
from tests.static.programs import Training, adamw, compare, meddling, normed, sgd, straight

WARM, AGAIN = 5, 5


@pytest.fixture(autouse=True)
def replayed() -> Iterator[Any]:
    """Regions are captured."""
    kitsune.reset()
    with graphs(kernels=False) as repeater:
        yield repeater
    kitsune.reset()


@contextlib.contextmanager
def switched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def put(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def cudnn(name: str, value: bool) -> Any:
    """Assigning to torch.backends.cudnn is refused once torch's own test utilities were imported."""
    return put(getattr(torch._C, f"_get_cudnn_{name}"), getattr(torch._C, f"_set_cudnn_{name}"), value)


@contextlib.contextmanager
def hooked(register: Callable[..., Any]) -> Iterator[None]:
    handle = register(lambda *args: None)
    yield
    handle.remove()


@contextlib.contextmanager
def transformed() -> Iterator[None]:
    torch._C._functorch._vmap_increment_nesting(2, "error")
    yield
    torch._C._functorch._vmap_decrement_nesting()


MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
AUTOCAST = torch.get_autocast_dtype
SWITCHES: dict[str, Callable[[], Any]] = {
    "grad mode": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast in another dtype": lambda: put(
        lambda: AUTOCAST("cpu"), lambda d: torch.set_autocast_dtype("cpu", d), torch.float16
    ),
    "autocast without its cache": lambda: put(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False),
    "default dtype": lambda: put(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "deterministic": lambda: put(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 2),
    "deterministic, warning": lambda: put(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 1),
    "tf32": lambda: put(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "sums in fp16": lambda: switched(MATMUL, "allow_fp16_reduced_precision_reduction", False),
    "sums in bf16": lambda: switched(MATMUL, "allow_bf16_reduced_precision_reduction", False),
    "accumulation in fp16": lambda: switched(MATMUL, "allow_fp16_accumulation", True),
    "tf32 in convolutions": lambda: switched(CUDNN.conv, "fp32_precision", "ieee"),
    "no cudnn": lambda: cudnn("enabled", False),
    "cudnn benchmark": lambda: cudnn("benchmark", True),
    "cudnn deterministic": lambda: cudnn("deterministic", True),
    "attention's sums": lambda: put(
        torch._C._get_math_sdp_allow_fp16_bf16_reduction, torch._C._set_math_sdp_allow_fp16_bf16_reduction, True
    ),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "a function mode": TorchFunctionMode,
    "a device": lambda: torch.device("cpu"),
    "a dispatch mode": TorchDispatchMode,
    "a transform": transformed,
    "a hook on modules": lambda: hooked(nn.modules.module.register_module_forward_hook),
    "a hook on optimizers": lambda: hooked(register_optimizer_step_pre_hook),
    "a profiler": lambda: torch.autograd.profiler.profile(),
    "a context": lambda: kitsune.accelerate(device="cpu"),
    "a stance": lambda: kitsune.set_stance("force_eager"),
    "a knob": lambda: config.patch(graphs=False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Deterministic behavior")
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_what_torch_is_set_to_is_noticed(switch: Callable[[], Any]) -> None:
    before = Moment("cpu")
    assert before.is_now() and before.is_plain
    with switch():
        assert not before.is_now()
    # Knobs are counted, not compared.
    assert before.is_now() or switch is SWITCHES["a knob"]


@pytest.mark.parametrize(
    "name", ["a function mode", "a device", "a dispatch mode", "a transform", "inference mode", "a profiler"]
)
def test_what_is_only_counted_takes_the_long_way(name: str) -> None:
    with SWITCHES[name]():
        assert not Moment("cpu").is_plain


def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a call went the long way."""
    found: list[int] = []
    long_way = StaticFunction._looked_up
    monkeypatch.setattr(StaticFunction, "_looked_up", lambda self, *of: (found.append(1), long_way(self, *of))[1])
    return found


def test_a_steady_step_goes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    found = looked_up(monkeypatch)
    _, counters = compare(straight(40), at_most=WARM, optimizer=adamw, audit=0)
    assert len(found) == WARM and counters["replayed"] > 30, (len(found), counters)


def test_losses_of_the_short_way_are_plain_tensors_of_their_own() -> None:
    training, _ = compare(straight(40), at_most=WARM)
    last = training.kept[-20:]
    assert {type(loss) for loss in last} == {Tensor}
    assert len({loss.data_ptr() for loss in training.kept}) == 40
    assert all(loss._version == 0 and loss.untyped_storage().nbytes() == 4 for loss in last)


def test_an_audit_comes_in_time() -> None:
    _, counters = compare(straight(40), at_most=WARM + 4, audit=10)
    assert counters["static_audits"] == 3


def betas_in_a_list(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True)
    optimizer.param_groups[0]["betas"] = [0.9, 0.999]
    return optimizer


def other_betas(t: Training) -> None:
    t.optimizer.param_groups[0]["betas"] = (0.7, 0.99)


def a_beta_inside_the_list(t: Training) -> None:
    t.optimizer.param_groups[0]["betas"][0] = 0.5


def other_weight_decay(t: Training) -> None:
    t.optimizer.param_groups[0]["weight_decay"] = 0.3


def a_parameter_more(t: Training) -> None:
    t.model[0].register_parameter("more", nn.Parameter(torch.ones(2)))
    t.optimizer.add_param_group({"params": [t.model[0].more]})


def hollow() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(), nn.Linear(8, 3))


def a_first_module(t: Training) -> None:
    t.model[1].append(nn.Tanh())


def state_of_one(t: Training) -> None:
    held = t.optimizer.state[t.model[0].weight]
    held["exp_avg"] = held["exp_avg"].clone() * 0.5


def memory_of_state(t: Training) -> None:
    held = t.optimizer.state[t.model[0].weight]
    held["exp_avg"].data = held["exp_avg"].data.clone() * 0.5


def other_statistics(t: Training) -> None:
    t.model[1].running_mean.data = t.model[1].running_mean.data.clone() + 1


def all_of_state(t: Training) -> None:
    state = t.optimizer.state
    t.optimizer.state = type(state)(dict, {p: {k: v.clone() for k, v in held.items()} for p, held in state.items()})


def all_groups(t: Training) -> None:
    t.optimizer.param_groups = [dict(t.optimizer.param_groups[0], lr=0.5)]


def a_group_less(t: Training) -> None:
    t.optimizer.param_groups[0]["params"] = t.optimizer.param_groups[0]["params"][1:]


MEDDLING: list[tuple[Callable[[Training], None], dict[str, Any]]] = [
    (other_betas, {"optimizer": adamw}),
    (a_beta_inside_the_list, {"optimizer": betas_in_a_list}),
    (other_weight_decay, {"optimizer": adamw}),
    (a_parameter_more, {"optimizer": sgd}),
    (a_first_module, {"model": hollow}),
    (state_of_one, {"optimizer": adamw}),
    (memory_of_state, {"optimizer": adamw}),
    (other_statistics, {"model": normed}),
    (all_of_state, {"optimizer": adamw}),
    (all_groups, {"optimizer": sgd}),
    (a_group_less, {"optimizer": sgd}),
]


@pytest.mark.parametrize(("change", "how"), MEDDLING, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_held_is_noticed(change: Callable[[Training], None], how: dict[str, Any]) -> None:
    compare(meddling(change, at=20, n=40), at_most=WARM + AGAIN + 2, **how)


def test_a_rate_that_comes_back_is_the_one_that_it_was() -> None:
    """The very object: what was seen last must not be taken for what is there."""
    rates = [0.1, 0.03]

    def drive(t: Training) -> None:
        for i in range(60):
            t.optimizer.param_groups[0]["lr"] = rates[(i // 7) % 2]
            t.take(i % 40)

    compare(drive, at_most=WARM + AGAIN)


BATCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "another shape": lambda x: x[:3],
    "other strides": lambda x: x.t().contiguous().t(),
    "a gradient asked for": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: nn.Parameter(x.clone()),
    "repeated": lambda x: x[:1].expand(4, 6),
}


@pytest.mark.parametrize("other", BATCHES.values(), ids=BATCHES)
def test_another_kind_of_batch_is_noticed(other: Callable[[Tensor], Tensor]) -> None:
    def drive(t: Training) -> None:
        for i in range(40):
            x, y = t.xs[i], t.ys[i]
            if i % 10 == 9:
                x = other(x)
                y = y[: len(x)]
            t.kept.append(t.step(x, y))
            t.kept.append(torch.zeros(1) if x.grad is None else x.grad.clone())

    compare(drive, at_most=2 * WARM)


def test_a_batch_with_a_graph_is_no_leaf() -> None:
    """Its gradient goes on to where it came from."""
    scale = torch.ones(1, requires_grad=True)

    def drive(t: Training) -> None:
        scale.grad = None
        for i in range(40):
            x = t.xs[i].clone().requires_grad_()
            t.kept.append(t.step(x * scale if i % 10 == 9 else x, t.ys[i]))
        assert scale.grad is not None
        t.kept.append(scale.grad.clone())

    compare(drive, at_most=WARM + 4)


def test_who_asks_for_a_gradient_is_noticed_without_grad_mode() -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            loss = Training.plain(t, x, y)
        return loss if x.grad is None else x.grad.sum()

    def drive(t: Training) -> None:
        with torch.no_grad():
            for i in range(40):
                t.kept.append(t.step(t.xs[i].clone().requires_grad_(i % 10 == 9), t.ys[i]))

    compare(drive, at_most=3 * WARM, body=body)


def test_a_batch_in_another_dtype_is_noticed() -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        return Training.plain(t, x.float(), y)

    def drive(t: Training) -> None:
        for i in range(40):
            t.kept.append(t.step(t.xs[i].double() if i % 10 == 9 else t.xs[i], t.ys[i]))

    compare(drive, at_most=2 * WARM, body=body)


def test_a_batch_that_lies_in_a_parameter_is_noticed() -> None:
    def body(t: Training, x: Tensor, y: Tensor) -> Tensor:
        first = Training.plain(t, x, y)
        return first + Training.plain(t, x, y)

    def drive(t: Training) -> None:
        for i in range(40):
            t.kept.append(t.step(t.model[0].weight.detach()[:4] if i % 10 == 9 else t.xs[i], t.ys[i]))

    compare(drive, at_most=40, body=body)


def test_a_replay_that_fails_is_run_in_the_ordinary_way_once(replayed: Any) -> None:
    def drive(t: Training) -> None:
        replayed.broken.clear()
        for i in range(30):
            if i == 20:
                replayed.broken["replay"] = RuntimeError("operation not permitted")
            t.take(i)

    with pytest.warns(KitsuneWarning, match="operation not permitted"):
        _, counters = compare(drive, at_most=WARM)
    assert counters["graph_refused"] and 0 < counters["replayed"] < 20, counters


def test_no_memory_in_a_replay_leaves_the_short_way_to_itself(replayed: Any) -> None:
    def drive(t: Training) -> None:
        for i in range(40):
            replayed.broken.clear()
            if i in (18, 19):
                replayed.broken["replay"] = torch.OutOfMemoryError("no memory")
            t.take(i)

    _, counters = compare(drive, at_most=WARM)
    assert counters["captured"] > 1 and counters["replayed"] > 10 and not counters["graph_refused"], counters


def test_graphs_that_are_switched_off_are_not_replayed() -> None:
    def drive(t: Training) -> None:
        straight(20)(t)
        before = kitsune.counters()["replayed"]
        with config.patch(graphs=False):
            for i in range(20, 30):
                t.take(i)
            assert kitsune.counters()["replayed"] == before
        for i in range(30, 40):
            t.take(i)

    _, counters = compare(drive, at_most=WARM)
    assert counters["replayed"] > 15, counters


def test_a_library_switch_makes_another_graph(replayed: Any) -> None:
    def drive(t: Training) -> None:
        straight(20)(t)
        with cudnn("deterministic", True):
            for i in range(20, 40):
                t.take(i)

    compare(drive, at_most=WARM)
    assert replayed.n_recorded == 2


def test_a_table_sees_what_changes_inside_a_list() -> None:
    table, numbers = SlotTable(2, torch.device("cpu")), [1.0, 2.0]
    table.set(numbers)
    numbers[1] = 3.0
    table.set(numbers)
    assert table.memory.tolist() == [1.0, 3.0]
    table.set((4.0, 5.0))
    table.set(numbers)
    assert table.memory.tolist() == [1.0, 3.0]


def test_a_check_asks_nothing_of_the_call_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at 24 tensors, three times each; what the lane sees of the call is what the step itself calls."""
    seen: list[Any] = []
    call = Follower.__torch_function__
    monkeypatch.setattr(Follower, "__torch_function__", lambda lane, func, *of: (seen.append(func), call(lane, func, *of))[1])
    training, n_seen = Training(optimizer=adamw, static=True, audit=4), []
    for i in range(24):
        seen.clear()
        before = kitsune.counters()["static_audits"]
        training.take(i)
        if kitsune.counters()["static_audits"] > before:
            n_seen.append(len(seen))
    assert n_seen and 0 < max(n_seen) < 20
