"""Graphs of real training steps, recorded by `python -m benchmarks.record_corpus`; `load` reads one."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from kitsune.ir import Graph
from kitsune.ir.serial import load_graph

FILES = sorted(Path(__file__).parent.glob("*.jsonl.gz"))


def name_of(path: Path) -> str:
    """The file's name without its endings."""
    return path.name.removesuffix(".jsonl.gz")


def text_of(path: Path) -> str:
    """What `dump_graph` wrote."""
    return gzip.decompress(path.read_bytes()).decode()


def load(path: Path) -> Graph:
    """The graph of a file. Skips the test, with the reason, if this version of torch lacks one of its operators."""
    try:
        return load_graph(text_of(path))
    except ValueError as lacking:
        pytest.skip(f"{path.name}: {lacking}")
