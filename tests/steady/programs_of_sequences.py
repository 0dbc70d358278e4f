"""Recurrent networks, agents and what else goes through a sequence."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from tests.steady.programs import STEPS, Run, Step, batches, mlp, program

Adam, SGD = torch.optim.Adam, torch.optim.SGD
Made = tuple[Step, list[Any]]


@program
def truncated_backpropagation(run: Run) -> Made:
    """A state that goes from step to step, detached in place."""
    cell, head = nn.GRUCell(4, 8), nn.Linear(8, 3)
    optimizer = run.optimizer(SGD, [*cell.parameters(), *head.parameters()], 0.1)
    data, targets, state = torch.randn(STEPS, 3, 2, 4), torch.randint(0, 3, (STEPS, 3, 2)), [torch.zeros(2, 8)]

    def step(k: int) -> Any:
        h, loss = state[0], torch.zeros(())
        for x, target in zip(data[k], targets[k], strict=True):
            h = cell(x, h)
            loss = loss + F.cross_entropy(head(h), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state[0] = h.detach_()
        return loss.detach()

    return step, [cell, head, optimizer, state]


@program
def teacher_forcing(run: Run) -> Made:
    """By a coin of Python's."""
    net = nn.ModuleList([nn.Embedding(7, 8), nn.GRUCell(8, 8), nn.Linear(8, 7)])
    optimizer, data = run.optimizer(Adam, net.parameters(), 0.02), torch.randint(0, 7, (STEPS, 3, 4))

    def step(k: int) -> Any:
        h, token, loss = torch.zeros(3, 8), data[k][:, 0], torch.zeros(())
        for true in data[k].t()[1:]:
            h = net[1](net[0](token), h)
            told = net[2](h)
            loss = loss + F.cross_entropy(told, true)
            token = true if random.random() < 0.8 else told.argmax(1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, [net, optimizer]


@program
def longer_and_longer(run: Run) -> Made:
    """Sequences that grow, in a layer that has the batch first."""
    net = nn.ModuleList([nn.Embedding(9, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 9)])
    optimizer, data = run.optimizer(Adam, net.parameters(), 0.01), torch.randint(0, 9, (STEPS, 3, 7))

    def step(k: int) -> Any:
        tokens = data[k][:, : 3 + 2 * (k // 6)]
        told = net[2](net[1](net[0](tokens[:, :-1]))[0])
        loss = F.cross_entropy(told.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, [net, optimizer]


@program
def proximal_policy(run: Run) -> Made:
    """Several epochs over one rollout, cut short by a number that is read."""
    net = nn.ModuleList([mlp(), mlp(1)])
    optimizer = run.optimizer(Adam, net.parameters(), 0.01)

    def update(of: list[Tensor]) -> tuple[Tensor, Tensor]:
        x, action, old, advantage, wanted = of
        policy = Categorical(logits=net[0](x))
        ratio = (policy.log_prob(action) - old).exp()
        loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        loss = loss + 0.5 * F.mse_loss(net[1](x)[:, 0], wanted) - 0.01 * policy.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        return loss.detach(), (old - policy.log_prob(action)).mean().detach()

    def step(k: int) -> Any:
        x = torch.randn(8, 8)
        with torch.no_grad():
            policy, value = Categorical(logits=net[0](x)), net[1](x)[:, 0]
            action = policy.sample()
            advantage = (action == 2).float() - value
        rollout = [x, action, policy.log_prob(action), advantage / (advantage.std() + 1e-8), advantage + value]
        losses = []
        for _ in range(3):
            for chosen in torch.randperm(8).split(4):
                loss, apart = update([t[chosen] for t in rollout])
                losses.append(loss)
            if apart.item() > 0.02:
                break
        return losses

    return step, [net, optimizer]


@program
def q_learning(run: Run) -> Made:
    """A replay buffer that is a ring, and a target network that follows now and then."""
    net, target = mlp(), mlp()
    optimizer, at = run.optimizer(Adam, net.parameters(), 0.01), [0]
    states, actions, rewards = torch.zeros(20, 8), torch.zeros(20, dtype=torch.long), torch.zeros(20)
    now = [torch.randn(8)]

    def act() -> None:
        with torch.no_grad():
            greedy = random.random() > 0.3
            action = net(now[0][None]).argmax(1)[0] if greedy else torch.tensor(random.randrange(4))
        place = at[0] % 20
        states[place], actions[place], rewards[place] = now[0], action, now[0][0] * action
        now[0] = torch.sin(now[0] + action)
        at[0] += 1

    def step(k: int) -> Any:
        for _ in range(3):
            act()
        chosen = torch.randint(0, min(at[0], 20) - 1, (5,))
        with torch.no_grad():
            wanted = rewards[chosen] + 0.9 * target(states[chosen + 1]).amax(1)
        loss = F.smooth_l1_loss(net(states[chosen]).gather(1, actions[chosen][:, None])[:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if k % 4 == 3:
            target.load_state_dict(net.state_dict())
        return loss.detach()

    return step, [net, target, optimizer, states, actions, rewards, now]


@program
def beam_search(run: Run) -> Made:
    """It ends when all beams have ended."""
    net = nn.ModuleList([nn.Embedding(9, 8), nn.GRUCell(8, 8), nn.Linear(8, 9)])

    def step(k: int) -> Any:
        with torch.no_grad():
            h, tokens, score = torch.randn(1, 8).expand(3, 8), torch.full((3, 1), k % 9), torch.tensor([0.0, -1e9, -1e9])
            for _ in range(4):
                h = net[1](net[0](tokens[:, -1]), h)
                score, best = (net[2](h).log_softmax(-1) + score[:, None]).view(-1).topk(3)
                tokens, h = torch.cat([tokens[best // 9], (best % 9)[:, None]], 1), h[best // 9]
                if (tokens[:, -1] == 0).all():
                    break
        return tokens, score

    return step, [net]


@program
def cached_attention(run: Run) -> Made:
    """Keys and values in a ring that is rolled, and at a position that is a tensor."""
    qkv, position = nn.Linear(8, 24), torch.zeros((), dtype=torch.long)
    keys, values, data = torch.zeros(2, 4, 8), torch.zeros(2, 8, 8), torch.randn(STEPS, 2, 8)

    def step(k: int) -> Any:
        with torch.no_grad():
            q, key, value = qkv(data[k]).chunk(3, -1)
            keys.copy_(torch.roll(keys, -1, 1))
            keys[:, -1] = key
            values.index_copy_(1, position.view(1), value[:, None])
            position.add_(1).remainder_(8)
            seen = (q[:, None] @ keys.transpose(1, 2)).softmax(-1) @ values[:, :4]
        return seen, seen.sum().item()

    return step, [qkv, keys, values, position]


@program
def noisy_steps(run: Run) -> Made:
    """Denoising with weights that are averaged, and samples now and then."""
    net, average = mlp(8, 16, 9), {k: v.detach().clone() for k, v in mlp(8, 16, 9).state_dict().items()}
    beta, optimizer, data = torch.linspace(1e-3, 0.02, 50), run.optimizer(torch.optim.AdamW, net.parameters(), 0.01), batches()
    kept = (1 - beta).cumprod(0)

    def step(k: int) -> Any:
        x, at = data[k][0], torch.randint(0, 50, (6,))
        noise, signal = torch.randn_like(x), kept[at][:, None]
        noisy = torch.cat([signal.sqrt() * x + (1 - signal).sqrt() * noise, at[:, None].float() / 50], 1)
        loss = F.mse_loss(net(noisy), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, value in net.state_dict().items():
                average[name].lerp_(value, 0.1)
            z = torch.randn(2, 8)
            for t in (40, 20) if k % 5 == 4 else ():
                z = z - beta[t] * net(torch.cat([z, torch.full((2, 1), t / 50)], 1)) + beta[t].sqrt() * torch.randn_like(z)
        return loss.detach(), z

    return step, [net, average, optimizer]
