"""The demo: its data and models, its arguments, and one short run from end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kitsune import __main__ as command
from kitsune.demo import cli, data
from kitsune.demo.compare import Comparison, same_bits
from kitsune.demo.report import sparkline, table
from kitsune.demo.train import FORMS, MODELS, TrainResult, train

pytest.importorskip("sklearn")
CPU = torch.device("cpu")


def small_run(model: str, form: str | None = None, seed: int = 0) -> TrainResult:
    return train(model, form, steps=3, device=CPU, seed=seed)


def difference(a: TrainResult, b: TrainResult) -> dict[str, list[str]]:
    return Comparison("lenet", "context", 3, 1, 0, a, b).differing()


def test_digits_are_the_1797_scans_enlarged_and_normalised():
    digits = data.digits()
    assert digits.images.shape == (1797, 1, 32, 32)
    assert sorted(set(digits.labels.tolist())) == list(range(10))
    assert abs(digits.images.mean().item()) < 1e-4 and abs(digits.images.std().item() - 1) < 1e-4


def test_text_targets_are_the_next_characters():
    text = data.text()
    x, y = next(text.batches(1, 5, torch.Generator().manual_seed(0)))
    assert x.shape == y.shape == (5, 64)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert len(text.codes) > 100_000 and "".join(text.alphabet[c] for c in text.codes[:3]).isprintable()


@pytest.mark.parametrize("model", MODELS)
def test_two_eager_trainings_from_one_seed_agree_and_from_two_seeds_do_not(model: str):
    one, again, other = small_run(model), small_run(model), small_run(model, seed=1)
    assert not any(difference(one, again).values())
    assert all(difference(one, other).values())


def test_the_last_bit_of_one_gradient_is_a_difference():
    one = small_run("lenet")
    name, grad = next(iter(one.grads.items()))
    bumped = grad.clone()
    bumped.view(torch.int32).view(-1)[0] += 1
    assert difference(one, dataclasses.replace(one, grads=one.grads | {name: bumped}))["gradients"] == [name]


def test_a_parameter_without_a_gradient_on_one_side_is_a_difference():
    one = small_run("lenet")
    assert difference(one, dataclasses.replace(one, grads={}))["gradients"] == list(one.grads)


def test_bits_tell_zeros_apart_and_hold_nan_equal_to_itself():
    assert same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("warmup", [0, 1])
def test_every_form_trains_as_eager_does(model: str, form: str, warmup: int):
    ours = train(model, form, steps=3, device=CPU, warmup=warmup)
    assert not any(difference(small_run(model), ours).values())
    assert ours.counters["recorded"] > 0


def test_a_run_from_end_to_end_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "demo.json"
    assert cli.main(["--model", "lenet", "--device", "cpu", "--steps", "11", "--json", str(path)]) == 0
    printed, (result,) = capsys.readouterr().out, json.loads(path.read_text())["results"]
    assert "losses: all 11 identical, bit for bit" in printed and "quartiles" in printed
    assert len(result["losses"]["kitsune"]) == 11 and result["losses"]["kitsune"] == result["losses"]["eager"]
    assert result["counters"]["recorded"] > 0 and result["explain"]["flushes"]
    assert "train.py:" in printed  # the line of the loop's own loss.item()


def test_a_difference_is_told_and_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def wrong(model: str, form: str | None, **options: object) -> TrainResult:
        result = small_run(model)
        return result if form is None else dataclasses.replace(result, losses=[*result.losses[:-1], 0.0])

    monkeypatch.setattr(cli, "train", wrong)
    assert cli.main(["--model", "lenet", "--device", "cpu", "--steps", "3"]) == 1
    assert "losses: 1 of 3 DIFFER, first step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "toaster"], "'toaster' is not a device"),
        (["--device", "meta"], "runs on cpu or cuda, not on meta"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--json", "/nowhere/at/all.json"], "there is no folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exits_with_2(argv, words, capsys: pytest.CaptureFixture[str]):
    assert command.main(["demo", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_missing_library_is_named_before_any_training(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    monkeypatch.setattr(cli, "train", None)
    data.digits.cache_clear()
    assert cli.main(["--model", "lenet"]) == 2
    assert "pip install scikit-learn" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--form", "magic"], ["--model", "bert"], ["--warmup", "2"]])
def test_arguments_are_checked(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and argv[0] in capsys.readouterr().err


def test_the_plot_is_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    one, path = small_run("lenet"), tmp_path / "curves.png"
    cli.plot([Comparison("lenet", "context", 3, 1, 0, one, one)], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_sparkline_spans_its_range_and_survives_nan():
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([1.0, float("nan"), 1.0]) == "▁?▁"


def test_a_table_aligns_rows_of_unequal_length():
    assert table([("a", "bb"), ("ccc",)]) == ["  a    bb", "  ccc"]
    assert table([]) == []
