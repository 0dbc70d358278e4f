"""Small programs with the things that are easy to get wrong: views, writes, several results, empty tensors, random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

import kitsune


def chain() -> Any:
    x, w = torch.arange(24.0).view(4, 6) / 7, torch.arange(18.0).view(6, 3) / 5
    a = (x + 1).relu()
    b = torch.cat([a @ w, torch.softmax(a, 1)], 1)
    return (b * 2.5).t(), a.exp().sum(0), x


def in_place() -> Any:
    x = torch.arange(24.0).view(4, 6) / 7
    flat = torch.arange(8.0)
    part = flat[4:8]
    kitsune.flush()
    a = x * 2
    a.mul_(1.5)
    a[1:3].add_(x[1:3])
    part.add_(1)
    part[1:3].mul_(part[2:4] + 1)
    x.view(-1)[3:9].copy_(a.view(-1)[:6])
    return a, a[0], x[1:], part, flat, part.view(2, 2).t()


def several_results() -> Any:
    x = torch.randn(4, 6, requires_grad=True)
    y = F.layer_norm(x, (6,))
    top, where = (y * 2).max(1)
    left, right = y.split(3, 1)
    (left * right + top[:, None]).sum().backward()
    return y, where, x.grad, left.detach()


def odd_memory() -> Any:
    x = torch.randn(5, 6)
    y = x * 2
    bytes_of = y.view(torch.int32)
    z = y.as_strided((2, 3), (6, 2), 6)
    z.mul_(3)
    # Sees all of an intermediate that dies.
    w = (x + 1).as_strided((3, 2), (6, 2), 7) @ y[:2, :2]
    c = torch.view_as_complex((x[:, :2] * 3).contiguous()).conj() * 2
    return bytes_of + 1, z, w.exp(), c, torch.view_as_real(c) + 1


def nothing_there() -> Any:
    x = torch.zeros(0, 3)
    y = (x + 1).exp() @ torch.zeros(3, 2)
    return y.sum(0) + 1, x * 2, torch.cat([x, x + 1]), (x + 2).mul_(3)


def random() -> Any:
    x = torch.ones(100)
    torch.rand(3)
    y = F.dropout(x * 2, 0.5) + torch.rand(100)
    return y * torch.bernoulli(torch.full((100,), 0.5)), torch.empty(4).uniform_()


def training() -> Any:
    with kitsune.disable():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.GELU(), torch.nn.Flatten())
        model.append(torch.nn.Linear(144, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        loss = F.cross_entropy(model(torch.randn(6, 1, 8, 8)), torch.arange(6) % 5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step != 1)
    return loss.detach(), *model.parameters()


PROGRAMS = (chain, in_place, several_results, odd_memory, nothing_there, random, training)
