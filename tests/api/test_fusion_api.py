"""`kitsune.fusion`: the names of the documents, on the planner that regions are planned by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from kitsune import benefits
from kitsune.fusion import (
    MEASURED,
    FusedGroup,
    FusionConfig,
    FusionDetector,
    FusionEngine,
    FusionPattern,
    FusionType,
    Rules,
    benefit_key,
)
from kitsune.fusion.patterns import FAMILIES
from kitsune.named_ops import CALLS
from kitsune.planning import planner_for
from tests.plan.recorded import launched, recorded_again
from tests.runtime.backends import backend, chain, lazily

CUSTOM = FusionPattern(name="custom_activation", ops=["linear", "relu", "dropout"], fusion_type="elementwise")
ATTENTION = FusionPattern(name="fused_attention", ops=["matmul", "softmax", "matmul"], fusion_type="attention")


def ops_of(groups: list[FusedGroup]) -> list[tuple[str, ...]]:
    return [group.ops for group in groups]


def plan_of(program: Any, **config: Any) -> Any:
    return planner_for("sm_90", Rules(FusionConfig(**config))).plan(recorded_again(program))


# The four forms of the constructor, and the config's defaults.


def test_the_four_constructors() -> None:
    assert FusionEngine().config == FusionConfig() == FusionEngine(enable_fusion=True).config
    config = FusionConfig(min_fusion_benefit=1.2)
    assert FusionEngine(config=config).config is config is FusionEngine(config).config
    assert "seconds" in FusionEngine(profile=True).get_fusion_stats()


def test_defaults_are_those_of_the_documents() -> None:
    assert FusionConfig() == FusionConfig(True, True, False, 8, 1.1)


# A list of names.


def test_a_chain_of_elementwise_operators_is_one_kernel() -> None:
    engine = FusionEngine()
    assert engine.fuse(["add", "relu", "mul"]) == [FusedGroup(("add", "relu", "mul"), FusionType.ELEMENTWISE, kernel=True)]
    stats = engine.get_fusion_stats()
    assert (stats["num_fused"], stats["efficiency"], stats["kernels_before"], stats["kernels_after"]) == (1, 1.0, 3, 1)
    assert stats["measured_speedup"] == {}


def test_without_fusion_every_name_stays_alone() -> None:
    engine = FusionEngine(enable_fusion=False)
    assert ops_of(engine.fuse(["add", "relu"])) == [("add",), ("relu",)]
    assert engine.get_fusion_stats()["num_fused"] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_is_an_operator_that_can_be_recorded(name: str) -> None:
    groups = FusionEngine().fuse([name, "relu"])
    assert sorted(op for group in groups for op in group.ops) == sorted([name, "relu"])
    assert name in CALLS or hasattr(torch, name) or hasattr(F, name)


@pytest.mark.parametrize("name", ["relu", "gelu", "sigmoid", "tanh", "silu", "add", "sub", "mul", "div"])
def test_activations_and_arithmetic_fuse(name: str) -> None:
    assert len(FusionEngine().fuse([name, "exp", "neg"])) == 1


def test_the_affine_part_of_a_norm_is_elementwise() -> None:
    assert ops_of(FusionEngine().fuse(["relu", "affine"])) == [("relu", "affine")]


def test_a_kernel_has_no_more_operators_than_allowed() -> None:
    groups = FusionEngine(FusionConfig(max_fusion_size=2)).fuse(["exp", "neg", "exp", "neg"])
    assert [len(group.ops) for group in groups] == [2, 2]


def test_names_are_recorded_beside_an_open_context() -> None:
    with kitsune.accelerate(warmup=0, device="cpu"):
        x = torch.ones(3) + 1
        assert len(FusionEngine().fuse(["exp", "neg"])) == 1
        assert x.tolist() == [2.0] * 3


# A graph.


def test_a_graph_becomes_its_plan() -> None:
    graph = recorded_again(lambda: torch.relu(torch.zeros(4) + 1) * 2)
    plan = FusionEngine().fuse(graph)
    assert plan.n_launches < plan.n_unplanned and any(launch.kernels for launch in plan.launches)


# A function and a module.


def fused_elementwise(x: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return F.relu(x + bias) * scale


def test_three_kernels_of_the_documents_become_one() -> None:
    engine = FusionEngine()
    fused = engine.fuse(fused_elementwise)
    x, bias, scale = torch.randn(8, 4), torch.randn(4), torch.randn(4)
    for _ in range(3):
        assert torch.equal(fused(x, bias, scale), fused_elementwise(x, bias, scale))
    stats = engine.get_fusion_stats()
    assert (stats["num_fused"], stats["kernels_before"], stats["kernels_after"]) == (1, 3, 1)


def test_a_fused_module_shares_its_parameters_and_trains() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    fused = FusionEngine().fuse(module)
    assert isinstance(fused, nn.Sequential) and fused[0].weight is module[0].weight
    assert fused.state_dict().keys() == module.state_dict().keys()
    x = torch.randn(3, 4)
    assert torch.equal(fused(x), module(x))
    fused(x).sum().backward()
    expected = torch.autograd.grad(module(x).sum(), module[0].weight)[0]
    assert torch.equal(module[0].weight.grad, expected)


def test_with_fusion_off_a_function_is_what_it_was() -> None:
    assert FusionEngine(enable_fusion=False).fuse(fused_elementwise) is fused_elementwise


def test_the_time_of_calls_is_taken() -> None:
    engine = FusionEngine(profile=True)
    fused = engine.fuse(fused_elementwise)
    for _ in range(2):
        fused(torch.ones(2), torch.ones(2), torch.ones(2))
    stats = engine.get_fusion_stats()
    assert stats["calls"] == 2 and stats["seconds"] > 0
    assert "calls" not in FusionEngine().get_fusion_stats()


# Switches.


def test_switches_keep_families_out_of_kernels() -> None:
    x = torch.zeros(8, 8)

    def program() -> Tensor:
        return torch.exp(x + 1).neg()

    assert launched(plan_of(program)) == ["add_exp_neg"]
    plan = plan_of(program, enable_elementwise=False)
    assert not any(launch.kernels for launch in plan.launches)
    reasons = {FusionConfig(enable_elementwise=False).why_not(op) for op in plan.graph.ops}
    assert "FusionConfig(enable_elementwise=False) keeps exp out of kernels" in reasons


@pytest.mark.parametrize("switch", ["enable_reduction", "enable_elementwise"])
def test_either_switch_alone_leaves_results_right(switch: str) -> None:
    config = FusionConfig(**{switch: False})
    fused = FusionEngine(config).fuse(lambda x: torch.softmax(F.layer_norm(x, (8,)) * 2, -1))
    x = torch.randn(4, 8)
    for _ in range(3):
        assert torch.equal(fused(x), torch.softmax(F.layer_norm(x, (8,)) * 2, -1))


def test_a_registered_pattern_is_matched_whatever_the_switches_say() -> None:
    off = FusionConfig(enable_elementwise=False)
    engine, ops = FusionEngine(off), ["exp", "neg", "relu"]
    assert ops_of(engine.fuse(ops)) == [("exp",), ("neg",), ("relu",)]
    engine.register_pattern(FusionPattern("exp_neg", ["exp", "neg"], "elementwise"))
    groups = engine.fuse(ops)
    assert ops_of(groups) == [("exp", "neg"), ("relu",)]
    assert [group.pattern for group in groups] == ["exp_neg", None]


def test_the_pattern_of_the_documents_is_matched() -> None:
    engine = FusionEngine()
    engine.register_pattern(CUSTOM)
    groups = engine.fuse(["linear", "relu", "dropout"])
    assert {group.pattern for group in groups} == {"custom_activation"}


@pytest.mark.parametrize("ops", [["linear", "relu"], ["linear", "gelu"], ["matmul", "bias", "relu"]])
def test_products_with_activations_are_patterns_if_switched_on(ops: list[str]) -> None:
    assert {group.pattern for group in FusionEngine().fuse(ops)} == {None}
    (pattern,) = {group.pattern for group in FusionEngine(FusionConfig(enable_matmul=True)).fuse(ops)}
    assert pattern is not None


# Attention.


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / 8.0, dim=-1) @ v


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(self.softmax(torch.matmul(q, k.transpose(-2, -1)) * 0.125), v)


# Of torch 2.11, where a profiler says with its first trace what it does with those before.
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
@pytest.mark.parametrize("fn", [attention, Attention()], ids=["function", "module"])
def test_attention_is_one_call_of_the_library(fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FusionEngine()
    engine.register_pattern(ATTENTION)
    assert ops_of(engine.fuse(list(ATTENTION.ops))) == [("matmul", "softmax", "matmul")]
    fused = engine.fuse(fn)
    q, k, v = (torch.randn(2, 3, 5, 64, requires_grad=True) for _ in range(3))
    expected = fn(q, k, v)
    grads = torch.autograd.grad(expected.square().sum(), (q, k, v))
    with torch.profiler.profile() as profile:
        got = fused(q, k, v)
    assert any("scaled_dot_product" in event.name for event in profile.events())
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.square().sum(), (q, k, v)), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_has_its_place_among_the_names_and_counts_as_one_kernel() -> None:
    engine = FusionEngine()
    engine.register_pattern(ATTENTION)
    assert ops_of(engine.fuse(["relu", *ATTENTION.ops])) == [("relu",), ("matmul", "softmax", "matmul")]
    assert engine.get_fusion_stats()["num_fused"] == 1


def test_names_of_a_kernel_are_in_their_order() -> None:
    # A set of 7 and 8 has the 8 first.
    assert ops_of(FusionEngine().fuse(["matmul"] * 7 + ["relu", "tanh"]))[-1] == ("relu", "tanh")


def test_attention_is_a_type_and_three_operators() -> None:
    assert ATTENTION.is_attention
    assert not FusionPattern(name="alike", ops=ATTENTION.ops, fusion_type="elementwise").is_attention
    assert not FusionPattern(name="other", ops=["matmul", "softmax"], fusion_type="attention").is_attention


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, v: torch.softmax(q @ k.mT, dim=-2) @ v,
        lambda q, k, v: (w := torch.softmax(q @ k.mT, dim=-1)) @ v + w.sum(),
        lambda q, k, v: torch.softmax(q @ k.mT, dim=-1, dtype=torch.float64).float() @ v,
    ],
    ids=["another dimension", "weights are used", "another precision"],
)
def test_what_only_looks_like_attention_stays(fn: Any) -> None:
    engine = FusionEngine()
    engine.register_pattern(ATTENTION)
    q, k, v = (torch.randn(2, 5, 5) for _ in range(3))
    assert torch.equal(engine.fuse(fn)(q, k, v), fn(q, k, v))
    assert engine.get_fusion_stats()["refusals"] == []


def test_code_that_cannot_be_followed_runs_as_it_is_and_says_why() -> None:
    def branches(x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x

    engine = FusionEngine()
    engine.register_pattern(ATTENTION)
    assert torch.equal(engine.fuse(branches)(torch.ones(2)), torch.full((2,), 2.0))
    assert "no attention was looked for: TraceError" in engine.get_fusion_stats()["refusals"][0]


# The detector.


def test_the_detector_finds_patterns_in_names_the_longest_first_and_without_overlap() -> None:
    short, long = FusionPattern("short", ["exp", "neg"]), FusionPattern("long", ["exp", "neg", "relu"])
    found = FusionDetector([short, long]).detect(["exp", "neg", "relu", "exp", "neg", "exp"])
    assert [(match.pattern.name, match.numbers) for match in found] == [("long", (0, 1, 2)), ("short", (3, 4))]


def test_the_detector_follows_data_in_a_graph_and_looks_through_views() -> None:
    a, b = torch.ones(4, 4), torch.ones(4, 4)

    def program() -> tuple[Tensor, Tensor]:
        x, other = a @ b, b.exp()
        return x.t().relu(), other.neg()

    found = FusionDetector([FusionPattern("p", ["matmul", "relu"]), FusionPattern("q", ["exp", "relu"])]).detect(
        recorded_again(program)
    )
    assert [match.pattern.name for match in found] == ["p"]


# Benefit by measurement.


@pytest.fixture
def unmeasured() -> Any:
    before = dict(MEASURED)
    MEASURED.clear()
    yield
    MEASURED.clear()
    MEASURED.update(before)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("seconds", "fused"), [([1.0, 2.0], True), ([1.0, 1.05], False)], ids=["twice", "1.05 times"])
def test_a_kernel_that_gains_too_little_is_not_used(seconds: list[float], fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def clock(run: Any, device: torch.device) -> float:
        run()
        asked.append(seconds[len(asked) % 2])
        return asked[-1]

    monkeypatch.setattr(benefits.measure, "__defaults__", (clock,))
    engine = FusionEngine(FusionConfig(min_fusion_benefit=1.1))
    run = engine.fuse(chain)
    with backend():
        results = [run() for _ in range(4)]
    assert all(torch.equal(result, chain()) for result in results)
    assert len(asked) == 2, "each kernel is measured once"
    stats = engine.get_fusion_stats()
    assert stats["num_fused"] == fused
    assert list(MEASURED.values()) == [seconds[1] / seconds[0]]
    assert stats["measured_speedup"] == ({"add_mul_sub_abs": 2.0} if fused else {})


@pytest.mark.usefixtures("unmeasured")
def test_the_part_that_is_measured_does_what_the_kernel_does() -> None:
    x = torch.arange(12.0).view(3, 4)

    def program() -> Tensor:
        y = x.clone()
        y.t().add_(1)
        return (y.view(4, 3) * 2).exp()

    plan = planner_for("sm_90").plan(recorded_again(program))
    kernels = [kernel for launch in plan.launches for kernel in launch.kernels]
    for kernel in kernels:
        part = benefits.part_of(plan.graph, kernel)
        again = planner_for("sm_90").plan(part)
        assert [benefit_key(k) for launch in again.launches for k in launch.kernels] == [benefit_key(kernel)]


def test_without_a_config_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benefits.measure, "__defaults__", (lambda run, device: pytest.fail("it was measured"),))
    with backend(), lazily():
        assert torch.equal(chain(), chain())


@pytest.mark.gpu
@pytest.mark.usefixtures("unmeasured")
def test_kernels_are_measured_on_the_device_and_the_generator_stays() -> None:
    engine = FusionEngine(FusionConfig(min_fusion_benefit=1.1))
    run = engine.fuse(lambda x: (x * 2 + 1).tanh().neg())
    x = torch.randn(1 << 22, device="cuda")
    state = torch.cuda.get_rng_state()
    for _ in range(8):
        out = run(x)
        kitsune.wait_for_kernels()
    torch.testing.assert_close(out, (x * 2 + 1).tanh().neg())
    assert torch.equal(torch.cuda.get_rng_state(), state)
    (benefit,) = MEASURED.values()
    assert 1.5 < benefit < 8, benefit  # four passes over memory become one


@pytest.mark.gpu
@pytest.mark.usefixtures("unmeasured")
def test_an_impossible_benefit_leaves_everything_to_the_library() -> None:
    run = FusionEngine(FusionConfig(min_fusion_benefit=1000)).fuse(lambda x: (x * 2 + 1).tanh().neg())
    x = torch.randn(1 << 20, device="cuda")
    for _ in range(8):
        run(x)
        kitsune.wait_for_kernels()
    before = kitsune.counters()["kernels"]
    run(x)
    assert kitsune.counters()["kernels"] == before


# Bad input.


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FusionConfig(max_fusion_size=0), r"max_fusion_size=0 is not possible: .+ whole number of 1 or more"),
        (lambda: FusionConfig(enable_matmul="yes"), r"enable_matmul='yes' is not possible: enable_matmul accepts True or False"),
        (lambda: FusionConfig(min_fusion_benefit=-1), r"min_fusion_benefit=-1 is not possible: .+ number of 0 or more"),
        (lambda: FusionPattern("p", ["linear", "rellu"]), r"'p' names 'rellu', .+ Did you mean 'relu'\?"),
        (lambda: FusionPattern("p", ["relu"]), r"'p' has 1 operators: it takes two or more"),
        (lambda: FusionPattern("", ["relu", "exp"]), r"name='' is not possible"),
        (
            lambda: FusionPattern("p", ["relu", "exp"], "elementwize"),
            r"fusion_type='elementwize' .+ Did you mean 'elementwise'\?",
        ),
        (lambda: FusionEngine(config={"max": 1}), r"config=\{'max': 1\} is not possible: config accepts a kitsune.fusion.Fusion"),
        (lambda: FusionEngine(enable_fusion=3), r"enable_fusion=3 is not possible"),
        (lambda: FusionEngine().fuse(["relu", "gellu"]), r"operations names 'gellu', .+ Did you mean 'gelu'\?"),
    ],
)
def test_wrong_values_are_named_with_what_is_accepted(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FusionPattern("p", "relu"), r"'p' is a list of operator names such as \['linear', 'relu'\], not 'relu'"),
        (lambda: FusionEngine().fuse(7), r"operations is a list of operator names"),
        (lambda: FusionEngine().register_pattern("p"), r"register_pattern takes a kitsune.fusion.FusionPattern, not 'p'"),
        (lambda: FusionDetector(["p"]), r"A detector takes a kitsune.fusion.FusionPattern, not 'p'"),
    ],
)
def test_wrong_kinds_are_named_with_what_is_accepted(make: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        make()
