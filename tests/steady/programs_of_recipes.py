"""Training loops as they are known by name, in small: what is special about each is between the model and its loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.steady.programs import STEPS, Run, Step, batches, mlp, program

Made = tuple[Step, list[Any]]
adam, sgd = torch.optim.Adam, torch.optim.SGD


@program
def matched_boxes(run: Run) -> Made:
    """Which prediction is for which box is worked out by NumPy in mid-step."""
    net, data = mlp(out=12), batches()
    optimizer = run.optimizer(adam, net.parameters(), 0.01)

    def matched(cost: np.ndarray[Any, Any]) -> list[int]:
        rows = []
        for column in range(cost.shape[1]):
            rows.append(int(cost[:, column].argmin()))
            cost[rows[-1]] = 1e9
        return rows

    def step(k: int) -> Any:
        boxes = net(data[k][0]).view(6, 4, 3).sigmoid()
        wanted = [torch.linspace(0.1, 0.9, 3 * n).view(n, 3) for n in (data[k][1] % 3 + 1).tolist()]
        with torch.no_grad():
            rows = [matched(torch.cdist(boxes[i], wanted[i], p=1).numpy().copy()) for i in range(6)]
        found = torch.cat([boxes[i][torch.as_tensor(row)] for i, row in enumerate(rows)])
        loss = F.l1_loss(found, torch.cat(wanted), reduction="none").sum() / len(found)
        if not math.isfinite(loss.item()):
            raise ValueError
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        return loss.detach()

    return step, [net, optimizer]


@program
def experts(run: Run) -> Made:
    """A gate sends each row to two of four experts, which give back what they make of theirs."""
    gate, parts, data, load = nn.Linear(8, 4), nn.ModuleList([mlp(8) for _ in range(4)]), batches(), torch.zeros(4)
    optimizer = run.optimizer(adam, [*gate.parameters(), *parts.parameters()], 0.01)

    def step(k: int) -> Any:
        x, y = data[k]
        weights, chosen = gate(x).softmax(1).topk(2, -1)
        mask = F.one_hot(chosen, 4).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for n, part in enumerate(parts):
            which, rows = torch.where(mask[n])
            if rows.numel():
                out.index_add_(0, rows, part(x[rows]) * weights[rows, which, None])
        with torch.no_grad():
            load.mul_(0.9).add_(mask.sum((1, 2)).float())
        loss = F.cross_entropy(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, [gate, parts, load, optimizer]


@program
def equilibrium(run: Run) -> Made:
    """A fixed point is looked for without gradients until it is near enough, and gone through once with them."""
    inside, into, head, data = nn.Linear(16, 16), nn.Linear(8, 16), nn.Linear(16, 4), batches()
    nn.init.normal_(inside.weight, std=0.1)
    optimizer = run.optimizer(adam, [*inside.parameters(), *into.parameters(), *head.parameters()], 0.01)

    def step(k: int) -> Any:
        given = into(data[k][0])
        with torch.no_grad():
            z, n, error = torch.zeros_like(given), 0, 1.0
            while error > 1e-2:
                z, before, n = torch.tanh(inside(z) + given), z, n + 1
                error = (z - before).norm().item()
        loss = F.cross_entropy(head(torch.tanh(inside(z) + given)), data[k][1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), n

    return step, [inside, into, head, optimizer]


@program
def chains_of_tags(run: Run) -> Made:
    """All paths through a chain of tags are added up, and the best one is looked for."""
    emit, moves, data = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 4) * 0.1), batches()
    optimizer = run.optimizer(adam, [*emit.parameters(), moves], 0.01)

    def best(scores: Tensor) -> Tensor:
        at, came = scores[:, 0], []
        for t in range(1, scores.shape[1]):
            at, before = (at.unsqueeze(2) + moves + scores[:, t].unsqueeze(1)).max(1)
            came.append(before)
        path = [at.argmax(1)]
        for before in reversed(came):
            path.append(before.gather(1, path[-1].unsqueeze(1)).squeeze(1))
        return torch.stack(path[::-1], 1)

    def step(k: int) -> Any:
        x, y = data[k]
        scores = torch.stack([emit(x * (1 + 0.2 * t)) for t in range(3 + k % 2)], 1)
        tags = torch.stack([(y + t) % 4 for t in range(3 + k % 2)], 1)
        total = scores[:, 0]
        for t in range(1, scores.shape[1]):
            total = torch.logsumexp(total.unsqueeze(2) + moves + scores[:, t].unsqueeze(1), 1)
        right = scores.gather(2, tags.unsqueeze(2)).squeeze(2).sum(1) + moves[tags[:, :-1], tags[:, 1:]].sum(1)
        loss = (total.logsumexp(1) - right).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            return loss.detach(), best(scores)

    return step, [emit, moves, optimizer]


@program
def learned_to_learn(run: Run) -> Made:
    """Through two steps of a copy, whose gradients have gradients."""
    net, data = mlp(), batches()
    optimizer = run.optimizer(adam, net.parameters(), 0.01)

    def step(k: int) -> Any:
        total = torch.zeros(())
        for x, y in (data[k], data[k - 1]):
            weights = dict(net.named_parameters())
            for _ in range(2):
                inner = F.cross_entropy(functional_call(net, weights, (x,)), y)
                grads = torch.autograd.grad(inner, tuple(weights.values()), create_graph=True)
                weights = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), grads, strict=True)}
            total = total + F.cross_entropy(functional_call(net, weights, (x.flip(1),)), y)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total.detach()

    return step, [net, optimizer]


@program
def codes_of_samples(run: Run) -> Made:
    """Each sample has a row that is learned, and is kept on a sphere."""
    net, codes = mlp(8, ins=3), nn.Parameter(torch.randn(40, 3) * 0.1)
    data, optimizers = batches(), []
    optimizers += [run.optimizer(adam, net.parameters(), 0.01), run.optimizer(sgd, [codes], 0.5)]

    def step(k: int) -> Any:
        rows = torch.randint(0, 40, (6,))
        loss = F.mse_loss(net(codes[rows]), data[k][0])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        codes.data[rows] = F.normalize(codes.data[rows], dim=1)
        return loss.detach()

    return step, [net, codes, *optimizers]


@program
def one_word(run: Run) -> Made:
    """One row of an embedding is learned; all others are put back after each update."""
    words, net = nn.Embedding(10, 8), mlp().requires_grad_(False)
    optimizer, before, others = run.optimizer(adam, words.parameters(), 0.05), words.weight.data.clone(), torch.arange(10) != 3

    def step(k: int) -> Any:
        text = torch.randint(0, 10, (6, 2))
        text[:, 0] = 3
        loss = F.cross_entropy(net(words(text).mean(1)), text[:, 1] % 4)
        optimizer.zero_grad()
        loss.backward()
        words.weight.grad[others] = 0  # type: ignore[index]
        optimizer.step()
        with torch.no_grad():
            words.weight[others] = before[others]
        return loss.detach(), words.weight[3].detach().clone()

    return step, [words, optimizer]


@program
def pictures(run: Run) -> Made:
    """What is learned is an input, made anew now and then, where the training is."""
    net, held = mlp().requires_grad_(False), list[Any]()
    wanted = net(torch.ones(3, 8))

    def step(k: int) -> Any:
        if k % 8 == 0:
            picture = torch.randn(3, 8).requires_grad_()
            held[:] = picture, run.optimizer(adam, [picture], 0.05)
        picture, optimizer = held
        with torch.no_grad():
            picture.clamp_(-1.5, 1.5)
        loss = F.mse_loss(net(picture), wanted) + 0.1 * (picture[:, 1:] - picture[:, :-1]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), picture.detach().clone(), picture.grad.clone()

    return step, held


@program
def observed_in_place(run: Run) -> Made:
    """An environment writes its observation over the last one, in NumPy's memory, while the model's results are pending."""
    net, mean, seen = mlp(), torch.zeros(8), np.zeros((6, 8), np.float32)
    optimizer = run.optimizer(adam, net.parameters(), 0.01)

    def step(k: int) -> Any:
        logs, rewards = [], []
        for _ in range(3):
            x = torch.from_numpy(seen)
            mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            chances = torch.distributions.Categorical(logits=net(x - mean))
            action = chances.sample()
            logs.append(chances.log_prob(action))
            seen[:] = np.tanh(seen * 0.9 + action.numpy()[:, None] * 0.1 + 0.05)
            rewards.append(torch.as_tensor(seen.sum(1).copy()))
        returns = torch.stack(rewards).flip(0).cumsum(0).flip(0)
        loss = -(torch.stack(logs) * (returns - returns.mean()) / (returns.std() + 1e-8)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), mean.clone()

    return step, [net, mean, optimizer]


@program
def written_between(run: Run) -> Made:
    """Between forward and backward, weights and activations are written where autograd does not see it."""
    net, data = mlp(), batches()
    optimizer = run.optimizer(sgd, net.parameters(), 0.1)

    def step(k: int) -> Any:
        x, y = data[k]
        hidden = torch.tanh(net[0](x))
        loss = F.cross_entropy(net[2](hidden), y)
        if k % 3 == 1:
            net[2].weight.data.mul_(1.01)
        elif k % 3 == 2:
            hidden.data.mul_(0.5)
        else:
            x.data.add_(0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, [net, optimizer]


@program
def given_by_a_generator(run: Run) -> Made:
    """The loop is a generator, which waits in the midst of a step."""
    net, data = mlp(), batches()
    optimizer = run.optimizer(adam, net.parameters(), 0.01)

    def loop() -> Any:
        for k in range(STEPS):
            out = net(data[k][0])
            scale = yield out
            loss = F.cross_entropy(out * scale, data[k][1])
            optimizer.zero_grad()
            loss.backward()
            yield loss
            optimizer.step()
        yield None

    steps = loop()

    def step(k: int) -> Any:
        out = next(steps)
        return out.detach().sum(), steps.send(1.0 + 0.1 * (k % 3)).detach()

    return step, [net, optimizer]
