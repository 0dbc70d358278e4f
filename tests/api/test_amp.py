"""`enable_amp=True` in an unmodified loop is autocast and GradScaler, step for step and bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

import kitsune
from kitsune import KitsuneOptimizer
from kitsune.amp import AMPConfig, GradScaler, autocast
from tests.api.training import batches, differences, plain_step, small_model, train

HALF = AMPConfig(dtype=torch.float16, init_scale=2.0**10, growth_interval=3)
# Overflows at its first steps, and again each time that it has grown.
HOT = AMPConfig(dtype=torch.float16, init_scale=2.0**24, growth_interval=3)
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    # Without momentum: torch leaves the buffers of a first step that overflows as they come from the allocator.
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class ByHand:
    """The loop that a user of torch.amp writes: forward under autocast, loss in float32, GradScaler around the step."""

    def __init__(
        self, dtype: torch.dtype, config: AMPConfig, clip: bool = False, device: str = "cpu", unscale: bool = False
    ) -> None:
        self.dtype, self.clip, self.device, self.unscale = dtype, clip, device, unscale or clip
        self.scaler = GradScaler(
            device,
            init_scale=config.init_scale,
            growth_interval=config.growth_interval,
            backoff_factor=config.backoff_factor,
            growth_factor=config.growth_factor,
            enabled=dtype is torch.float16,
        )
        self.scales: list[float] = []

    def __call__(self, model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.to(self.device), y.to(self.device)
        optimizer.zero_grad()
        with autocast(self.device, dtype=self.dtype):
            out = model(x)
        loss = F.cross_entropy(out.float(), y)
        self.scaler.scale(loss).backward()
        if self.unscale:
            self.scaler.unscale_(optimizer)
        if self.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.scales.append(self.scaler.get_scale())
        return loss.detach()


def unmodified(clip: bool, scales: list[float], device: str = "cpu") -> Any:
    def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scales.append(optimizer.state_dict()["kitsune"]["scale"])
        return loss.detach()

    return step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("config", [HALF, HOT], ids=["cool", "hot"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float16_is_autocast_and_grad_scaler(name: str, config: AMPConfig, clip: bool, device: str) -> None:
    # On CUDA, torch's fused SGD rounds otherwise where its kernel divides by the scale: gradients are divided after the backward.
    unscale = name == "fused sgd" and device == "cuda"
    by_hand, scales = ByHand(torch.float16, config, clip, device, unscale), []
    model = small_model().to(device)
    expected = train(model, OPTIMIZERS[name](model.parameters()), 24, by_hand)
    model = small_model().to(device)
    optimizer = KitsuneOptimizer(OPTIMIZERS[name](model.parameters()), enable_amp=True, amp_config=config, device=device)
    got = train(model, optimizer, 24, unmodified(clip, scales, device))
    assert not differences(expected, got)
    assert scales == by_hand.scales
    if config is HOT:
        assert min(scales) < 2.0**18, "nothing overflowed"
    assert kitsune.counters()["recorded"] > 0


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("config", [HALF, None], ids=["float16", "bfloat16"])
def test_a_step_is_one_region_with_its_backward_followed_and_no_value_read(config: AMPConfig | None, kind: Any) -> None:
    model = small_model()
    base = kind(model.parameters(), lr=0.01, fused=True)
    optimizer = KitsuneOptimizer(base, enable_amp=True, amp_config=config, device="cpu")
    for x, y in batches(24):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    counters = kitsune.counters()
    assert counters["flushed"]["STEP"] == 24 and "ITEM" not in counters["flushed"], counters["flushed"]
    assert counters["backwards_followed"] >= 20 and counters["updates_followed"] >= 20, counters
    if config is HALF:
        assert type(optimizer._amp.scale.on(torch.device("cpu"))) is torch.Tensor


def test_a_first_step_that_overflows_leaves_no_momentum() -> None:
    model = small_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    optimizer = KitsuneOptimizer(base, enable_amp=True, amp_config=HOT)
    train(model, optimizer, 1)
    assert not base.state
    got = train(model, optimizer, 23, first=1)
    other = small_model()
    expected = train(
        other, KitsuneOptimizer(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), enable_amp=True, amp_config=HOT), 24
    )
    for name, value in got.items():
        if "loss" not in name:
            torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_autocast_alone(device: str) -> None:
    model = small_model().to(device)
    expected = train(model, torch.optim.AdamW(model.parameters()), 8, ByHand(torch.bfloat16, HALF, device=device))
    model = small_model().to(device)
    optimizer = KitsuneOptimizer(torch.optim.AdamW(model.parameters()), enable_amp=True, device=device)

    def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        return plain_step(model, optimizer, x.to(device), y.to(device))

    assert not differences(expected, train(model, optimizer, 8, step))
    assert "scale" not in optimizer.state_dict()["kitsune"]


def test_without_a_config_it_is_bfloat16_and_with_one_what_that_says() -> None:
    seen = []
    for config in (None, AMPConfig(), AMPConfig(dtype=torch.bfloat16), AMPConfig(enabled=False)):
        model = small_model()
        model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True, amp_config=config)
        assert model(batches(1)[0][0]).dtype is torch.float32
        optimizer.close()
    assert seen == [torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]


def test_a_config_alone_switches_nothing_on() -> None:
    model = small_model()
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    seen: list[torch.dtype] = []
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), amp_config=HALF)
    train(model, optimizer, 1)
    assert seen == [torch.float32]


def test_two_backwards_add_up_to_true_gradients() -> None:
    def accumulate(model: nn.Module, scale: Any) -> list[Tensor]:
        for x, y in batches(3):
            scale(F.cross_entropy(model(x), y)).backward()
        return [p.grad.clone() for p in model.parameters()]

    model, other = small_model(), small_model()
    with autocast("cpu", dtype=torch.float16):
        expected = accumulate(model, lambda loss: loss * 2.0**10)
    optimizer = KitsuneOptimizer(torch.optim.SGD(other.parameters()), enable_amp=True, amp_config=HALF)
    got = accumulate(other, lambda loss: loss)
    optimizer.close()
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a / 2.0**10, b, rtol=1e-6, atol=0)


def test_gradients_of_others_in_the_same_backward_are_true_too() -> None:
    """A leaf that comes in, a layer before the model that is another optimizer's, and a loss with parameters of its own."""

    def run(wrap: Any) -> list[Tensor]:
        model, before, centre = small_model(), nn.Linear(8, 8), nn.Parameter(torch.ones(4))
        with torch.no_grad():
            before.weight.fill_(0.1), before.bias.fill_(0.2)
        optimizer = wrap(model)
        x = batches(1)[0][0].requires_grad_()
        out = model(before(x))
        ((out - centre) ** 2).mean().backward()
        optimizer.step()
        return [x.grad, before.weight.grad, centre.grad]

    plain = run(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    for gate in (False, True):
        with kitsune.config.patch(gate=gate, enabled=True):
            scaled = run(
                lambda model: KitsuneOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), enable_amp=True, amp_config=HALF)
            )
        for a, b in zip(plain, scaled, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-4)  # one is float16's, and a factor of 1024 would show


