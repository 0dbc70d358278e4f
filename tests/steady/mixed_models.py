"""Models for `mixed.py`: each takes a batch of 8 numbers and gives 4, in a way of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

MODELS: dict[str, Callable[[], nn.Module]] = {}
# What some models and losses read, and some programs change.
SCALES = {"global": 1.0}


def model(make: Any) -> Any:
    MODELS[make.__name__.strip("_")] = make
    return make


class Around(nn.Module):
    """A layer before, a layer after, and what is between them."""

    def __init__(self, inside: Callable[..., Tensor] | None = None, *parts: nn.Module, width: int = 12, out: int = 12) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(out, 4)
        self.parts, self.inside = nn.ModuleList(parts), inside
        self.factor, self.calls = 1.0, 0

    def between(self, x: Tensor) -> Tensor:
        return self.inside(x, *self.parts) if self.inside is not None else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(torch.tanh(self.first(x)))
        return self.last(x.flatten(1)) if self.factor == 1 else self.last(x.flatten(1)) * self.factor


def between(*parts: Callable[[], nn.Module], width: int = 12, out: int = 12, models: Any = MODELS) -> Any:
    """The function is what is between two layers."""

    def put(inside: Callable[..., Tensor]) -> Callable[..., Tensor]:
        models[inside.__name__.strip("_")] = lambda: Around(inside, *(part() for part in parts), width=width, out=out)
        return inside

    return put


@model
def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 4))


@model
def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.LayerNorm(12), nn.Linear(12, 4)
    )


@model
def cumulative() -> nn.Module:
    """Batch norms without momentum, without running statistics, and without weights."""
    norms = nn.BatchNorm1d(12, momentum=None), nn.BatchNorm1d(12, track_running_stats=False), nn.BatchNorm1d(12, affine=False)
    return nn.Sequential(nn.Linear(8, 12), norms[0], nn.Tanh(), norms[1], nn.SiLU(), norms[2], nn.Linear(12, 4))


@model
def dropouts() -> nn.Module:
    """Of several kinds."""
    layers = [nn.Linear(8, 12), nn.AlphaDropout(0.2), nn.SELU(), nn.Unflatten(1, (3, 4)), nn.Dropout1d(0.3)]
    return nn.Sequential(
        *layers, nn.FeatureAlphaDropout(0.1), nn.Flatten(), nn.RReLU(), nn.Dropout(0.5, inplace=True), nn.Linear(12, 4)
    )


@model
def images() -> nn.Module:
    layers = [nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    more = [nn.ConvTranspose2d(4, 3, 2, stride=2), nn.InstanceNorm2d(3), nn.LocalResponseNorm(2), nn.PReLU(3)]
    return nn.Sequential(*layers, *more, nn.AdaptiveAvgPool2d((2, 2)), nn.Dropout2d(0.2), nn.Flatten(), nn.Linear(12, 4))


@model
def images_of_groups() -> nn.Module:
    layers = [nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2, padding=1), nn.GroupNorm(2, 4), nn.ELU(), nn.MaxPool2d(2, 1)]
    more = [nn.Upsample(scale_factor=2, mode="bilinear"), nn.AdaptiveMaxPool2d(2), nn.PixelShuffle(2), nn.Flatten()]
    return nn.Sequential(*layers, *more, nn.Linear(16, 4))


@model
def sequences() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru = nn.LSTM(2, 5, 2, batch_first=True, dropout=0.2), nn.GRU(5, 4, bidirectional=True)
            self.last = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            out, (h, _) = self.lstm(x.view(-1, 4, 2))
            seen, _ = self.gru(out.transpose(0, 1), None)
            return self.last(seen[-1]) + h[-1, :, :4]

    return Net()


@model
def cells() -> nn.Module:
    """A loop over time, whose length is that of the batch's."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = nn.GRUCell(2, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h, states = x.new_zeros(len(x), 6), []
            for part in x.view(-1, 4, 2).unbind(1):
                h = self.cell(part, h)
                states.append(h)
            return self.last(torch.stack(states).max(0).values)

    return Net()


@model
def transformers() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.Unflatten(1, (2, 8)),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


@between(lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda: nn.RMSNorm(4))
def attention(x: Tensor, attend: nn.Module, norm: nn.Module) -> Tensor:
    x = norm(x.view(-1, 3, 4))
    mask = torch.ones(3, 3, dtype=torch.bool, device=x.device).triu(1)
    seen, weights = attend(x, x, x, attn_mask=mask)
    return seen * weights.sum(-1, keepdim=True)


@between(
    lambda: nn.Embedding(6, 12, padding_idx=0),
    lambda: nn.Embedding(5, 12, max_norm=1.0),
    lambda: nn.EmbeddingBag(6, 12, mode="mean"),
)
def embeddings(x: Tensor, padded: nn.Module, bounded: nn.Module, bags: nn.Module) -> Tensor:
    places = (x.detach() * 3).long().abs()
    return x + padded(places % 6).mean(1) + bounded(places[:, 0] % 5) + bags(places[:, :4] % 6)


@between(lambda: nn.Embedding(6, 12, sparse=True))
def sparse_embeddings(x: Tensor, table: nn.Module) -> Tensor:
    return x * table((x.detach()[:, 0] * 3).long().abs() % 6)


