"""What goes wrong under a plan: it is said once, in a sentence, and results are right or the error names the user's line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kitsune
from kitsune.codegen import Compiler
from kitsune.config import KitsuneWarning, config
from kitsune.planning import Planner
from tests.runtime.backends import assert_equal, backend, chain, compiled_in, know_look_up, lazily, look_up, loop
from tests.runtime.test_plan_executor import Broken
from tests.runtime.test_real_plans import Walk

EXPECTED = chain()
pytestmark = pytest.mark.usefixtures("fresh")


tried: list[Planner] = []


def no_plan(self: Planner, *args: Any) -> Any:
    tried.append(self)
    raise KeyError("no such rule")


def test_a_planner_that_raises_is_said_once_and_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "plan", no_plan)
    tried.clear()
    with backend(), config.patch(verify=False):
        with pytest.warns(KitsuneWarning, match=r"of \d+ operators could not be planned .* \(KeyError: 'no such rule'\)") as said:
            for _ in range(3):
                with lazily():
                    got = chain()
                assert torch.equal(got, EXPECTED)
        assert len(said) == len(tried) == len(kitsune.explain().mended) == 1
        assert "mended: A region of" in str(kitsune.explain())


def test_a_planner_that_raises_is_an_error_when_verifying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "plan", no_plan)
    with backend(), config.patch(verify=True), pytest.raises(KeyError, match="no such rule"), lazily():
        chain()  # nobody keeps the result, and the region is planned all the same


def test_a_kernel_that_cannot_be_compiled_is_named_once_with_its_source(tmp_path: Path, monkeypatch: Any) -> None:
    def compile_(self: Compiler, *args: Any) -> Any:
        raise NotImplementedError("out of registers")

    monkeypatch.setattr(Compiler, "compile", compile_)
    with backend(compiled_in(tmp_path)), pytest.warns(KitsuneWarning) as said:
        for _ in range(2):
            with lazily():
                got = chain()
            assert torch.equal(got, EXPECTED)
        assert_equal(loop(lazily()), loop(kitsune.disable()))
        mended = kitsune.explain().mended
    assert [str(warning.message) for warning in said] == list(mended)
    assert len(mended) == len(set(mended))
    for sentence in mended:
        assert "could not be compiled: NotImplementedError: out of registers." in sentence
        path = Path(sentence.rpartition("Its source is ")[2].removesuffix("."))
        assert path.parent == tmp_path and "import triton" in path.read_text()
        assert sentence.count(str(path)) == 1


def test_a_kernel_that_cannot_be_started_is_run_op_by_op() -> None:
    with (
        backend(Broken),
        pytest.warns(KitsuneWarning, match=r"^The kernel .* run one by one\. RuntimeError: no such instruction"),
    ):
        assert_equal(loop(lazily()), loop(kitsune.disable()))


@pytest.mark.parametrize("start", [Broken, Walk])
def test_warnings_as_errors_lose_no_results(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if start is Walk:
        monkeypatch.setattr(Planner, "plan", no_plan)
    with backend(start), config.patch(verify=False), warnings.catch_warnings():
        warnings.simplefilter("error")
        with lazily():
            got, other = chain(), chain() * 2
            with pytest.raises(KitsuneWarning):
                kitsune.flush()
        assert torch.equal(got, EXPECTED) and torch.equal(other, EXPECTED * 2)
        assert len(kitsune.explain().mended) == 1


def test_a_warning_as_an_error_does_not_hide_the_error_of_an_op() -> None:
    with backend(Broken), warnings.catch_warnings():
        warnings.simplefilter("error")
        know_look_up()
        with pytest.raises(IndexError), lazily():
            got = chain()
            kept = look_up(5)
        assert torch.equal(got, EXPECTED)
        with pytest.raises(RuntimeError, match="has no value"):
            kept.tolist()
        assert len(kitsune.explain().mended) == 1


@pytest.mark.parametrize("start", [Walk, Broken])
@pytest.mark.filterwarnings("ignore:The kernel .* cannot be used")
def test_a_late_error_names_the_line_and_spares_what_was_before(start: Callable[..., Any]) -> None:
    x = torch.ones(4, 6)
    with backend(start):
        know_look_up()
        with pytest.raises(IndexError) as caught, lazily():
            before = chain()
            part = before[1]
            product = before @ torch.ones(6, 2)
            x.mul_(3)
            failing = look_up(3)
            after = product.exp() + before.sum()
        assert kitsune.counters()["kernels"] > 0
        assert torch.equal(before, EXPECTED) and torch.equal(part, EXPECTED[1])
        assert torch.equal(product, EXPECTED @ torch.ones(6, 2)) and torch.equal(x, torch.full((4, 6), 3.0))
        for lost in (failing, after):
            with pytest.raises(RuntimeError, match="has no value") as told:
                lost.sum().item()
            assert isinstance(told.value.__cause__, IndexError)
    notes = "".join(getattr(caught.value, "__notes__", [str(caught.value)]))
    assert "while running aten.embedding.default, recorded by Kitsune at " in notes
    assert f"{Path(look_up.__code__.co_filename).name}:{look_up.__code__.co_firstlineno + 2}" in notes


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    made: list[Path] = []

    def compile_(self: Compiler, program: Any, *args: Any) -> Any:
        made.append(self.path_of(program))
        raise NotImplementedError

    monkeypatch.setattr(Compiler, "compile", compile_)
    with backend(compiled_in(tmp_path / "file" / "cache")), pytest.warns() as said, lazily():
        got = chain()
        kitsune.flush()
    assert torch.equal(got, EXPECTED) and made[0].exists()
    assert [warning.category for warning in said] == [RuntimeWarning, KitsuneWarning]


def test_a_disk_that_is_full_costs_the_kernels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kitsune.codegen.cache._ensure", full)
    with backend(compiled_in(tmp_path)), pytest.warns() as said, lazily():
        got = chain()
        kitsune.flush()
    assert torch.equal(got, EXPECTED)
    assert {warning.category for warning in said} == {RuntimeWarning, KitsuneWarning}
    assert "No space left on device" in kitsune.explain().mended[0] if kitsune.explain().mended else str(said[-1].message)