def test_leaves_are_found_where_nothing_is_recorded() -> None:
    model = small_model()
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), enable_amp=True, amp_config=HALF)
    x = batches(1)[0][0].requires_grad_()
    with kitsune.set_stance("force_eager"):
        model(x).square().mean().backward()
        optimizer.step()
    assert kitsune.counters()["recorded"] == 0
    assert 0 < x.grad.abs().max() < 1


def test_evaluation_stays_in_float32() -> None:
    model, seen = small_model(), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True)
    with torch.no_grad():
        model(batches(1)[0][0])
    train(model, optimizer, 1)
    assert seen == [torch.float32, torch.bfloat16]


def test_autocast_of_the_program_goes_first() -> None:
    model, seen = small_model(), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True, amp_config=HOT)
    x, y = batches(1)[0]
    with autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()), "it was scaled"
    optimizer.step()
    assert seen == [torch.bfloat16]


def test_a_failed_forward_leaves_no_autocast_behind() -> None:
    model = small_model()
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(2, 3))
    assert not torch.is_autocast_enabled("cpu")
    train(model, optimizer, 1)
    assert not model._forward_hooks and not torch.is_autocast_enabled("cpu")


def test_an_interrupted_forward_leaves_none_after_the_step() -> None:
    class Stops(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = Stops(8, 4)
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 8))
    optimizer.close()
    assert not torch.is_autocast_enabled("cpu") and not model._forward_hooks


def test_a_model_that_comes_again_gets_no_new_handle() -> None:
    """With each new one all backwards look for hooks again."""
    models = [small_model(), small_model(1)]
    optimizers = [KitsuneOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), enable_amp=True) for model in models]
    handles = []
    for k, (x, y) in enumerate(batches(6)):
        model, optimizer = models[k // 3], optimizers[k // 3]
        assert optimizer._amp is not None
        plain_step(model, optimizer, x, y)
        handles.append(RemovableHandle.next_id)
        assert not model._forward_hooks and not model._forward_hooks_always_called
    assert handles[1] == handles[2] and handles[4] == handles[5]


def test_one_optimizer_with_two_models_casts_both() -> None:
    """Each has its hook in turn."""
    first, second = small_model(), small_model(1)
    optimizer = KitsuneOptimizer(torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1), enable_amp=True)
    (x, _), *_ = batches(1)
    seen = []
    for module in (first, second):
        module[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for _ in range(3):
        for model in (first, second, first):
            out = model(x)
            assert out.dtype is torch.float32 and not model._forward_hooks
            out.sum().backward()
        optimizer.step()
    assert seen == [torch.bfloat16] * 9


@pytest.mark.parametrize("kind", [dict, tuple, list])
def test_results_in_containers_become_float32(kind: type) -> None:
    class Many(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return {"a": out, "b": out * 2, "name": "x"} if kind is dict else kind([out, out * 2, "x"])

    model = Many(8, 4)
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True)
    out = model(torch.ones(2, 8))
    assert type(out) is kind
    values = list(out.values()) if kind is dict else list(out)
    assert [v.dtype for v in values[:2]] == [torch.float32] * 2 and values[2] == "x"
    optimizer.close()


def test_what_a_model_returns_beside_its_loss_stays_as_it_is() -> None:
    class WithLoss(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = super().forward(x)
            return F.mse_loss(out, torch.zeros_like(out)), out

    model = WithLoss(8, 4)
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True)
    loss, out = model(torch.ones(2, 8))
    assert (loss.dtype, out.dtype) == (torch.float32, torch.bfloat16)
    optimizer.close()


def test_a_closure_is_evaluated_once_and_its_loss_returned() -> None:
    model, calls = small_model(), []
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), enable_amp=True, amp_config=HALF)
    other = small_model()
    plain = train(other, KitsuneOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), enable_amp=True, amp_config=HALF), 1)
    x, y = batches(1)[0]

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure).detach(), plain["loss 0"]) and len(calls) == 1
    assert torch.equal(model[0].weight, plain["0.weight"])


