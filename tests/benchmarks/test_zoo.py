"""`bench_zoo`: a row for each model, with what became of Kitsune's steps; what is not installed or unknown is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_zoo
from benchmarks.zoo import ZOO, Made, batches
from benchmarks.zoo_models import Recommender, UNet, WordModel


def small(device: torch.device) -> Made:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    return model, batches(lambda: (torch.randn(4, 8, device=device),)), lambda model, x: model(x).float().square().mean()


def not_installed(device: torch.device) -> Made:
    raise ModuleNotFoundError("No module named 'timm'")


def failing(device: torch.device) -> Made:
    raise ValueError("no such size")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_zoo, "ZOO", {"small": small, "absent": not_installed, "failing": failing})
    monkeypatch.setattr(bench_zoo, "FIRST", 4)
    monkeypatch.setattr(bench_zoo, "SETTLED", 4)
    monkeypatch.setattr(bench_zoo, "BLOCK_MS", 1.0)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["bench_zoo", "--device", "cpu", "--rounds", "2", *arguments])
    bench_zoo.main()


def test_each_model_has_a_row(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    run(monkeypatch, "--models", "absent,failing,small", "--json", str(tmp_path / "zoo.json"))
    (row,) = json.loads((tmp_path / "zoo.json").read_text())["rows"]
    assert row["model"] == "small" and row["eager_ms"] > 0 and row["kitsune_ms"] > 0
    assert row["kitsune_of_eager"] == pytest.approx(row["kitsune_ms"] / row["eager_ms"], rel=0.05, abs=0.01)
    said = capsys.readouterr().out
    assert "absent" in said and "left out: No module named 'timm'" in said and "ValueError: no such size" in said


def test_unknown_names_are_refused(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for arguments, words in ((["--models", "smal"], "smal: models are small"), (["--columns", "kitsune"], "has to be one")):
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "given", "shape"),
    [
        (WordModel, lambda: (torch.randint(WordModel.WORDS, (2, 5)),), (2, 5, WordModel.WORDS)),
        (lambda: UNet(8), lambda: (torch.randn(2, 3, 16, 16), torch.rand(2)), (2, 3, 16, 16)),
        (Recommender, lambda: (torch.randn(3, Recommender.NUMBERS), torch.randint(9, (3, Recommender.TABLES))), (3,)),
    ],
    ids=["words", "images", "clicks"],
)
def test_models_of_the_zoo_can_be_trained(model: Any, given: Any, shape: tuple[int, ...]) -> None:
    made = model()
    out: Tensor = made(*given())
    assert out.shape == shape
    out.sum().backward()
    assert all(p.grad is not None for p in made.parameters()) and len(ZOO) > 15
