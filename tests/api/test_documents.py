"""The code of the documents, block by block, as it is printed there.

Two of their loops call `backward()` on what `model(data)` returns, which needs a model that returns a scalar; they get one.
"""

from __future__ import annotations

import contextlib
import io
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kitsune
from tests.plan.recorded import recorded_again

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class ReturnsALoss(nn.Module):
    """A model whose output is a scalar."""

    def __init__(self, n_in: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_in, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def run(block: str, **names: Any) -> dict[str, Any]:
    """Execute a block; returns its names."""
    exec(compile(textwrap.dedent(block), "<document>", "exec"), names)
    return names


def batches(n: int, width: int = 8, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, width, device=device), torch.randint(0, 4, (4,), device=device)) for _ in range(n)]


BASIC = """
    import torch
    from kitsune import KitsuneOptimizer

    base_optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    optimizer = KitsuneOptimizer(
        base_optimizer,
        enable_amp=True,
        enable_fusion=True,
        num_streams=4
    )

    for data, target in train_loader:
        output = model(data)
        loss = criterion(output, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
"""

ADVANCED = """
    from kitsune import KitsuneOptimizer
    from kitsune.amp import AMPConfig
    from kitsune.fusion import FusionConfig

    amp_config = AMPConfig(
        dtype=torch.float16,
        growth_interval=2000,
        backoff_factor=0.5
    )

    fusion_config = FusionConfig(
        enable_elementwise=True,
        enable_reduction=True,
        max_fusion_size=8
    )

    optimizer = KitsuneOptimizer(
        base_optimizer,
        enable_amp=True,
        amp_config=amp_config,
        enable_fusion=True,
        fusion_config=fusion_config,
        num_streams=6,
        profile=True
    )
"""


