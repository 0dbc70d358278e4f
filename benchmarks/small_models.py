"""Eight small models of the kinds that people train, with real data: what convergence is looked at on.

Each trains in milliseconds a step on a GPU and some ten on a CPU. Written as one would write them without Kitsune in mind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.small_data import Batch, Source, characters, images, likings, n_categories, n_characters, noisy_images
from kitsune.demo.models import CharGPT


@dataclass(frozen=True)
class Small:
    """A model, its data, its loss, and how it is trained."""

    model: Callable[[], nn.Module]
    source: Source
    loss: Callable[[nn.Module, Batch], Tensor]
    size: int
    rate: float


class Residual(nn.Module):
    """Two convolutions with batch norm, and what goes past them."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)
        plain = n_in == n_out and stride == 1
        past = [] if plain else [nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)]
        self.past = nn.Sequential(*past)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.past(x))


class ViT(nn.Module):
    """Patches of 8x8 as words, a class token, torch's own encoder layers."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


class RMSNorm(nn.Module):
    """Divided by the root of the mean square, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide.to(x.dtype) * self.weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of elements turned by an angle that grows with their position."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class LlamaLayer(nn.Module):
    """Grouped attention with rotary positions, and a gated network."""

    def __init__(self, width: int, n_heads: int, n_groups: int) -> None:
        super().__init__()
        self.n_heads, self.n_groups, self.each = n_heads, n_groups, width // n_heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, n_groups * self.each, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def heads(self, x: Tensor, n: int) -> Tensor:
        return x.view(*x.shape[:2], n, self.each).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm1(x)
        q = rotated(self.heads(self.q(y), self.n_heads), cos, sin)
        k, v = rotated(self.heads(self.k(y), self.n_groups), cos, sin), self.heads(self.v(y), self.n_groups)
        times = self.n_heads // self.n_groups
        k, v = (t.to(q.dtype).repeat_interleave(times, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A decoder as Llama's, over characters."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int = 96, depth: int = 3, context: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_characters(), width)
        self.layers = nn.ModuleList(LlamaLayer(width, 4, 2) for _ in range(depth))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, n_characters(), bias=False)
        speeds = 10000.0 ** (-torch.arange(0, width // 4, 2) / (width // 4))
        angles = torch.outer(torch.arange(context), speeds).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


class LSTM(nn.Module):
    """Two layers of torch's LSTM over characters."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_characters(), width)
        self.layers = nn.LSTM(width, width, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(width, n_characters())

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.tokens(tokens))[0])
        return logits


class UNet(nn.Module):
    """Two steps down and two up, each with what was there on the way down beside it; group norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(self.block(a, b) for a, b in zip((1, *widths), widths, strict=False))
        self.wider = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in ((widths[1], widths[2]), (widths[0], widths[1])))
        self.up = nn.ModuleList(self.block(2 * n, n) for n in (widths[1], widths[0]))
        self.out = nn.Conv2d(width, 1, 1)

    def block(self, n_in: int, n_out: int) -> nn.Module:
        """A convolution with group norm."""
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 1, 1), nn.GroupNorm(8, n_out), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for wider, block, beside in zip(self.wider, self.up, (kept[1], kept[0]), strict=True):
            x = block(torch.cat([wider(x), beside], 1))
        cleaned: Tensor = self.out(x)
        return cleaned


class Recommender(nn.Module):
    """Embeddings of categories and a network over numbers; their products with each other go into another network."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, width) for n in n_categories())
        self.bottom = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, width))
        self.top = nn.Sequential(nn.Linear(6 + width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        rows = [table(ids) for table, ids in zip(self.tables, categories.unbind(1), strict=True)]
        stacked = torch.stack([dense.float(), *rows], 1)
        products = stacked @ stacked.transpose(1, 2)
        above = torch.triu_indices(4, 4, 1, device=products.device)
        logits: Tensor = self.top(torch.cat([products[:, above[0], above[1]], dense], 1)).squeeze(1)
        return logits


def mlp() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(1024, 256), nn.GELU(), nn.LayerNorm(256), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def classes(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def next_characters(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def cleaned(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def used(model: nn.Module, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0], batch[1]), batch[2])


SMALL = {
    "small-mlp": Small(mlp, images, classes, 64, 1e-3),
    "resnet": Small(resnet, images, classes, 32, 1e-3),
    "small-vit": Small(ViT, images, classes, 32, 1e-3),
    "gpt": Small(lambda: CharGPT(n_characters()), characters, next_characters, 16, 1e-3),
    "llama": Small(Llama, characters, next_characters, 16, 1e-3),
    "lstm": Small(LSTM, characters, next_characters, 16, 2e-3),
    "unet": Small(UNet, noisy_images, cleaned, 16, 1e-3),
    "recommender": Small(Recommender, likings, used, 256, 1e-2),
}
