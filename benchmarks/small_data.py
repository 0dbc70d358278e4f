"""Real data for the small models, which needs no download: what scikit-learn and Python itself are installed with.

Images are scikit-learn's 1,797 scanned digits, text is that of Python's own help (`pydoc_data.topics`, 79 topics), and who
would like what is which words each of its topics uses. A tenth of each is held out.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from kitsune.demo.data import Text, digits, text

Batch = tuple[Tensor, ...]
# Makes a batch of a size; held out or not.
Source = Callable[[int, bool, torch.Generator], Batch]
HELD_OUT = 0.1
# A word that only one topic uses says nothing of another.
SELDOM = 3
N_ENDINGS = 256


def _positions(n: int, size: int, held_out: bool, generator: torch.Generator) -> Tensor:
    cut = int(n * (1 - HELD_OUT))
    low, high = (cut, n) if held_out else (0, cut)
    return torch.randint(low, high, (size,), generator=generator)


def images(size: int, held_out: bool, generator: torch.Generator) -> Batch:
    """Digits of 32x32 and what they show."""
    found = digits()
    chosen = _positions(len(found.labels), size, held_out, generator)
    return found.images[chosen], found.labels[chosen]


def noisy_images(size: int, held_out: bool, generator: torch.Generator) -> Batch:
    """Digits behind noise, and without."""
    clean, _ = images(size, held_out, generator)
    return clean + 0.5 * torch.randn(clean.shape, generator=generator), clean


def characters(size: int, held_out: bool, generator: torch.Generator) -> Batch:
    """Windows of text, and the same moved by one."""
    found = text()
    cut = int(len(found.codes) * (1 - HELD_OUT))
    part = Text(found.codes[cut:] if held_out else found.codes[:cut], found.alphabet, found.context)
    return next(part.batches(1, size, generator))


def n_characters() -> int:
    """Characters in the alphabet of the text."""
    return len(text().alphabet)


@functools.cache
def _uses() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(topic, word) of each pair that occurs, in an order of no meaning; and of each word its ending and its numbers."""
    from pydoc_data.topics import topics

    words = {name: Counter(re.findall(r"[a-z_]{3,}", topics[name].lower())) for name in sorted(topics)}
    counts = sum(words.values(), Counter())
    known = {word: i for i, word in enumerate(sorted(w for w, n in counts.items() if n >= SELDOM))}
    pairs = torch.tensor([(i, known[w]) for i, name in enumerate(words) for w in sorted(words[name]) if w in known])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    endings = torch.tensor([sum(b * 31**i for i, b in enumerate(w[-2:].encode())) % N_ENDINGS for w in known])
    numbers = torch.tensor([[torch.log(torch.tensor(float(counts[w]))), len(w) / 8, w.count("_")] for w in known])
    return pairs[order], endings, numbers, torch.tensor([len(words), len(known), N_ENDINGS])


def likings(size: int, held_out: bool, generator: torch.Generator) -> Batch:
    """Topics with words, half of which they use and half drawn at random; (topic, word, ending), numbers of the word, used?"""
    pairs, endings, numbers, counts = _uses()
    chosen = pairs[_positions(len(pairs), size, held_out, generator)]
    drawn = torch.randint(int(counts[1]), (size,), generator=generator)
    used = torch.arange(size) % 2 == 0
    words = torch.where(used, chosen[:, 1], drawn)
    return torch.stack([chosen[:, 0], words, endings[words]], 1), numbers[words], used.float()


def n_categories() -> list[int]:
    """Topics, words, endings."""
    return [int(n) for n in _uses()[3]]
