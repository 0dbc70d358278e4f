"""`print_summary`, `save_profile`, `profiler` and `scheduler`: what was measured, and n/a for what was not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune import KitsuneOptimizer, StreamConfig
from kitsune.amp import AMPConfig
from kitsune.dataflow import DataflowScheduler
from kitsune.profiler import Tally, speed
from kitsune.profiler.meter import StepMeter
from tests.api.training import batches, plain_step, small_model, train
from tests.plan.recorded import recorded_again
from tests.runtime.backends import backend


def optimizer_of(model: Any, **options: Any) -> KitsuneOptimizer:
    return KitsuneOptimizer(torch.optim.AdamW(model.parameters(), foreach=True), device="cpu", **options)


def rows(text: str) -> dict[str, str]:
    found = (re.fullmatch(r"  (\S.*?)  +(.+)", line) for line in text.splitlines())
    return {match[1]: match[2] for match in found if match}


def test_without_profile_there_is_no_profiler_and_nothing_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    optimizer = optimizer_of(model)
    train(model, optimizer, 3)
    assert optimizer.profiler is None
    assert optimizer.print_summary() is None
    shown = rows(capsys.readouterr().out)
    assert shown["steps"] == "3"
    for measured in ("step time", "speedup", "samples per second", "peak allocated", "stream efficiency", "gradient scale"):
        assert shown[measured] == "n/a", measured


def test_a_new_optimizer_has_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer_of(small_model(), profile=True).print_summary()
    shown = rows(capsys.readouterr().out)
    assert shown["steps"] == "0" and shown["step time"] == shown["fused kernels in a run"] == "n/a"


def test_every_step_is_timed_and_has_a_kind() -> None:
    model = small_model()
    # Of one observed step, the first, nobody knows when it began.
    with kitsune.config.patch(warmup=2):
        optimizer = optimizer_of(model, profile=True)
        train(model, optimizer, 8)
    metrics = optimizer.profiler.get_metrics()
    assert metrics["steps"] == 8
    assert metrics["timing"]["step"]["n"] == 7, "the first step has no beginning"
    assert metrics["timing"]["step_observed"]["n"] + metrics["timing"]["step_recorded"]["n"] == 7
    assert 0 < metrics["timing"]["step"]["min"] <= metrics["timing"]["step"]["median"] <= metrics["timing"]["step"]["max"]
    assert metrics["speed"]["baseline"] == "observed" and metrics["speed"]["kind"] == "recorded"
    assert metrics["speed"]["speedup"] == metrics["speed"]["baseline_ms"] / metrics["speed"]["step_ms"]
    assert metrics["throughput"]["iterations_per_sec"] == pytest.approx(1e3 / metrics["speed"]["step_ms"])


def test_samples_are_those_that_the_model_was_given_in_all_forwards_of_a_step() -> None:
    model = small_model()
    optimizer = optimizer_of(model, profile=True)
    for _ in range(3):
        for x, y in batches(2, size=6):
            torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.profiler.samples_per_step() == 12


def test_steps_left_to_eager_are_the_baseline() -> None:
    model = small_model()
    optimizer = optimizer_of(model, profile=True)
    train(model, optimizer, 4)
    with kitsune.set_stance("force_eager"):
        train(model, optimizer, 4)
    train(model, optimizer, 4)
    assert optimizer.profiler.get_metrics()["speed"]["baseline"] == "eager"


def test_speed_is_by_medians_and_none_where_one_side_is_missing() -> None:
    both = speed({"observed": [4.0, 4.0, 40.0], "recorded": [3.0], "replayed": [1.0, 2.0, 9.0]})
    assert (both["kind"], both["step_ms"], both["baseline_ms"], both["speedup"]) == ("replayed", 2000.0, 4000.0, 2.0)
    assert speed({"eager": [1.0], "observed": [2.0], "recorded": [1.0]})["baseline"] == "eager"
    assert speed({"recorded": [1.0]})["speedup"] is None
    left = speed({"eager": [1.0], "recorded": [2.0]}, left_to_eager=True)
    assert (left["kind"], left["step_ms"], left["speedup"]) == ("eager", 1000.0, None)
    assert speed({"observed": [1.0]})["speedup"] is None
    assert speed({})["step_ms"] is None


def test_the_meter_tells_kinds_by_what_was_counted() -> None:
    tally = Tally()
    meter = StepMeter(tally, torch.device("cpu"))
    meter.step_ended()
    for count in ("observed", "recorded", "n_replayed", None):
        if count is not None:
            setattr(tally, count, getattr(tally, count) + 5)
        meter.step_ended()
    assert list(meter.seconds()) == ["observed", "recorded", "replayed", "eager"]


def test_plans_that_ran_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with backend():
        model = small_model()
        optimizer = optimizer_of(model, enable_fusion=True)
        train(model, optimizer, 8)
        optimizer.print_summary()
        shown = rows(capsys.readouterr().out)
        assert float(shown["fused kernels in a run"]) > 0 and 0 < float(shown["fusion efficiency"].rstrip("%")) <= 100
        assert shown["streams allowed"] == "4" and int(shown["streams used"]) <= 4
        assert shown["pool hits"].endswith("%") and shown["less to move in a run"].endswith("MiB")


def test_the_scale_and_the_skipped_steps_are_read_from_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    config = AMPConfig(init_scale=2.0**24, growth_interval=100)
    optimizer = optimizer_of(model, enable_amp=True, amp_config=config)
    train(model, optimizer, 12)
    optimizer.print_summary()
    shown = rows(capsys.readouterr().out)
    skipped = int(shown["steps skipped after an overflow"])
    assert shown["precision"] == "float16" and skipped > 4
    assert float(shown["gradient scale"]) == 2.0 ** (24 - skipped)


def test_a_profile_is_json_with_the_sections_of_the_documents(tmp_path: Path) -> None:
    model = small_model()
    optimizer = optimizer_of(model, profile=True)
    train(model, optimizer, 6)
    target = tmp_path / "profile.json"
    assert optimizer.save_profile(filepath=str(target)) is None
    found = json.loads(target.read_text())
    assert {"timing", "memory", "throughput", "streams", "fusion", "amp", "graph"} <= found.keys()
    assert {"mean", "std", "min", "max"} <= found["timing"]["step"].keys()
    assert found["memory"]["peak_allocated"] is None, "there is no such figure on a CPU"
    assert found["throughput"].keys() == {"iterations_per_sec", "samples_per_sec"}


def test_the_default_path_is_profile_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    optimizer_of(small_model()).save_profile()
    assert json.loads((tmp_path / "profile.json").read_text())["steps"] == 0


def test_a_path_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    optimizer = optimizer_of(small_model())
    missing = tmp_path / "no folder" / "p.json"
    with pytest.raises(FileNotFoundError, match=r"No such file.+give save_profile\(\) a file in a folder") as told:
        optimizer.save_profile(str(missing))
    assert str(missing) in str(told.value)
    with pytest.raises(IsADirectoryError, match="give save_profile"):
        optimizer.save_profile(tmp_path)
    for wrong in (3, ""):
        with pytest.raises(TypeError, match=r"filepath=.+ takes the path of a file, such as 'profile.json'"):
            optimizer.save_profile(wrong)


def test_runs_of_regions_are_spans_of_torchs_profiler() -> None:
    model = small_model()
    optimizer = optimizer_of(model)
    train(model, optimizer, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        train(model, optimizer, 2, first=4)
    spans = [event.name for event in profile.events() if event.name.startswith("kitsune::run[")]
    assert len(spans) >= 2 and all(name.endswith(" operators]") for name in spans)


def test_a_profiler_outlives_no_optimizer() -> None:
    optimizer = optimizer_of(small_model(), profile=True)
    profiler = optimizer.profiler
    del optimizer
    with pytest.raises(RuntimeError, match="keep it until its metrics are read"):
        profiler.get_metrics()


def test_the_scheduler_plans_within_its_streams() -> None:
    scheduler = optimizer_of(small_model(), stream_config=StreamConfig(num_streams=1)).scheduler
    assert (scheduler.num_streams, scheduler.streams_used) == (1, None)
    x = torch.ones(64, 64)
    graph = recorded_again(lambda: (x @ x, x.t() @ x, (x + 1).exp()))
    assert {launch.stream for launch in scheduler.schedule(graph).launches} == {0}
    assert DataflowScheduler(num_streams=6).num_streams == 6
    with pytest.raises(TypeError, match=r"schedule\(\) takes a kitsune.ir.Graph"):
        scheduler.schedule([1])


def test_plain_steps_cost_nothing_of_the_profiler() -> None:
    model = small_model()
    optimizer = optimizer_of(model)
    assert optimizer._binding.batch is None
    plain_step(model, optimizer, *batches(1)[0])


@pytest.mark.gpu
def test_on_cuda_times_are_the_devices_and_memory_is_known() -> None:
    model = small_model().cuda()
    optimizer = KitsuneOptimizer(torch.optim.AdamW(model.parameters(), fused=True), enable_fusion=True, profile=True)
    for x, y in batches(40):
        torch.nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
        optimizer.step()
        optimizer.zero_grad()
    kitsune.wait_for_kernels()
    metrics = optimizer.profiler.get_metrics()
    assert metrics["timing"]["step"]["n"] == 39 and metrics["timing"]["step"]["min"] > 0
    assert metrics["speed"]["kind"] == "replayed"
    assert metrics["memory"]["peak_allocated"] > 0 and metrics["graph"]["replayed"] > 0
