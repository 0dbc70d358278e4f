"""The keywords of `KitsuneOptimizer` and the fields of its configs: defaults, effects on the engine, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

import kitsune
from kitsune import KitsuneOptimizer, StreamConfig
from kitsune.amp import AMPConfig
from kitsune.engine_options import EngineOptions
from kitsune.fusion import FusionConfig, Rules
from kitsune.optimizer_options import POSITIONS, OptimizerOptions
from kitsune.session import _thread
from tests.api.training import batches, small_model, train
from tests.runtime.backends import backend


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def options_of(optimizer: KitsuneOptimizer) -> OptimizerOptions:
    return optimizer._options


def test_defaults_are_those_of_the_documents() -> None:
    found = options_of(KitsuneOptimizer(sgd(small_model())))
    assert [getattr(found, name) for name in POSITIONS] == [False, False, 4, False, None, None, None, 512 * 1024 * 1024, True]


def test_an_existing_optimizer_takes_the_options_by_position() -> None:
    amp, fusion, streams = AMPConfig(), FusionConfig(), StreamConfig(num_streams=3)
    given = (True, True, 6, True, amp, fusion, streams, 1024, False)
    found = options_of(KitsuneOptimizer(sgd(small_model()), *given))
    assert tuple(getattr(found, name) for name in POSITIONS) == given


def test_a_class_takes_its_own_arguments_beside_the_options() -> None:
    model = small_model()
    optimizer = KitsuneOptimizer(torch.optim.Adam, model.parameters(), lr=1e-3, betas=(0.5, 0.9), enable_fusion=True)
    assert isinstance(optimizer.base_optimizer, torch.optim.Adam)
    assert optimizer.base_optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert options_of(optimizer).enable_fusion


def test_no_option_has_the_name_of_an_optimizers_argument() -> None:
    theirs = {n for kind in vars(torch.optim).values() if isinstance(kind, type) for n in inspect.signature(kind).parameters}
    assert theirs.isdisjoint(POSITIONS)


def test_options_become_what_the_engine_is_asked_for() -> None:
    config = FusionConfig(max_fusion_size=3)
    found = OptimizerOptions(
        enable_fusion=True, fusion_config=config, num_streams=6, memory_pool_size="2GB", capture_graph=False
    ).engine()
    assert found == EngineOptions(fuse=True, graphs=False, pool_bytes=2 * 2**30, rules=Rules(config), n_streams=6)


def test_stream_config_wins_over_num_streams() -> None:
    optimizer = KitsuneOptimizer(sgd(small_model()), num_streams=6, stream_config=StreamConfig(num_streams=2))
    assert optimizer.scheduler.num_streams == 2
    assert KitsuneOptimizer(sgd(small_model()), num_streams=6).scheduler.num_streams == 6


# The engine does what it is asked for: plans run on a CPU by a backend of the tests.


def runners() -> list[Any]:
    return [pipeline.runner for pipeline in _thread.pipelines.values()]


@pytest.mark.parametrize("fuse", [False, True])
def test_nothing_fuses_without_enable_fusion(fuse: bool) -> None:
    with backend():
        model = small_model()
        train(model, KitsuneOptimizer(sgd(model), enable_fusion=fuse, device="cpu"), 6)
        assert (kitsune.counters()["kernels"] > 0) is fuse


@pytest.mark.parametrize("size", [2, 5])
def test_a_fusion_config_bounds_the_kernels(size: int) -> None:
    with backend():
        model = small_model()
        config = FusionConfig(max_fusion_size=size, min_fusion_benefit=0)
        base = torch.optim.AdamW(model.parameters(), foreach=True)
        train(model, KitsuneOptimizer(base, enable_fusion=True, fusion_config=config, device="cpu"), 6)
        kernels = [
            k for r in runners() for one in r.ready.values() if one.plan for n in one.plan.plan.launches for k in n.kernels
        ]
        assert max(len(kernel.steps) for kernel in kernels) == size


def test_the_last_plan_is_within_the_config() -> None:
    model = small_model()
    config = FusionConfig(max_fusion_size=3)
    base = torch.optim.AdamW(model.parameters(), foreach=True)
    train(model, KitsuneOptimizer(base, enable_fusion=True, fusion_config=config, device="cpu"), 6)
    plan = kitsune.last_plan()
    assert plan is not None and max(len(k.steps) for launch in plan.launches for k in launch.kernels) == 3


def test_the_pool_is_as_large_as_asked_for() -> None:
    with backend():
        model = small_model()
        train(model, KitsuneOptimizer(sgd(model), enable_fusion=True, memory_pool_size=4096, device="cpu"), 6)
        assert [runner.pool.budget for runner in runners()] == [4096]
        assert all(runner.pool.statistics.held_bytes <= 4096 for runner in runners())


@pytest.mark.parametrize("capture", [False, True])
def test_graphs_are_captured_only_if_asked_for(capture: bool) -> None:
    assert OptimizerOptions(capture_graph=capture).engine().captures is capture
    with kitsune.config.patch(graphs=False):
        assert not OptimizerOptions(capture_graph=capture).engine().captures


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [False, True])
def test_graphs_on_cuda(capture: bool) -> None:
    model = small_model().cuda()
    optimizer = KitsuneOptimizer(sgd(model), capture_graph=capture)
    for x, y in batches(12):
        torch.nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (kitsune.counters()["replayed"] > 0) is capture


def test_kill_switches_stay_switches() -> None:
    with kitsune.config.patch(fuse=False):
        assert not OptimizerOptions(enable_fusion=True).engine().fuses
    assert not OptimizerOptions(enable_fusion=False).engine().fuses


def test_options_do_not_change_what_a_context_by_hand_does() -> None:
    model = small_model()
    optimizer = KitsuneOptimizer(sgd(model), num_streams=2)
    with kitsune.accelerate(device="cpu"):
        train(model, optimizer, 2)
        assert len(list(_thread.depth)) == 1
    assert kitsune.counters()["recorded"] + kitsune.counters()["observed"] > 0


# The configs.


def test_fields_and_defaults_of_the_configs() -> None:
    assert AMPConfig() == AMPConfig(torch.float16, True, 2000, 0.5, 2.0, 65536.0)
    assert FusionConfig() == FusionConfig(True, True, False, 8, 1.1)
    assert StreamConfig() == StreamConfig(4, [], [], [])
    for config in (AMPConfig, FusionConfig, StreamConfig):
        assert dataclasses.is_dataclass(config)


def test_stream_roles_may_share_only_with_priority_and_are_said_to_be_unused() -> None:
    config = StreamConfig(num_streams=4, priority_streams=[0], compute_streams=[0, 1], memory_streams=(2, 3))
    assert config.memory_streams == [2, 3]
    model = small_model()
    train(model, KitsuneOptimizer(sgd(model), stream_config=config), 1)
    assert "note: the roles in StreamConfig(num_streams=4" in str(kitsune.explain())


REFUSED = {
    "num_streams=0": ({"num_streams": 0}, r"num_streams=0 is not possible: num_streams accepts a whole number from 1 to 32\."),
    "num_streams=33": ({"num_streams": 33}, r"from 1 to 32\."),
    "num_streams='4'": ({"num_streams": "4"}, r"num_streams='4' is not possible"),
    "a pool of 2GX": ({"memory_pool_size": "2GX"}, r"memory_pool_size='2GX' .+ a number of bytes, or a text such as '512MB'"),
    "no pool": ({"memory_pool_size": None}, r"memory_pool_size=None is not possible"),
    "a negative pool": ({"memory_pool_size": -1}, r"memory_pool_size=-1 is not possible"),
    "enable_amp=2": ({"enable_amp": 2}, r"enable_amp=2 is not possible: enable_amp accepts True or False"),
    "profile='p'": ({"profile": "p"}, r"profile='p' is not possible"),
    "capture_graph=None": ({"capture_graph": None}, r"capture_graph=None is not possible"),
    "a dict for a config": ({"amp_config": {"dtype": 1}}, r"amp_config=.+ accepts a AMPConfig\(dtype=\.\.\., enabled=\.\.\."),
    "another config": ({"fusion_config": AMPConfig()}, r"fusion_config=AMPConfig.+ accepts a FusionConfig\(enable_elementwise"),
    "a number for streams": ({"stream_config": 4}, r"stream_config=4 is not possible: stream_config accepts a StreamConfig\("),
    "warmup=-1": ({"warmup": -1}, r"warmup=-1 is not possible"),
}


@pytest.mark.parametrize("given", REFUSED)
def test_wrong_values_are_named_with_what_is_accepted(given: str) -> None:
    keywords, said = REFUSED[given]
    with pytest.raises(ValueError, match=said):
        KitsuneOptimizer(sgd(small_model()), **keywords)


CONFIGS = [
    (lambda: AMPConfig(dtype=torch.float32), r"dtype=torch\.float32 is not possible: dtype accepts torch\.float16 or torch\.bf"),
    (lambda: AMPConfig(dtype="float16"), r"dtype='float16' is not possible"),
    (lambda: AMPConfig(growth_interval=0), r"growth_interval=0 is not possible: .+ whole number of 1 or more"),
    (lambda: AMPConfig(backoff_factor=1.0), r"backoff_factor=1\.0 is not possible: .+ number above 0 and below 1"),
    (lambda: AMPConfig(growth_factor=1), r"growth_factor=1 is not possible: .+ number above 1"),
    (lambda: AMPConfig(init_scale=float("inf")), r"init_scale=inf is not possible"),
    (lambda: StreamConfig(num_streams=2, priority_streams=[2]), r"priority_streams=\[2\] .+ num_streams=2 are 0 to 1\."),
    (lambda: StreamConfig(compute_streams=[-1]), r"compute_streams=\[-1\] is not possible"),
    (lambda: StreamConfig(memory_streams="01"), r"memory_streams='01' is not possible"),
    (lambda: StreamConfig(compute_streams=[0, 1], memory_streams=[1]), r"share \[1\]: a stream has one of the two roles"),
    (lambda: StreamConfig(16, compute_streams=[8, 1], memory_streams=[1, 8]), r"share \[1, 8\]: a stream has one of"),
    (lambda: StreamConfig(priority_streams=[1, 1]), r"priority_streams=\[1, 1\] names a stream twice"),
]


@pytest.mark.parametrize(("make", "said"), CONFIGS)
def test_wrong_fields_are_named_with_what_is_accepted(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_unknown_keywords_are_named_with_the_nearest() -> None:
    model = small_model()
    with pytest.raises(TypeError, match=r"unexpected: 'enable_ampp'\. Did you mean 'enable_amp'\?"):
        KitsuneOptimizer(sgd(model), enable_ampp=True)
    with pytest.raises(TypeError, match=r"SGD cannot be made .+ 'num_stream'\. Did you mean 'num_streams'\?"):
        KitsuneOptimizer(torch.optim.SGD, model.parameters(), num_stream=4)
    with pytest.raises(TypeError, match=r"Adam cannot be made with these arguments: .+ 'params'"):
        KitsuneOptimizer(torch.optim.Adam, lr=0.1)
    with pytest.raises(TypeError, match=r"each once; unexpected: a positional bool object, 'enable_amp'"):
        KitsuneOptimizer(sgd(model), True, enable_amp=True)


def test_an_optimizers_own_refusals_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate"):
        KitsuneOptimizer(torch.optim.SGD, small_model().parameters(), lr=-1.0)
