"""Losses for `mixed.py`, of what a model gives (n x 4) and classes (n), and the ways in which a step is made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
# Of a training, the batch, and what was given, the classes.
LOSSES: dict[str, Loss] = {}
# Of a training and a batch; returns what the program looks at.
WAYS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {}


def loss(make: Loss) -> Loss:
    LOSSES[make.__name__] = make
    return make


def way(make: Any) -> Any:
    WAYS[make.__name__] = make
    return make


SHORT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
    "weighted": lambda out, y: F.cross_entropy(out, y, weight=torch.tensor([1.0, 2.0, 0.5, 1.0]).to(out), ignore_index=2),
    "soft_targets": lambda out, y: F.cross_entropy(out, F.one_hot(y, 4).to(out) * 0.8 + 0.05),
    "nll": lambda out, y: F.nll_loss(out.log_softmax(1), y, reduction="none").mean(),
    "squares": lambda out, y: F.mse_loss(out, F.one_hot(y, 4).to(out)),
    "huber": lambda out, y: F.huber_loss(out, F.one_hot(y, 4).to(out), delta=0.5),
    "smooth_l1": lambda out, y: F.smooth_l1_loss(out[:, 0], y.to(out)),
    "logits": lambda out, y: F.binary_cross_entropy_with_logits(
        out, F.one_hot(y, 4).to(out), pos_weight=torch.ones(4).to(out) * 2
    ),
    "divergence": lambda out, y: F.kl_div(out.log_softmax(1), F.one_hot(y, 4).to(out).softmax(1), reduction="batchmean"),
    "margins": lambda out, y: F.multi_margin_loss(out, y) + F.margin_ranking_loss(out[:, 0], out[:, 1], (y > 1).to(out) * 2 - 1),
    "triplets": lambda out, y: F.triplet_margin_loss(out, out.roll(1, 0), out.flip(0), margin=1.0),
    "cosines": lambda out, y: F.cosine_embedding_loss(out, out.roll(1, 0), (y > 1).to(out) * 2 - 1, margin=0.1),
    "poisson": lambda out, y: (
        F.poisson_nll_loss(out[:, 0], y.to(out)) + F.gaussian_nll_loss(out[:, 1], y.to(out), out[:, 2].exp())
    ),
    "focal": lambda out, y: (
        (1 - out.softmax(1).gather(1, y[:, None])) ** 2 * F.nll_loss(out.log_softmax(1), y, reduction="none")
    ).mean(),
    "dice": lambda out, y: 1 - 2 * (out.softmax(1) * F.one_hot(y, 4)).sum() / (out.softmax(1).sum() + len(y)),
    "contrastive": lambda out, y: F.cross_entropy(F.normalize(out) @ F.normalize(out).t() / 0.1, torch.arange(len(out))),
    "pinball": lambda out, y: (
        torch.maximum(0.3 * (y.to(out) - out[:, 0]), -0.7 * (y.to(out) - out[:, 0])).mean() + out[:, 1:].var()
    ),
    "list": lambda out, y: sum([out[:, k].square().mean() * (k + 1) for k in range(4)]),
    "masked_mean": lambda out, y: out[y != 0].square().sum() / (y != 0).sum().clamp(min=1),
    "doubled": lambda out, y: (
        (out.double() - y.double()[:, None]).abs().mean().float() if out.is_floating_point() else out.abs().sum()
    ),
    "entropy": lambda out, y: (
        torch.distributions.Categorical(logits=out).entropy().mean() + F.cross_entropy(out, y, reduction="sum") / 7
    ),
    "policy": lambda out, y: -(torch.distributions.Normal(out[:, 0], out[:, 1].exp()).log_prob(y.to(out))).mean(),
    "sampled": lambda out, y: torch.distributions.Normal(out[:, :2], F.softplus(out[:, 2:]) + 0.1).rsample().square().mean(),
    "determinant": lambda out, y: -torch.logdet(out.t() @ out / len(out) + torch.eye(4).to(out)),
    "worst": lambda out, y: F.cross_entropy(out, y, reduction="none").topk(3).values.mean(),
    "correct": lambda out, y: out.square().mean() if bool((out.argmax(1) == y).any()) else out.abs().mean(),
}
LOSSES |= {name: lambda t, x, out, y, of=of: of(out, y) for name, of in SHORT.items()}


@loss
def sequence(t: Any, x: Tensor, out: Tensor, y: Tensor) -> Tensor:
    """Connectionist temporal classification of the batch as one sequence."""
    return F.ctc_loss(out.log_softmax(1)[:, None], torch.tensor([[1, 2]]), torch.tensor([len(out)]), torch.tensor([2]))


@loss
def decayed(t: Any, x: Tensor, out: Tensor, y: Tensor) -> Tensor:
    """With the weights' own squares and sizes."""
    sizes = (
        sum(p.square().sum() for p in t.net.parameters()) * 1e-3
        + sum(p.abs().sum() for p in t.net.parameters() if p.ndim > 1) * 1e-4
    )
    return F.cross_entropy(out, y) + sizes


