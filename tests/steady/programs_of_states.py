"""Programs whose models, optimizers or buffers change under way."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.steady.programs import STEPS, Run, Step, batches, mlp, program

Adam, SGD = torch.optim.Adam, torch.optim.SGD
Made = tuple[Step, list[Any]]


def usual(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """The step of every tutorial."""
    loss = F.cross_entropy(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@program
def in_another_precision(run: Run) -> Made:
    """In mid-training, with its gradients."""
    net, data = mlp(), batches()
    optimizer = run.optimizer(SGD, net.parameters(), 0.05)

    def step(k: int) -> Any:
        if k == 5:
            net.double()
        if k == 8:
            net.to(torch.float32)
        return usual(net, optimizer, data[k][0].to(net[0].weight.dtype), data[k][1])

    return step, [net]


@program
def restored(run: Run) -> Made:
    """From a file, and from tensors that become the parameters."""
    net, data, file = mlp(), batches(), io.BytesIO()
    optimizer = run.optimizer(Adam, net.parameters(), 0.05)

    def step(k: int) -> Any:
        if k == 4:
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        if k == 7:
            file.seek(0)
            saved = torch.load(file)
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
        if k == 9:
            net.load_state_dict({name: value * 1.5 for name, value in net.state_dict().items()}, assign=True)
        return usual(net, optimizer, *data[k])

    return step, [net, optimizer]


@program
def swapped_parameters(run: Run) -> Made:
    """Which torch refuses where somebody refers to them weakly."""
    net, data = mlp(), batches()
    optimizer = run.optimizer(SGD, net.parameters(), 0.1, momentum=0.9)

    def step(k: int) -> Any:
        if k in (5, 9):
            torch.utils.swap_tensors(net[0].weight, nn.Parameter(net[0].weight.detach() * 0.5))
        loss = usual(net, optimizer, *data[k])
        optimizer.zero_grad()
        return loss

    return step, [net, optimizer]


@program
def other_layers(run: Run) -> Made:
    net, data = mlp(), batches()
    optimizer = run.optimizer(Adam, net.parameters(), 0.05)

    def step(k: int) -> Any:
        if k == 4:
            net[1] = nn.ReLU()
        if k == 6:
            net[2] = nn.Linear(16, 4)
            optimizer.param_groups[0]["params"] = list(net.parameters())
        if k == 8:
            net.insert(1, nn.LayerNorm(16))
            optimizer.add_param_group({"params": list(net[1].parameters())})
        return usual(net, optimizer, *data[k])

    return step, [net]


@program
def queue_of_keys(run: Run) -> Made:
    """A buffer that is a ring, at a place that is read."""
    net, data = mlp(), batches()
    net.register_buffer("queue", F.normalize(torch.randn(4, 18), dim=0))
    net.register_buffer("at", torch.zeros(1, dtype=torch.long))
    optimizer = run.optimizer(Adam, net.parameters(), 0.01)

    def step(k: int) -> Any:
        queue, at = net.get_buffer("queue"), net.get_buffer("at")
        seen = F.normalize(net(data[k][0]), dim=1)
        loss = (seen @ queue.clone().detach()).logsumexp(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            begin = int(at)
            queue[:, begin : begin + 6] = seen.t()
            at[0] = (begin + 6) % 18
        return loss.detach()

    return step, [net, optimizer]


@program
def codebook(run: Run) -> Made:
    """Vector quantisation; codes that nobody uses are drawn anew."""
    net, data = nn.ModuleList([nn.Linear(8, 4), nn.Linear(4, 8)]), batches()
    codes, used = torch.randn(5, 4), torch.ones(5)
    optimizer = run.optimizer(Adam, net.parameters(), 0.01)

    def learn(seen: Tensor, chosen: Tensor) -> None:
        one_hot = F.one_hot(chosen, 5).float()
        used.mul_(0.9).add_(one_hot.sum(0), alpha=0.1)
        codes.mul_(0.9).add_(one_hot.t() @ seen / one_hot.sum(0).clamp(min=1)[:, None], alpha=0.1)
        unused = used < 0.7
        if unused.any():
            codes[unused] = seen[torch.randint(0, 6, (int(unused.sum()),))]
            used[unused] = 1

    def step(k: int) -> Any:
        x = data[k][0]
        seen = net[0](x)
        chosen = torch.cdist(seen, codes).argmin(1)
        loss = F.mse_loss(net[1](seen + (codes[chosen] - seen).detach()), x) + F.mse_loss(seen, codes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            learn(seen.detach(), chosen)
        return loss.detach(), chosen

    return step, [net, codes, used, optimizer]


@program
def hooks_that_come_and_go(run: Run) -> Made:
    net, data, seen, hooks = mlp(), batches(), list[Tensor](), list[Any]()
    optimizer = run.optimizer(Adam, net.parameters(), 0.01)

    def step(k: int) -> Any:
        if k == 4:
            hooks.append(net[0].register_forward_hook(lambda module, args, out: out * 1.1))
        if k == 6:
            hooks.append(net[2].register_full_backward_hook(lambda module, ins, outs: (ins[0] * 0.5,)))
            hooks.append(net[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01)))
        if k == 8:
            hooks.append(net[2].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum())))
        if k in (7, 10):
            hooks.pop(0).remove()
        return usual(net, optimizer, *data[k])

    return step, [net, optimizer, seen]


@program
def views_of_data(run: Run) -> Made:
    """Batches in many layouts: transposed, expanded, with gaps, from one tensor."""
    net, data, row, y = mlp(), torch.randn(8, 40), torch.randn(1, 8), torch.arange(6) % 4
    optimizer = run.optimizer(Adam, net.parameters(), 0.01)
    views = [
        lambda k: data[:, k : k + 6].t(),
        lambda k: row.expand(6, 8),
        lambda k: data.t()[k : k + 12 : 2],
        lambda k: data.t().reshape(20, 16)[k : k + 6, ::2],
    ]

    def step(k: int) -> Any:
        loss = usual(net, optimizer, views[k % 4](k), y)
        data[:, k] *= 1.01
        return loss

    return step, [net, optimizer, data]


@program
def evolution(run: Run) -> Made:
    """Gradients that are no gradients."""
    net, (x, y) = mlp(), batches()[0]
    optimizer = run.optimizer(Adam, net.parameters(), 0.05)

    def loss_at(base: list[Tensor], noise: list[Tensor], scale: float) -> Tensor:
        for p, b, e in zip(net.parameters(), base, noise, strict=True):
            p.copy_(b + scale * e)
        return F.cross_entropy(net(x), y)

    def step(k: int) -> Any:
        with torch.no_grad():
            base, total = [p.clone() for p in net.parameters()], [torch.zeros_like(p) for p in net.parameters()]
            for _ in range(2):
                noise = [torch.randn_like(p) for p in base]
                gain = loss_at(base, noise, 0.1) - loss_at(base, noise, -0.1)
                total = [t + gain * e for t, e in zip(total, noise, strict=True)]
            for p, b, t in zip(net.parameters(), base, total, strict=True):
                p.copy_(b)
                p.grad = t / 0.4
        optimizer.step()
        return gain

    return step, [net, optimizer]


@program
def alternating_buffers(run: Run) -> Made:
    """The next batch is written into the one of two that is free."""
    net, data = mlp(), batches()
    optimizer, pages = run.optimizer(Adam, net.parameters(), 0.01), [[t.clone() for t in data[0]] for _ in range(2)]
    losses = torch.zeros(STEPS)

    def step(k: int) -> Any:
        for page, fresh in zip(pages[k % 2], data[k], strict=True):
            page.copy_(fresh)
        losses[k] = usual(net, optimizer, *pages[k % 2])
        return float(losses.sum()) if k % 4 == 3 else None

    return step, [net, optimizer, pages, losses]