def test_lbfgs_has_no_step_to_skip_in_float16_and_works_in_bfloat16() -> None:
    x, y = batches(1)[0]
    for config in (HALF, AMPConfig(dtype=torch.bfloat16)):
        model = small_model()
        optimizer = KitsuneOptimizer(torch.optim.LBFGS(model.parameters()), enable_amp=True, amp_config=config)

        def closure(model=model, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if config is HALF:
            with pytest.raises(RuntimeError, match="LBFGS may evaluate its closure several times"):
                optimizer.step(closure)
        else:
            first = optimizer.step(closure).item()
            assert closure().item() < first
            optimizer.close()


def test_float16_weights_are_refused_by_shape() -> None:
    model = nn.Linear(8, 4).half()
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True, amp_config=HALF)
    with pytest.raises(ValueError, match=r"shape \[4, 8\] is float16 itself: keep the model in float32"):
        model(torch.ones(2, 8).half()).float().sum().backward()
    optimizer.close()


def test_a_step_inside_of_the_backward_is_refused() -> None:
    model = small_model()
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True, amp_config=HALF)
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(RuntimeError, match="inside of a backward whose gradients are scaled"):
        train(model, optimizer, 1)
    handle.remove()
    optimizer.close()


def test_two_optimizers_on_one_model_share_a_scale_for_each_backward() -> None:
    def run(amp: dict[str, Any]) -> list[Tensor]:
        model = small_model()
        one = KitsuneOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), **amp)
        two = KitsuneOptimizer(torch.optim.SGD([*model[2].parameters(), *model[3].parameters()], lr=0.1), **amp)
        for x, y in batches(6):
            F.cross_entropy(model(x), y).backward()
            for optimizer in (one, two):
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    for a, b in zip(run({}), run({"enable_amp": True, "amp_config": HALF}), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)  # float16's own distance; scales of 1024 would show


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # torch's word on any process-wide hook
def test_compiled_models_are_cast_though_not_recorded() -> None:
    model = small_model()
    compiled = torch.compile(model, backend="eager")
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True)
    expected = small_model()
    with autocast("cpu", dtype=torch.bfloat16):
        out = expected(batches(1)[0][0])
    torch.testing.assert_close(compiled(batches(1)[0][0]), out.float())
    optimizer.step()
    assert kitsune.counters()["recorded"] == 0


def test_autocast_and_grad_scaler_are_those_of_torch() -> None:
    assert autocast is torch.amp.autocast and GradScaler is torch.amp.GradScaler


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_double_backward_is_not_scaled() -> None:
    model = small_model()
    optimizer = KitsuneOptimizer(torch.optim.SGD(model.parameters()), enable_amp=True, amp_config=HOT)
    x = batches(1)[0][0].requires_grad_()
    model(x).square().mean().backward(create_graph=True)
    assert x.grad.requires_grad and x.grad.abs().max() < 10
    for p in (x, *model.parameters()):
        p.grad = None
    optimizer.close()


@pytest.mark.gpu
@pytest.mark.parametrize("config", [HALF, None], ids=["float16", "bfloat16"])
def test_on_cuda_the_whole_step_is_one_graph_without_a_wait(config: AMPConfig | None) -> None:
    model = small_model().cuda()
    base = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer = KitsuneOptimizer(base, enable_amp=True, amp_config=config, enable_fusion=True)
    data = [(x.cuda(), y.cuda()) for x, y in batches(40)]

    def steps(some: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in some:
            plain_step(model, optimizer, x, y)

    steps(data[:30])
    kitsune.wait_for_kernels()
    steps(data[30:36])
    before = kitsune.counters()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a prototype feature, which is on all the same
            torch.cuda.set_sync_debug_mode("error")
        steps(data[36:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = kitsune.counters()
    assert after["replayed"] - before["replayed"] == 4, after["graph_missed"]
    assert after["flushed"]["STEP"] - before["flushed"]["STEP"] == 4
