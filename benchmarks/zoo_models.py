"""Models of the zoo that are written by hand: a diffusion's U-Net, a recommender, a model of words of LSTMs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WordModel(nn.Module):
    """Two LSTMs between an embedding and a head."""

    WORDS, WIDTH = 10000, 512

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(self.WORDS, self.WIDTH), nn.Linear(self.WIDTH, self.WORDS)
        self.body, self.dropout = nn.LSTM(self.WIDTH, self.WIDTH, 2, batch_first=True, dropout=0.2), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(self.words(x))[0]))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two convolutions, between which the time is added."""

    def __init__(self, n_in: int, n_out: int, n_time: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.GroupNorm(8, n_in), nn.GroupNorm(8, n_out)
        self.first, self.second = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.time, self.past = nn.Linear(n_time, n_out), nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(F.silu(self.first_norm(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.second(F.silu(self.second_norm(h))) + self.past(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention over all places of an image, with four heads."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.GroupNorm(8, n), nn.Conv2d(n, 3 * n, 1), nn.Conv2d(n, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, height, width = x.shape
        q, k, v = self.into(self.norm(x)).reshape(batch, 3, 4, n // 4, height * width).transpose(-1, -2).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return x + self.out(out)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Three scales down and up again, with what was seen on the way down beside it; told the time by its sines."""

    WAVES, TIME = 32, 256

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        time = self.TIME
        self.time = nn.Sequential(nn.Linear(2 * self.WAVES, time), nn.SiLU(), nn.Linear(time, time))
        self.begin, self.first_down, self.second_down = nn.Conv2d(3, n, 3, padding=1), *self._halving(n), *self._halving(2 * n)
        self.one, self.two, self.three = Block(n, n, time), Block(n, 2 * n, time), Block(2 * n, 4 * n, time)
        self.attention, self.middle = Attention(4 * n), Block(4 * n, 4 * n, time)
        self.back_three, self.back_two, self.back_one = Block(8 * n, 2 * n, time), Block(4 * n, n, time), Block(2 * n, n, time)
        self.norm, self.end = nn.GroupNorm(8, n), nn.Conv2d(n, 3, 3, padding=1)

    @staticmethod
    def _halving(n: int) -> tuple[nn.Module]:
        return (nn.Conv2d(n, n, 3, 2, 1),)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        waves = times[:, None] * torch.exp(-torch.arange(self.WAVES, device=x.device) * 0.28)
        time = self.time(torch.cat([waves.sin(), waves.cos()], 1))
        one = self.one(self.begin(x), time)
        two = self.two(self.first_down(one), time)
        three = self.attention(self.three(self.second_down(two), time))
        h = self.back_three(torch.cat([self.middle(three, time), three], 1), time)
        h = self.back_two(torch.cat([F.interpolate(h, scale_factor=2), two], 1), time)
        h = self.back_one(torch.cat([F.interpolate(h, scale_factor=2), one], 1), time)
        return self.end(F.silu(self.norm(h)))  # type: ignore[no-any-return]


class Recommender(nn.Module):
    """A row of each table and what is made of the numbers, multiplied with each other."""

    NUMBERS, TABLES, ROWS, WIDTH = 13, 26, 20000, 64

    def __init__(self) -> None:
        super().__init__()
        width, n = self.WIDTH, self.TABLES + 1
        self.tables = nn.ModuleList(nn.Embedding(self.ROWS, width) for _ in range(self.TABLES))
        self.bottom = nn.Sequential(nn.Linear(self.NUMBERS, 512), nn.ReLU(), nn.Linear(512, width), nn.ReLU())
        top = (nn.Linear(width + n * (n - 1) // 2, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1))
        self.top = nn.Sequential(*top)
        self.register_buffer("pairs", torch.triu_indices(n, n, 1))

    def forward(self, numbers: Tensor, rows: Tensor) -> Tensor:
        all_ = torch.stack([self.bottom(numbers), *(table(rows[:, k]) for k, table in enumerate(self.tables))], 1)
        first, second = self.pairs  # type: ignore[misc]
        products = torch.bmm(all_, all_.transpose(1, 2))[:, first, second]
        return self.top(torch.cat([all_[:, 0], products], 1)).squeeze(1)  # type: ignore[no-any-return]