@loss
def penalised(t: Any, x: Tensor, out: Tensor, y: Tensor) -> Tensor:
    """A penalty on the gradient of what the model gives."""
    seen = x.detach().clone().requires_grad_()
    slope = torch.autograd.grad(t.net(seen).square().sum(), seen, create_graph=True, allow_unused=True)[0]
    return F.cross_entropy(out, y) + (0 if slope is None else (slope.norm(dim=1) - 1).square().mean())


@loss
def consistent(t: Any, x: Tensor, out: Tensor, y: Tensor) -> Tensor:
    """Two passes agree, one of them without gradients."""
    with torch.no_grad():
        other = t.net(x + 0.1 * torch.randn_like(x))
    return F.cross_entropy(out, y) + F.mse_loss(out, other)


@loss
def adaptive(t: Any, x: Tensor, out: Tensor, y: Tensor) -> Tensor:
    """An object of a class, with Python state: the weight of a term is what the last loss was."""
    scale = t.notes.get("last", 1.0)
    found = F.cross_entropy(out, y) + min(scale, 2.0) * out.square().mean()
    t.notes["last"] = found.item()
    return found


def given(t: Any, x: Tensor, y: Tensor) -> Tensor:
    return t.loss(t, x, t.net(x), y)


@way
def usual(t: Any, x: Tensor, y: Tensor) -> Any:
    loss = given(t, x, y)
    t.optimizer.zero_grad()
    loss.backward()
    t.optimizer.step()
    return loss.detach()


@way
def in_place_zeros(t: Any, x: Tensor, y: Tensor) -> Any:
    t.optimizer.zero_grad(set_to_none=False)
    loss = given(t, x, y)
    loss.backward()
    t.optimizer.step()
    return loss.item()


@way
def zeros_last(t: Any, x: Tensor, y: Tensor) -> Any:
    loss = given(t, x, y)
    loss.backward()
    t.optimizer.step()
    t.net.zero_grad()
    return loss


@way
def accumulated(t: Any, x: Tensor, y: Tensor) -> Any:
    """Over one to three batches."""
    loss = given(t, x, y) / 2
    loss.backward()
    t.notes["n"] = t.notes.get("n", 0) + 1
    if t.k % 5 in (0, 2, 3):
        t.optimizer.step()
        t.optimizer.zero_grad()
    return loss.detach()


@way
def twice_backward(t: Any, x: Tensor, y: Tensor) -> Any:
    loss = given(t, x, y)
    t.optimizer.zero_grad()
    loss.backward(retain_graph=True)
    (loss * 0.5).backward()
    t.optimizer.step()
    return loss.detach()


@way
def losses_apart(t: Any, x: Tensor, y: Tensor) -> Any:
    """Two losses of one pass, each with a backward."""
    out = t.net(x)
    t.optimizer.zero_grad()
    losses = [t.loss(t, x, out, y), out.square().mean()]
    losses[0].backward(retain_graph=True)
    kept = [None if p.grad is None else p.grad.clone() for p in t.net.parameters()]
    losses[1].backward()
    t.optimizer.step()
    return losses[0].detach(), kept


@way
def by_hand(t: Any, x: Tensor, y: Tensor) -> Any:
    """Gradients are asked for, and put where the optimizer finds them."""
    parameters = [p for p in t.net.parameters() if p.requires_grad]
    loss = given(t, x, y)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    t.optimizer.step()
    return loss.detach(), [grad is None for grad in grads]


@way
def without_optimizer(t: Any, x: Tensor, y: Tensor) -> Any:
    loss = given(t, x, y)
    loss.backward()
    with torch.no_grad():
        for p in t.net.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad if not p.grad.is_sparse else 0.05 * p.grad.to_dense()
                p.grad = None
    return loss.detach()