@model
def spectral() -> nn.Module:
    """Norms of weights, new and old."""
    layers = parametrizations.spectral_norm(nn.Linear(8, 12)), parametrizations.weight_norm(nn.Linear(12, 12)), nn.Linear(12, 12)
    old = torch.nn.utils.spectral_norm(nn.Linear(12, 4))
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), parametrizations.orthogonal(layers[2]), nn.Tanh(), old)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


@model
def parametrized() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
    parametrize.register_parametrization(net[2], "weight", Symmetric())
    return net


@model
def tied() -> nn.Module:
    """Two layers of one weight, and one module twice."""
    net = nn.Sequential(
        nn.Linear(8, 12, bias=False),
        nn.Tanh(),
        shared := nn.Linear(12, 12),
        nn.Tanh(),
        shared,
        last := nn.Linear(12, 8),
        nn.Linear(8, 4),
    )
    last.weight = nn.Parameter(last.weight.detach())
    net[0].weight = nn.Parameter(torch.randn(12, 8) * 0.2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(F.linear(self.net[0](x), self.net[0].weight.t()))

    return Net()


@model
def counting() -> nn.Module:
    """A model that counts its calls, in Python and in a buffer, and goes by both."""

    class Net(Around):
        seen: Tensor
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))
            self.register_buffer("mean", torch.zeros(12))

        def between(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.training:
                self.seen += 1
                with torch.no_grad():
                    self.mean.lerp_(x.mean(0), 1 / min(self.calls, 5))
            x = x - self.mean * 0.5
            return x * self.seen.float().rsqrt() if self.calls % 3 else x.sin()

    return Net()


@model
def replaced_buffer() -> nn.Module:
    """A buffer that is another tensor after each call."""

    class Net(Around):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(12))

        def between(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    return Net()


@between(lambda: nn.Linear(12, 12), lambda: nn.Linear(12, 12), lambda: nn.Linear(12, 12))
def stochastic_depth(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        if random.random() < 0.7:
            x = x + torch.relu(layer(x))
    return x


class Rounded(torch.autograd.Function):
    """Straight through, and what has no gradient beside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Any:
        rounded = (x * scale).round() / scale
        places = rounded.abs().argmax(1)
        ctx.save_for_backward(x, places)
        ctx.mark_non_differentiable(places)
        ctx.scale = scale
        return rounded, places

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        x, places = ctx.saved_tensors
        return grad * (x.abs() < 0.9) + F.one_hot(places, x.shape[1]) / ctx.scale, None


@between()
def custom_function(x: Tensor) -> Tensor:
    rounded, places = Rounded.apply(x, 8.0)
    return rounded + places[:, None] * 0.01


class Twice(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@between()
def function_in_place(x: Tensor) -> Tensor:
    return Twice.apply(x + 1) - x


@between(
    lambda: nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.2), nn.Tanh()),
    lambda: nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12)),
)
def checkpointed(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    return checkpoint(second, checkpoint(first, x, use_reentrant=False), use_reentrant=True)


@between(lambda: nn.Linear(12, 12))
def functional(x: Tensor, layer: nn.Module) -> Tensor:
    half = {name: p * 0.5 for name, p in layer.named_parameters()}
    return torch.func.functional_call(layer, half, (x,)) + layer(x)


@between(lambda: nn.Linear(12, 12))
def vmapped(x: Tensor, layer: nn.Module) -> Tensor:
    return torch.vmap(lambda row: torch.tanh(layer(row)) * row.sum())(x)


@between(lambda: nn.Linear(12, 12))
def gradient_inside(x: Tensor, layer: nn.Module) -> Tensor:
    return x - 0.1 * torch.func.grad(lambda seen: layer(seen).square().sum())(x)


class Reading(Around):
    """Reads a global, a default argument, a class's attribute and its own."""

    power = 1

    def between(self, x: Tensor, scale: float = 0.5) -> Tensor:
        return (x * scale * SCALES["global"]).abs().pow(self.power) + x * self.factor


MODELS["reading"] = Reading


@model
def lazily_made() -> nn.Module:
    net = nn.Sequential(nn.LazyLinear(12), nn.LazyBatchNorm1d(), nn.Hardswish(), nn.LazyLinear(4))
    net(torch.zeros(2, 8))
    return net


@model
def buffers_in_lists() -> nn.Module:
    """State that no module knows of: a list of the last results."""

    class Net(Around):
        def __init__(self) -> None:
            super().__init__()
            self.last_seen: list[Tensor] = []

        def between(self, x: Tensor) -> Tensor:
            self.last_seen = [*self.last_seen[-2:], x.detach().mean(0)]
            return x + sum(self.last_seen) / len(self.last_seen)

    return Net()


@model
def carried() -> nn.Module:
    """A state with history is cut, and goes on."""

    class Net(Around):
        def __init__(self) -> None:
            super().__init__()
            self.state: Tensor | None = None

        def between(self, x: Tensor) -> Tensor:
            before = x.new_zeros(12) if self.state is None else self.state
            self.state = (0.5 * before + x.mean(0)).detach_() if self.factor != 2 else (0.5 * before + x.mean(0)).detach()
            return x + before

    return Net()


@model
def in_two_types() -> nn.Module:
    """Half of it in bfloat16."""

    class Net(Around):
        def __init__(self) -> None:
            super().__init__()
            self.half = nn.Linear(12, 12).bfloat16()

        def between(self, x: Tensor) -> Tensor:
            return self.half(x.bfloat16()).float() + (x * 4).to(torch.int8).float()

    return Net()
