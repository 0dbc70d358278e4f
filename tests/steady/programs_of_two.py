"""Programs with two models, two optimizers, or two gradients of one loss."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.steady.programs import Run, Step, batches, mlp, program

Adam, SGD = torch.optim.Adam, torch.optim.SGD
Made = tuple[Step, list[Any]]


@program
def adversarial_with_penalty(run: Run) -> Made:
    """A discriminator with a penalty on its gradient, every third step."""
    maker, judge = mlp(8, 16, 4), mlp(1)
    of_maker, of_judge = run.optimizer(Adam, maker.parameters(), 0.01), run.optimizer(Adam, judge.parameters(), 0.01)
    data = batches()

    def penalty(x: Tensor) -> Tensor:
        real = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(judge(real).sum(), real, create_graph=True)
        return 5 * slope.square().sum(1).mean()

    def step(k: int) -> Any:
        x, fake = data[k][0], maker(torch.randn(6, 4)).detach()
        of_judge.zero_grad()
        loss = F.softplus(judge(fake)).mean() + F.softplus(-judge(x)).mean() + (penalty(x) if k % 3 == 0 else 0)
        loss.backward()
        of_judge.step()
        of_maker.zero_grad()
        other = F.softplus(-judge(maker(torch.randn(6, 4)))).mean()
        other.backward()
        of_maker.step()
        return loss.detach(), other.detach(), fake

    return step, [maker, judge, of_maker, of_judge]


@program
def sharpness_aware(run: Run) -> Made:
    """Two passes each step, the second without a word of the batch norm's."""
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
    optimizer, data = run.optimizer(SGD, net.parameters(), 0.1, momentum=0.9), batches()

    def climb() -> list[Tensor]:
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        norm = torch.norm(torch.stack([g.norm() for g in gradients]))
        before = [p.detach().clone() for p in net.parameters()]
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p.add_(g * (0.05 / (norm + 1e-12)))
        return before

    def step(k: int) -> Any:
        x, y = data[k]
        first = F.cross_entropy(net(x), y)
        first.backward()
        before = climb()
        optimizer.zero_grad()
        net[1].momentum = 0.0
        second = F.cross_entropy(net(x), y)
        second.backward()
        net[1].momentum = 0.1
        for p, old in zip(net.parameters(), before, strict=True):
            p.data = old
        optimizer.step()
        optimizer.zero_grad()
        return first.detach(), second.detach()

    return step, [net, optimizer]


@program
def lookahead(run: Run) -> Made:
    """Slow weights take the place of the fast ones, as other memory."""
    net, data = mlp(), batches()
    optimizer, slow = run.optimizer(Adam, net.parameters(), 0.05), [p.detach().clone() for p in net.parameters()]

    def step(k: int) -> Any:
        loss = F.cross_entropy(net(data[k][0]), data[k][1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for n, p in enumerate(net.parameters()) if k % 3 == 2 else ():
            slow[n] = slow[n] + 0.5 * (p.data - slow[n])
            p.data = slow[n].clone()
        return loss.detach()

    return step, [net, optimizer, slow]


@program
def variance_reduced(run: Run) -> Made:
    """Gradients of an older model, too, and those of all batches now and then."""
    net, data = mlp(), batches()
    old, whole, optimizer = copy.deepcopy(net), dict[str, Tensor](), run.optimizer(SGD, net.parameters(), 0.1)

    def look_back() -> None:
        old.load_state_dict(net.state_dict())
        old.zero_grad()
        for x, y in data[:4]:
            (F.cross_entropy(old(x), y) / 4).backward()
        whole.update({name: p.grad.clone() for name, p in old.named_parameters() if p.grad is not None})

    def step(k: int) -> Any:
        if k % 5 == 0:
            look_back()
        for model in (net, old):
            model.zero_grad()
            F.cross_entropy(model(data[k][0]), data[k][1]).backward()
        with torch.no_grad():
            for (name, p), q in zip(net.named_parameters(), old.parameters(), strict=True):
                assert p.grad is not None and q.grad is not None
                p.grad += whole[name] - q.grad
        optimizer.step()
        return [p.grad for p in net.parameters()]

    return step, [net, old, whole, optimizer]


@program
def kept_gradients(run: Run) -> Made:
    """Each step's are compared with those of the step before, which nobody has cloned."""
    net, data, before = mlp(), batches(), list[Any]()
    optimizer = run.optimizer(SGD, net.parameters(), 0.1)

    def step(k: int) -> Any:
        optimizer.zero_grad(set_to_none=k % 5 != 4)
        F.cross_entropy(net(data[k][0]), data[k][1]).backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        alike = [(a * b).sum() for a, b in zip(gradients, before, strict=False)]
        before[:] = gradients
        optimizer.step()
        return alike

    return step, [net, optimizer, before]


@program
def samples_by_slope(run: Run) -> Made:
    """Samples that go down an energy and are put back where they were taken, and then the energy is trained."""
    energy, data, samples = mlp(1), batches(), torch.randn(12, 8)
    optimizer = run.optimizer(Adam, energy.parameters(), 0.01)

    def step(k: int) -> Any:
        chosen = torch.randperm(12)[:6]
        x = samples[chosen].clone().requires_grad_()
        energy.requires_grad_(False)
        for _ in range(3):
            (slope,) = torch.autograd.grad(energy(x).sum(), x)
            x.data.add_(slope, alpha=-0.1).add_(torch.randn_like(x), alpha=0.05)
        energy.requires_grad_(True)
        samples[chosen] = x.detach()
        loss = energy(data[k][0]).mean() - energy(x.detach()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, [energy, optimizer, samples]
