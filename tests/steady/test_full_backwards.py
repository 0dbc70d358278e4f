"""What `explain()` says of backwards that the autograd engine runs: why, and at which line."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import kitsune
from kitsune.config import config
from kitsune.lazy import full_backwards
from kitsune.profiler import Report

STEPS = 6
Model = nn.Module


class Twice(torch.autograd.Function):
    """A function whose backward is Python."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * 2


def train(
    prepare: Callable[[Model], Any] = lambda model: None,
    before: Callable[[torch.Tensor], Any] = lambda loss: None,
    through: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    backward: Callable[[torch.Tensor, Model], Any] = lambda loss, model: loss.backward(),
) -> Report:
    kitsune.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    prepare(model)
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(16, 8)
    with config.patch(gate=False), kitsune.accelerate(device="cpu"):
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = through(model(x)).square().mean()
            before(loss)
            backward(loss, model)
            optimizer.step()
    return kitsune.explain()


def hook_of_a_node(model: Any) -> None:
    weight = model[0].weight
    node = weight.view_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: None)
    model.node = node


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "a hook of a parameter": ({"prepare": lambda model: model[0].weight.register_hook(lambda grad: None)}, full_backwards.HOOKS),
    "a hook behind a gradient": (
        {"prepare": lambda model: model[0].weight.register_post_accumulate_grad_hook(lambda p: None)},
        full_backwards.HOOKS,
    ),
    "a hook of a node": ({"prepare": hook_of_a_node}, full_backwards.HOOKS),
    "retain_graph": ({"backward": lambda loss, model: loss.backward(retain_graph=True)}, full_backwards.MORE),
    "inputs": ({"backward": lambda loss, model: loss.backward(inputs=list(model.parameters()))}, full_backwards.MORE),
    "a Python function": ({"through": Twice.apply}, full_backwards.GRAPH),
    "a look at the graph": ({"before": lambda loss: loss.grad_fn}, full_backwards.GRAPH),
}


@pytest.mark.parametrize("what", REASONS)
def test_the_reason_and_the_line_are_said(what: str) -> None:
    how, reason = REASONS[what]
    report = train(**how)
    assert kitsune.counters()["backwards_followed"] == 0
    (line,) = [line for line in report.backwards if line.why == reason]
    assert line.count >= STEPS - 1 and "test_full_backwards.py:" in line.site
    assert f"{line.count} x at {line.site}: {reason}" in str(report)


def test_a_backward_that_is_followed_is_not_named() -> None:
    report = train()
    followed = kitsune.counters()["backwards_followed"]
    assert followed == STEPS - 1 and not report.graph_asked
    # The first one.
    assert [(line.why, line.count) for line in report.backwards] == [(full_backwards.OBSERVED, STEPS - followed)]


def test_anomaly_detection_and_other_processes_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        found = {line.why for line in train().backwards}
    assert full_backwards.ANOMALY in found and kitsune.counters()["backwards_followed"] == 0
    for module in ("backward", "full_backwards"):
        monkeypatch.setattr(f"kitsune.lazy.{module}.is_distributed", lambda: True)
    assert {line.why for line in train().backwards} == {full_backwards.DISTRIBUTED}


def test_the_line_that_asks_for_a_graph_is_named() -> None:
    report = train(before=lambda loss: loss.grad_fn)
    ((line, n),) = report.graph_asked.items()
    assert n >= STEPS - 1 and "test_full_backwards.py:" in line and line != report.backwards[0].site
    assert "calls made again, since their graph was asked for" in str(report)
    assert not train().graph_asked


def test_machines_read_it_as_well() -> None:
    found = train(backward=lambda loss, model: loss.backward(retain_graph=True)).to_dict()
    assert found["backwards"][0]["why"] == full_backwards.MORE and found["graph_asked"] == {}
    kitsune.reset()
    assert not kitsune.explain().backwards and "backwards that autograd ran" not in str(kitsune.explain())


def region(past: Any = (), real: bool = False, slow: bool = False, calls: Any = ()) -> Any:
    return SimpleNamespace(past=past, real=real, slow=slow, observed_from=None, node=SimpleNamespace(calls=calls))


def test_of_what_was_not_asked_before_nothing_is_asked() -> None:
    class Silent:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("autograd refuses to tell")

    leaves: dict[int, Any] = {0: Silent()}
    for found, reason in ((region(past=None), "GRAPH"), (region(past=None, slow=True), "OBSERVED")):
        assert full_backwards.why_full(Silent(), found, True, None, leaves) == getattr(full_backwards, reason)
    assert full_backwards.why_full(Silent(), region(), False, None, leaves) == full_backwards.MORE
    assert full_backwards.why_full(Silent(), region(real=True), True, "key", leaves) == full_backwards.GRAPH


def test_what_a_backward_is_known_by_may_be_a_reason() -> None:
    lane = SimpleNamespace(hooked=lambda leaves: False)
    for key, calls, reason in ((None, (), "UNCOMPARED"), ("key", ("key",), "NOT_WHOLE"), ("key", (), "ANEW")):
        assert full_backwards.why_full(lane, region(calls=calls), True, key, {}) == getattr(full_backwards, reason)
