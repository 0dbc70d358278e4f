"""Where the variant for aligned addresses cannot be compiled, the one for any addresses takes its place, also on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kitsune.codegen import machine_code as module
from kitsune.codegen.machine_code import Job, binary_path, compile_binary, read_binary

METADATA = SimpleNamespace(name="kernel", num_warps=4, shared=0)
PTX = ".visible .entry kernel(\n .param .u64 a,\n .param .u32 b,\n .param .u64 c\n)"


def job(path: Path, divisibility: int = 16) -> Job:
    (path / "kernel.py").write_text('SIGNATURE = {"x": "*bf16", "n": "index"}\nMULTIPLES = ()\n')
    return Job(str(path / "kernel.py"), "kernel", False, divisibility, False, 90, None)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A compiler that breaks off at aligned operands; lists what it was asked for."""
    found: list[int] = []

    def compiled(job: Job) -> Any:
        found.append(job.divisibility)
        if job.divisibility > 1:
            raise RuntimeError("PassManager::run failed")
        return SimpleNamespace(metadata=METADATA, asm={"ptx": PTX, "cubin": b"code\n\0"})

    monkeypatch.setattr(module, "machine_code", compiled)
    return found


def test_the_other_variant_is_made_and_kept_as_both(tried: list[int], tmp_path: Path) -> None:
    made = compile_binary(job(tmp_path))
    assert made.code == b"code\n\0" and tried == [16, 1]
    assert read_binary(binary_path(job(tmp_path))) == made
    assert read_binary(binary_path(job(tmp_path, divisibility=1))) is None


def test_parameters_are_those_of_the_signature_and_those_that_the_compiler_has_added(tried: list[int], tmp_path: Path) -> None:
    made = compile_binary(job(tmp_path, divisibility=1))
    assert (made.parameters, made.added, made.warps) == ("Qi", "Q", 4)


@pytest.mark.parametrize(("asm", "metadata", "match"), [
    ({"ptx": ".entry kernel(.param .u64 a)", "cubin": b""}, {}, "1 parameters in PTX and 2"),
    ({"cubin": b""}, {}, "unset TRITON_STORE_BINARY_ONLY"),
    ({"ptx": PTX, "cubin": b""}, {"global_scratch_size": 64}, "wants scratch memory"),
])  # fmt: skip
def test_what_could_not_be_started_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asm: dict[str, Any], metadata: dict[str, int], match: str
) -> None:
    kernel = SimpleNamespace(metadata=SimpleNamespace(**vars(METADATA), **metadata), asm=asm)
    monkeypatch.setattr(module, "machine_code", lambda job: kernel)
    with pytest.raises(RuntimeError, match=match):
        compile_binary(job(tmp_path))
    assert not list(tmp_path.glob("*.bin"))


def test_a_kernel_that_fails_in_both_variants_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(job: Job) -> Any:
        raise RuntimeError(f"divisibility: {job.divisibility}")

    monkeypatch.setattr(module, "machine_code", fail)
    with pytest.raises(RuntimeError, match=r"divisibility: 1$"):
        compile_binary(job(tmp_path))


def test_each_variant_has_a_file_of_its_own(tmp_path: Path) -> None:
    variants = [
        replace(job(tmp_path, n), wide=wide, target=target)
        for n in (1, 2, 4, 8, 16)
        for wide in (False, True)
        for target in (80, 90)
    ]
    assert len({binary_path(variant) for variant in variants}) == len(variants)
