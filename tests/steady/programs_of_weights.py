"""Programs that do with weights and gradients what no optimizer does: flat memory, copies, views, own rules of updating."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.steady.programs import Run, Step, batches, mlp, program

Made = tuple[Step, list[Any]]
adam, sgd = torch.optim.Adam, torch.optim.SGD


@program
def flat_parameters(run: Run) -> Made:
    """All parameters are views of one, and so are their gradients."""
    net, data = mlp(), batches()
    flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    grad, start = torch.zeros_like(flat), 0
    for p in net.parameters():
        part = slice(start, start + p.numel())
        p.data, p.grad, start = flat.data[part].view(p.shape), grad[part].view(p.shape), part.stop
    optimizer = run.optimizer(adam, [flat], 0.01)

    def step(k: int) -> Any:
        grad.zero_()
        loss = F.cross_entropy(net(data[k][0]), data[k][1])
        loss.backward()
        grad.div_(2.0)
        flat.grad = grad
        optimizer.step()
        return loss.detach(), flat.detach()[:5].clone()

    return step, [net, flat, grad, optimizer]


@program
def master_weights(run: Run) -> Made:
    """The model is in bfloat16, what is updated in float32."""
    net, data = mlp().bfloat16(), batches()
    masters = [p.detach().clone().float().requires_grad_() for p in net.parameters()]
    optimizer = run.optimizer(adam, masters, 0.01)

    def step(k: int) -> Any:
        loss = F.cross_entropy(net(data[k][0].bfloat16()).float(), data[k][1])
        (loss * 128).backward()
        for master, p in zip(masters, net.parameters(), strict=True):
            master.grad = p.grad.detach().float().div_(128)  # type: ignore[union-attr]
        if k % 4 or all(bool(torch.isfinite(master.grad).all()) for master in masters):  # type: ignore[arg-type]
            optimizer.step()
        for master, p in zip(masters, net.parameters(), strict=True):
            p.data.copy_(master.data)
        net.zero_grad()
        return loss.detach()

    return step, [masters, optimizer]


@program
def optimizers_in_hooks(run: Run) -> Made:
    """Each parameter has an optimizer, which steps as soon as there is its gradient."""
    net, data = mlp(), batches()
    optimizers = {p: adam([p], 0.01, foreach=False) for p in net.parameters()}

    def stepped(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(stepped)

    def step(k: int) -> Any:
        loss = F.cross_entropy(net(data[k][0]), data[k][1])
        loss.backward()
        return loss.detach()

    return step, [net, *optimizers.values()]


@program
def kept_views(run: Run) -> Made:
    """Transposed weights are kept, used in each step and looked at without gradients; every fourth step asks for a graph."""
    first, second = nn.Parameter(torch.randn(16, 8) * 0.3), nn.Parameter(torch.randn(4, 16) * 0.3)
    optimizer, data, views = run.optimizer(sgd, [first, second], 0.1), batches(), [first.t(), second.t()]

    def step(k: int) -> Any:
        hidden = F.dropout(torch.tanh(data[k][0] @ views[0]), 0.2)
        if k % 4 == 2:
            hidden.register_hook(lambda grad: grad * 0.9)
        loss = F.cross_entropy(hidden @ views[1], data[k][1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), [view.detach().sum() for view in views]

    return step, [first, second, optimizer]


@program
def multiplier(run: Run) -> Made:
    """Gradient descent of a model, and ascent of a multiplier that is no parameter."""
    net, lam, data = mlp(), torch.zeros(1, requires_grad=True), batches()
    optimizer, ascent = run.optimizer(sgd, net.parameters(), 0.1), run.optimizer(sgd, [lam], 0.1, maximize=True)

    def step(k: int) -> Any:
        out = net(data[k][0])
        loss = F.cross_entropy(out, data[k][1]) + (F.softplus(lam) * (out.square().mean() - 0.1)).sum()
        optimizer.zero_grad()
        ascent.zero_grad()
        loss.backward()
        optimizer.step()
        ascent.step()
        return loss.detach(), lam.detach().clone()

    return step, [net, lam, optimizer, ascent]


@program
def merged_adapters(run: Run) -> Made:
    """Two factors are trained beside a frozen weight, and merged into it for an evaluation."""
    base, data = nn.Linear(8, 4), batches()
    base.requires_grad_(False)
    down, up = nn.Parameter(torch.randn(2, 8) * 0.1), nn.Parameter(torch.zeros(4, 2))
    optimizer = run.optimizer(adam, [down, up], 0.02)

    def step(k: int) -> Any:
        x, y = data[k]
        loss = F.cross_entropy(base(x) + F.dropout(x, 0.1) @ down.T @ up.T * 2.0, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if k % 3 != 2:
            return loss.detach()
        base.weight.data += 2.0 * up.data @ down.data
        with torch.no_grad():
            right = (base(x).argmax(1) == y).sum().item()
        base.weight.data -= 2.0 * up.data @ down.data
        return loss.detach(), right

    return step, [base, down, up, optimizer]


class Lion(torch.optim.Optimizer):
    """A user's optimizer, which counts in Python."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["average"], state["n"] = torch.zeros_like(p), 0
                state["n"] += 1
                p.data.mul_(1 - group["lr"] * group["decay"])
                update = state["average"].clone().mul_(0.9).add(p.grad, alpha=0.1).sign_()
                p.add_(update, alpha=-group["lr"] / (1 + 0.1 * state["n"]))
                state["average"].mul_(0.99).add_(p.grad, alpha=0.01)


