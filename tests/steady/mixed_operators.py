"""More models for `mixed.py`: an operator or two between two layers, as programs use them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.steady import mixed_models

OPERATORS: dict[str, Callable[[], nn.Module]] = {}
between = functools.partial(mixed_models.between, models=OPERATORS)


@between()
def spectrum(x: Tensor) -> Tensor:
    seen = torch.fft.rfft(x)
    return torch.fft.irfft(seen * torch.polar(torch.ones(7), torch.arange(7.0)), 12) + seen.abs()[:, :1]


@between(lambda: nn.ParameterList([nn.Parameter(torch.randn(6, 6, dtype=torch.cfloat) * 0.3)]))
def complex_numbers(x: Tensor, weights: Any) -> Tensor:
    seen = torch.view_as_complex(x.view(-1, 6, 2).contiguous()) @ weights[0]
    return torch.view_as_real(seen * seen.conj() + 1j * seen.imag)


@between()
def double_part(x: Tensor) -> Tensor:
    return (x.double() - x.double().mean(1, keepdim=True)).exp().log1p().to(x.dtype)


@between()
def masked(x: Tensor) -> Tensor:
    """Masks from data."""
    mask = x > x.mean()
    return torch.where(mask, x, x.masked_fill(~mask, -1.0).cumsum(1) * 0.1)


@between()
def chosen_by_mask(x: Tensor) -> Tensor:
    """As many as the data say."""
    rows = (x[:, 0] > 0).nonzero().squeeze(1)
    out = torch.zeros_like(x)
    out[rows] = x[rows].sin()
    out[x > 0.5] = 0.25
    return out + x[x < 0].sum()


@between()
def scattered(x: Tensor) -> Tensor:
    order = x.argsort(1)
    gathered = x.gather(1, order)
    return torch.zeros_like(x).scatter_add(1, order.flip(1), gathered).index_add(0, torch.arange(len(x)), x, alpha=0.5)


@between()
def sorted_(x: Tensor) -> Tensor:
    top, places = x.topk(5, 1)
    ordered, _ = x.sort(0)
    return torch.cat([top, ordered[:, :7] * places[:, :1]], 1)


@between()
def unique_(x: Tensor) -> Tensor:
    values, inverse, counts = torch.unique((x.detach() * 4).round(), return_inverse=True, return_counts=True)
    return x * counts[inverse] / len(values)


@between()
def put(x: Tensor) -> Tensor:
    out = x.clone()
    out.index_put_((torch.tensor([0, 1, 0]), torch.tensor([2, 3, 2])), x[0, :3], accumulate=True)
    return out.index_fill(1, torch.tensor([5]), 0.5).index_copy(1, torch.tensor([0, 2]), x[:, 3:5])


@between(lambda: nn.ParameterList([nn.Parameter(torch.randn(3, 4, 5) * 0.3)]), out=10)
def einsums(x: Tensor, weights: Any) -> Tensor:
    seen = torch.einsum("bij,ijk->bik", x.view(-1, 3, 4), weights[0])
    return torch.einsum("bik,bjk->bij", seen, seen).tril().sum(1, keepdim=True).expand(-1, 3, -1).flatten(1).repeat(1, 2)[:, :10]


@between()
def cumulated(x: Tensor) -> Tensor:
    return x.cumsum(1).logcumsumexp(0) + x.cummax(1).values + x.diff(dim=1, append=x[:, :1])


@between(out=12)
def distances(x: Tensor) -> Tensor:
    far = torch.cdist(x[:, :6], x[:, 6:].contiguous())
    return x * far.min(1, keepdim=True).values + F.pairwise_distance(x[:, :6], x[:, 6:])[:, None]


@between()
def linear_algebra(x: Tensor) -> Tensor:
    seen = x.t() @ x / len(x) + torch.eye(12)
    return torch.linalg.solve(seen, x.t()).t() + torch.linalg.svdvals(seen) * 0.1 + torch.linalg.cholesky(seen)[-1]


@between()
def quantiles(x: Tensor) -> Tensor:
    return (
        x - x.quantile(0.3, dim=1, keepdim=True) + x.median(0).values + x.std(1, keepdim=True) + x.kthvalue(3, 1).values[:, None]
    )


@between()
def views_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :4].mul_(2)
    x.view(-1, 3, 4)[:, 1].add_(x[:, :4].detach())
    x.t()[8:].sub_(1)
    x[0] = 0.5
    return x


@between()
def detached(x: Tensor) -> Tensor:
    kept = x.detach()
    with torch.no_grad():
        scale = x.norm(dim=1, keepdim=True)
    return x / scale + kept * 0.1


@between(lambda: nn.Bilinear(6, 6, 12), lambda: nn.Softplus())
def bilinear(x: Tensor, layer: nn.Module, act: nn.Module) -> Tensor:
    return act(layer(*x.chunk(2, 1))) * F.glu(torch.cat([x, x.roll(1, 1)], 1))


@between(width=16, out=16)
def sampled_grid(x: Tensor) -> Tensor:
    image = x.view(-1, 1, 4, 4)
    grid = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3) * 0.8, [len(x), 1, 4, 4], align_corners=False)
    return F.grid_sample(image, grid, align_corners=False) + F.interpolate(image, (4, 4), mode="bicubic")


@between(width=16, out=16)
def patches(x: Tensor) -> Tensor:
    seen = F.unfold(x.view(-1, 1, 4, 4), 2)
    return F.fold(seen * seen.softmax(1), (4, 4), 2) + F.pad(x.view(-1, 1, 4, 4), (1, 1, 0, 0), mode="reflect")[..., 1:5]


@between()
def noisy(x: Tensor) -> Tensor:
    """Random numbers of several kinds."""
    noise = torch.randn_like(x) + torch.rand(12) + torch.empty_like(x).exponential_() + torch.bernoulli(torch.full_like(x, 0.5))
    rows = torch.randperm(len(x))
    return x[rows] + 0.1 * noise + F.gumbel_softmax(x, hard=True) + torch.multinomial(x.detach().softmax(1), 1)


@between(*[lambda: nn.Linear(12, 12)] * 3)
def experts(x: Tensor, *layers: nn.Module) -> Tensor:
    """Each row goes where its largest number says."""
    to = x[:, :3].argmax(1)
    out = torch.zeros_like(x)
    for k, layer in enumerate(layers):
        rows = torch.where(to == k)[0]
        if len(rows):
            out[rows] = layer(x[rows]).to(out.dtype)
    return out