@way
def closed_over(t: Any, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        t.optimizer.zero_grad()
        loss = given(t, x, y)
        loss.backward()
        return loss

    return t.optimizer.step(closure)


@way
def clipped(t: Any, x: Tensor, y: Tensor) -> Any:
    loss = given(t, x, y)
    t.optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(t.net.parameters(), 0.3)
    nn.utils.clip_grad_value_(t.net.parameters(), 0.05)
    t.optimizer.step()
    return loss.detach(), norm


@way
def edited(t: Any, x: Tensor, y: Tensor) -> Any:
    """Gradients are changed by hand before they are used: in place, by others, and by none."""
    loss = given(t, x, y)
    t.optimizer.zero_grad()
    loss.backward()
    for i, p in enumerate(t.net.parameters()):
        if p.grad is None or p.grad.is_sparse:
            continue
        if i % 3 == 0:
            p.grad = p.grad.sign() * 0.01
        elif i % 3 == 1:
            p.grad.mul_(0.5).nan_to_num_()
        elif t.k % 4 == 3:
            p.grad = None
    t.optimizer.step()
    return loss.detach()


@way
def surgery(t: Any, x: Tensor, y: Tensor) -> Any:
    """The gradient of one loss is projected where it goes against that of another."""
    out = t.net(x)
    parameters = [p for p in t.net.parameters() if p.requires_grad]
    pairs = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in (t.loss(t, x, out, y), out.abs().mean())
    ]
    for p, a, b in zip(parameters, *pairs, strict=True):
        if a is None or b is None:
            p.grad = a
        else:
            a, b = (g.to_dense() if g.is_sparse else g for g in (a, b))
            dot = (a * b).sum()
            p.grad = (a - dot / b.square().sum().clamp(min=1e-6) * b if dot < 0 else a) + b
    t.optimizer.step()
    return out.detach()


@way
def of_vectors(t: Any, x: Tensor, y: Tensor) -> Any:
    """From what the model gives, with a gradient for it."""
    out = t.net(x)
    loss = t.loss(t, x, out, y)
    t.optimizer.zero_grad()
    torch.autograd.backward([loss, out], [None, torch.full_like(out, 0.01)])
    t.optimizer.step()
    return loss.detach(), out.detach()


@way
def two_passes(t: Any, x: Tensor, y: Tensor) -> Any:
    """Up along the gradient, and down with the gradient from there."""
    given(t, x, y).backward()
    with torch.no_grad():
        moved = {p: p.grad * 0.05 for p in t.net.parameters() if p.grad is not None and not p.grad.is_sparse}
        for p, by in moved.items():
            p.add_(by)
    t.optimizer.zero_grad()
    loss = given(t, x, y)
    loss.backward()
    with torch.no_grad():
        for p, by in moved.items():
            p.sub_(by)
    t.optimizer.step()
    t.optimizer.zero_grad()
    return loss.detach()


@way
def logged(t: Any, x: Tensor, y: Tensor) -> Any:
    """Much is looked at on the way."""
    out = t.net(x)
    loss = t.loss(t, x, out, y)
    seen = [float(loss), str(out.detach()[0]), (out.argmax(1) == y).float().mean().item(), out.detach().numpy().sum(0).tolist()]
    t.optimizer.zero_grad()
    loss.backward()
    seen += [float(p.grad.norm()) for p in t.net.parameters() if p.grad is not None and not p.grad.is_sparse]
    t.optimizer.step()
    return seen


@way
def in_bfloat16(t: Any, x: Tensor, y: Tensor) -> Any:
    """autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        out = t.net(x)
    loss = t.loss(t, x, out.float(), y)
    t.optimizer.zero_grad()
    loss.backward()
    t.optimizer.step()
    return loss.detach(), out.detach()


@way
def with_an_error(t: Any, x: Tensor, y: Tensor) -> Any:
    """Every fourth step ends early, with an exception."""
    t.optimizer.zero_grad()
    out = t.net(x)
    with contextlib.suppress(ValueError, RuntimeError):
        if t.k % 4 == 1:
            raise ValueError("the program's")
        loss = t.loss(t, x, out, y)
        if t.k % 4 == 2:
            out @ out
        loss.backward()
        if t.k % 8 == 3:
            loss.backward()
        t.optimizer.step()
    return out.detach()


@way
def parts_of_it(t: Any, x: Tensor, y: Tensor) -> Any:
    """The gradients of some of the parameters only, with those of the batch."""
    x = x.detach().requires_grad_()
    loss = given(t, x, y)
    t.optimizer.zero_grad()
    some = [p for p in t.net.parameters() if p.requires_grad][t.k % 2 :: 2]
    loss.backward(inputs=[*some, x])
    t.optimizer.step()
    return loss.detach(), x.grad


@way
def evaluated(t: Any, x: Tensor, y: Tensor) -> Any:
    """An evaluation every third step, and a look at the graph."""
    loss = given(t, x, y)
    t.optimizer.zero_grad()
    loss.backward()
    t.optimizer.step()
    if t.k % 3 == 2:
        t.net.eval()
        with torch.inference_mode():
            seen = t.net(x)
        t.net.train()
        return loss.detach(), seen.clone(), seen.argmax(1).tolist()
    return loss.detach(), loss.requires_grad