@pytest.mark.parametrize("device", DEVICES)
def test_optimizer_basic_usage_and_advanced_configuration(device: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    criterion, loader = nn.CrossEntropyLoss(), batches(6, device=device)
    before = criterion(model(loader[0][0]), loader[0][1]).item()
    names = run(BASIC, model=model, criterion=criterion, train_loader=loader * 5)
    assert criterion(model(loader[0][0]), loader[0][1]).item() < before
    assert kitsune.counters()["recorded"] > 0
    names = run(ADVANCED, torch=torch, base_optimizer=names["base_optimizer"])
    assert names["optimizer"].scheduler.num_streams == 6
    names = run(METHODS, optimizer=names["optimizer"], path=str(tmp_path / "profile.json"))
    assert names["learning_rate"] == 1e-3 and names["num_streams"] == 6 and names["metrics"]["steps"] == 1
    assert json.loads((tmp_path / "profile.json").read_text())["steps"] == 1


METHODS = """
    assert optimizer.step() is None
    assert optimizer.zero_grad(set_to_none=True) is None
    state = optimizer.state_dict()
    state_dict = state
    assert optimizer.load_state_dict(state_dict) is None
    assert optimizer.print_summary() is None
    assert optimizer.save_profile(filepath=path) is None
    base_opt = optimizer.base_optimizer
    learning_rate = base_opt.param_groups[0]['lr']
    if optimizer.profiler:
        metrics = optimizer.profiler.get_metrics()
    scheduler = optimizer.scheduler
    num_streams = scheduler.num_streams
"""


QUICK_START = """
    import torch
    import torch.nn as nn
    from kitsune import KitsuneOptimizer

    model = nn.Sequential(
        nn.Linear(1024, 512),
        nn.ReLU(),
        nn.Linear(512, 10)
    ).to(device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    kitsune_optimizer = KitsuneOptimizer(
        optimizer,
        enable_amp=True,
        enable_fusion=True,
        num_streams=4
    )

    for data, target in dataloader:
        data, target = data.to(device), target.to(device)

        loss = criterion(model(data), target)
        loss.backward()
        kitsune_optimizer.step()
        kitsune_optimizer.zero_grad()
"""


@pytest.mark.parametrize("device", DEVICES)
def test_quick_start_of_the_overview(device: str) -> None:
    # The document has no criterion, and a model with ten outputs, which plain PyTorch refuses too.
    with pytest.raises(RuntimeError, match="scalar outputs"):
        nn.Linear(4, 10)(torch.ones(2, 4)).backward()
    names = run(QUICK_START, device=device, dataloader=batches(6, 1024), criterion=nn.CrossEntropyLoss())
    assert names["kitsune_optimizer"].state_dict()["kitsune"]["steps"] == 6


READ_ME = """
    import torch
    import kitsune

    model = YourModel().to(device)

    optimizer = kitsune.KitsuneOptimizer(
        torch.optim.Adam,
        model.parameters(),
        lr=1e-3
    )

    for batch in dataloader:
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
"""


@pytest.mark.parametrize("device", DEVICES)
def test_quick_start_of_the_readme(device: str) -> None:
    loader = [x for x, _ in batches(6, device=device)]
    names = run(READ_ME, YourModel=ReturnsALoss, device=device, dataloader=loader)
    assert float(names["loss"].detach()) >= 0 and names["optimizer"].state_dict()["kitsune"]["steps"] == 6


BENCHMARK = """
    from tests.benchmarks import run_baseline_benchmark, BenchmarkConfig
    from tests.benchmarks.models import create_mlp

    model = create_mlp()
    config = BenchmarkConfig(batch_size=64, num_iterations=100, warmup_iterations=1)
    result = run_baseline_benchmark(model, config)
    print(result.summary())
"""


@pytest.mark.filterwarnings("ignore:there is no CUDA device:UserWarning")
def test_running_benchmarks() -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run(BENCHMARK)
    assert "batch 64, 100 iterations" in said.getvalue()


FUSION = """
    from kitsune.fusion import FusionEngine

    engine = FusionEngine(enable_fusion=True)

    fused_ops = engine.fuse(operations)
"""

PATTERNS = """
    from kitsune.fusion import FusionPattern, FusionEngine

    pattern = FusionPattern(
        name='custom_activation',
        ops=['linear', 'relu', 'dropout'],
        fusion_type='elementwise'
    )

    engine = FusionEngine()
    engine.register_pattern(pattern)

    attention_pattern = FusionPattern(
        name='fused_attention',
        ops=['matmul', 'softmax', 'matmul'],
        fusion_type='attention'
    )
"""

CONFIGURATION = """
    from kitsune.fusion import FusionConfig, FusionEngine

    config = FusionConfig(
        enable_elementwise=True,
        enable_reduction=True,
        enable_matmul=False,
        max_fusion_size=8,
        min_fusion_benefit=1.2
    )

    engine = FusionEngine(config=config)
"""

STATISTICS = """
    from kitsune.fusion import FusionEngine

    engine = FusionEngine(profile=True)
    run_operations(engine)

    stats = engine.get_fusion_stats()
    print(f"Fused kernels: {stats['num_fused']}")
    print(f"Fusion efficiency: {stats['efficiency']:.2%}")
"""


def example(x: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    x = x + bias
    x = F.relu(x)
    x = x * scale
    return x


def test_basic_fusion_of_names_a_function_and_a_graph() -> None:
    assert len(run(FUSION, operations=["add", "relu", "mul"])["fused_ops"]) == 1
    x = torch.randn(4, 4)
    fused = run(FUSION, operations=example)["fused_ops"]
    assert torch.equal(fused(x, x, x), example(x, x, x))
    plan = run(FUSION, operations=recorded_again(lambda: example(x, x, x)))["fused_ops"]
    assert plan.n_launches == 1


def test_custom_patterns_and_configuration() -> None:
    names = run(PATTERNS)
    assert names["pattern"].fusion_type == "elementwise" and names["attention_pattern"].is_attention
    assert {group.pattern for group in names["engine"].fuse(["linear", "relu", "dropout"])} == {"custom_activation"}
    assert run(CONFIGURATION)["engine"].config.min_fusion_benefit == 1.2


def test_fusion_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    def run_operations(engine: Any) -> None:
        x = torch.randn(4, 4)
        fused = engine.fuse(example)
        for _ in range(3):
            fused(x, x, x)

    run(STATISTICS, run_operations=run_operations)
    assert capsys.readouterr().out == "Fused kernels: 1\nFusion efficiency: 100.00%\n"