@program
def own_optimizer(run: Run) -> Made:
    net, data = mlp(), batches()
    optimizer = run.optimizer(Lion, net.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.95**epoch)

    def step(k: int) -> Any:
        loss = F.cross_entropy(net(data[k][0]), data[k][1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step, [net, optimizer]


@program
def aliases_of_before(run: Run) -> Made:
    """What was taken before an update without a copy sees the update; a gradient's alias is written behind it."""
    net, data = mlp(), batches()
    optimizer = run.optimizer(sgd, net.parameters(), 0.1, momentum=0.9)

    def step(k: int) -> Any:
        state, datas = net.state_dict(), [p.data for p in net.parameters()]
        loss = F.cross_entropy(net(data[k][0]), data[k][1])
        optimizer.zero_grad()
        loss.backward()
        grads = [p.grad.data for p in net.parameters()]  # type: ignore[union-attr]
        optimizer.step()
        grads[0].mul_(2)
        datas[0].mul_(0.99)
        return loss.detach(), [t.sum() for t in state.values()], next(net.parameters()).grad.clone()  # type: ignore[union-attr]

    return step, [net, optimizer]


@program
def edited_state(run: Run) -> Made:
    """A user resets moments and counts of an optimizer, and empties its state."""
    net, data = mlp(), batches()
    optimizer = run.optimizer(adam, net.parameters(), 0.01)

    def edit(k: int, state: dict[str, Any], p: Tensor) -> None:
        if k == 3:
            state["exp_avg"].mul_(0.5)
        elif k == 5:
            state["exp_avg"] = torch.zeros_like(p)
        elif k == 7:
            state["step"].fill_(0.0)

    def step(k: int) -> Any:
        loss = F.cross_entropy(net(data[k][0]), data[k][1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for p, state in optimizer.state.items():
            edit(k, state, p)
        if k == 9:
            optimizer.state.clear()
        return loss.detach()

    return step, [net, optimizer]


@program
def federated(run: Run) -> Made:
    """Two models are trained, and their average is loaded into both."""
    nets, data = [mlp(), mlp()], batches()
    optimizers = [run.optimizer(adam, net.parameters(), 0.01) for net in nets]

    def step(k: int) -> Any:
        losses = []
        for net, optimizer, (x, y) in zip(nets, optimizers, (data[k], data[k - 1]), strict=True):
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if k % 3 == 1:
            average = copy.deepcopy(nets[0].state_dict())
            for name, other in nets[1].state_dict().items():
                average[name] = torch.div(average[name] + other, 2)
            for net in nets:
                net.load_state_dict(average)
        return losses

    return step, [*nets, *optimizers]
