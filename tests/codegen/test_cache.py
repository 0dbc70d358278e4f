"""Sources on disk: shared, repaired, and given up on gracefully."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kitsune.codegen.cache import KernelFiles, is_intact, sealed

TEXT = "x = 1\n"


def test_a_source_is_written_once(tmp_path: Path) -> None:
    files = KernelFiles(tmp_path / "new")
    path = files.path_of("add", TEXT)
    before = path.stat().st_mtime_ns
    assert files.path_of("add", TEXT) == path and path.stat().st_mtime_ns == before
    assert path.read_text() == sealed(TEXT)


def test_flags_and_text_have_files_of_their_own(tmp_path: Path) -> None:
    files = KernelFiles(tmp_path)
    assert len({files.path_of("add", TEXT), files.path_of("add", TEXT, "flag"), files.path_of("add", "x = 2\n")}) == 3


@pytest.mark.parametrize("damage", [b"", b"x = 1\n", b"x = 2\n# sha256 00\n", b"\xff\xfe"])
def test_a_damaged_file_is_written_again(tmp_path: Path, damage: bytes) -> None:
    files = KernelFiles(tmp_path)
    path = files.path_of("add", TEXT)
    path.write_bytes(damage)
    assert not is_intact(path)
    assert is_intact(files.path_of("add", TEXT))


def test_a_directory_that_cannot_be_written_is_replaced_with_one_warning(tmp_path: Path) -> None:
    # A file where the directory would be: root may write anywhere else.
    (tmp_path / "file").write_text("")
    files = KernelFiles(tmp_path / "file" / "cache")
    with pytest.warns(RuntimeWarning, match="Name a directory that can be written") as warned:
        path = files.path_of("add", TEXT)
        assert is_intact(files.path_of("mul", TEXT))
    assert is_intact(path) and len(warned) == 1


def test_threads_and_processes_share_a_directory(tmp_path: Path) -> None:
    call = f"KernelFiles({str(tmp_path)!r}).path_of('add', {TEXT!r})"
    # Eight processes, of which all begin with the folder empty.
    program = f"""import os
from kitsune.codegen.cache import KernelFiles
children = []
for _ in range(8):
    children.append(os.fork())
    if not children[-1]:
        [{call} for _ in range(50)]
        os._exit(0)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program])
    threads = [threading.Thread(target=KernelFiles(tmp_path).path_of, args=("add", TEXT)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process.wait(timeout=60) == 0
    (path,) = tmp_path.iterdir()
    assert is_intact(path)
