"""Real data that needs no download: scans of handwritten digits, and the English text of Python's own help."""

from __future__ import annotations

import functools
import importlib
import string
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kitsune.demo.errors import DemoError


@dataclass(frozen=True)
class Digits:
    """1,797 scans from scikit-learn, 8x8, enlarged to the 32x32 that LeNet expects."""

    images: Tensor  # float32[n, 1, 32, 32], mean 0, deviation 1
    labels: Tensor  # int64[n]

    def batches(self, steps: int, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            chosen = torch.randint(len(self.labels), (size,), generator=generator)
            yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Text:
    """Characters as numbers; a batch is a set of windows, the target is the window moved by one."""

    codes: Tensor  # int64[n]
    alphabet: str
    context: int = 64

    def batches(self, steps: int, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            starts = torch.randint(len(self.codes) - self.context - 1, (size,), generator=generator)
            windows = self.codes[starts[:, None] + torch.arange(self.context + 1)]
            yield windows[:, :-1], windows[:, 1:]


@functools.cache
def digits() -> Digits:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise DemoError(
            "the LeNet demo needs scikit-learn for its digits: pip install scikit-learn (or choose --model gpt)"
        ) from None
    loaded = datasets.load_digits()
    images = torch.as_tensor(loaded.images, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=(32, 32), mode="bilinear")
    return Digits((images - images.mean()) / images.std(), torch.as_tensor(loaded.target, dtype=torch.int64))


@functools.cache
def text() -> Text:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DemoError("this Python comes without pydoc_data, the text that the GPT demo reads (choose --model lenet)") from None
    printable = frozenset(string.printable)
    characters = [c for topic in sorted(topics) for c in topics[topic] if c in printable]
    alphabet = "".join(sorted(set(characters)))
    number = {c: i for i, c in enumerate(alphabet)}
    return Text(torch.tensor([number[c] for c in characters]), alphabet)
