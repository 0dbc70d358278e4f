"""What programs change in mid-training, for `mixed.py`: each is called before a step, and again some steps later."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.steady.mixed_losses import LOSSES, WAYS
from tests.steady.mixed_models import SCALES

# Of a training, and whether it is undone.
CHANGES: dict[str, Callable[[Any, bool], None]] = {}


def change(make: Any) -> Any:
    CHANGES[make.__name__.strip("_")] = make
    return make


def some(t: Any) -> list[nn.Parameter]:
    return list(t.net.parameters())[::2]


def last_linear(t: Any) -> nn.Linear:
    return [m for m in t.net.modules() if type(m) is nn.Linear][-1]


@change
def frozen(t: Any, undo: bool) -> None:
    for p in some(t):
        p.requires_grad_(undo)


@change
def frozen_without_gradients(t: Any, undo: bool) -> None:
    for p in list(t.net.parameters())[:2]:
        p.requires_grad, p.grad = undo, None


@change
def another_loss(t: Any, undo: bool) -> None:
    t.given = LOSSES["cross_entropy" if undo else "squares"]


@change
def another_way(t: Any, undo: bool) -> None:
    t.way = WAYS["usual" if undo else "accumulated"]


@change
def smaller_batches(t: Any, undo: bool) -> None:
    t.n = 6 if undo else 5


@change
def doubles(t: Any, undo: bool) -> None:
    t.dtype = torch.float32 if undo else torch.float64
    t.net.to(t.dtype)


@change
def another_group(t: Any, undo: bool) -> None:
    if not undo:
        t.extra = nn.Parameter(torch.zeros(4))
        t.optimizer.add_param_group({"params": [t.extra], "lr": 0.2})
        last_linear(t).register_forward_hook(lambda module, args, out: out + t.extra)


@change
def edited_groups(t: Any, undo: bool) -> None:
    for group in t.optimizer.param_groups:
        group["lr"] *= 2 if undo else 0.5
        group["weight_decay"] = 0.0 if undo else 0.1


@change
def fewer_in_the_group(t: Any, undo: bool) -> None:
    group = t.optimizer.param_groups[0]
    if undo:
        group["params"].extend(t.notes.pop("left out", []))
    else:
        t.notes["left out"], group["params"] = group["params"][:1], group["params"][1:]


@change
def restored(t: Any, undo: bool) -> None:
    """From the state of some steps before."""
    if undo:
        saved, net, optimizer = t.notes.pop("saved")
        t.net.load_state_dict(net)
        if t.optimizer is saved:
            t.optimizer.load_state_dict(optimizer)
    else:
        t.notes["saved"] = t.optimizer, *copy.deepcopy((t.net.state_dict(), t.optimizer.state_dict()))


@change
def saved_to_a_file(t: Any, undo: bool) -> None:
    file = io.BytesIO()
    torch.save([t.net.state_dict(), t.optimizer.state_dict()], file)
    file.seek(0)
    net, optimizer = torch.load(file)
    t.net.load_state_dict({name: value + 0.01 if value.is_floating_point() else value for name, value in net.items()})
    t.optimizer.load_state_dict(optimizer)


@change
def evaluating(t: Any, undo: bool) -> None:
    t.net.train(undo)


@change
def half_evaluating(t: Any, undo: bool) -> None:
    for module in list(t.net.modules())[1::2]:
        module.train(undo)


@change
def another_layer(t: Any, undo: bool) -> None:
    last = last_linear(t)
    fresh = nn.Linear(last.in_features, last.out_features, bias=undo)
    for module in t.net.modules():
        for name, child in module.named_children():
            if child is last:
                setattr(module, name, fresh)
    t.optimizer.add_param_group({"params": list(fresh.parameters())})


@change
def another_parameter(t: Any, undo: bool) -> None:
    """Which the optimizer is not told of."""
    last = last_linear(t)
    last.weight = nn.Parameter(last.weight.detach() * 0.9)


@change
def other_data(t: Any, undo: bool) -> None:
    last = last_linear(t)
    last.weight.data = last.weight.data.clone().mul_(1.1)
    last.weight.data.add_(0.01)


@change
def written(t: Any, undo: bool) -> None:
    with torch.no_grad():
        for p in some(t):
            p.copy_(p * 0.5 + 0.1)
        last_linear(t).weight[0].zero_()


@change
def no_bias(t: Any, undo: bool) -> None:
    if not undo:
        last_linear(t).bias = None


@change
def hooked(t: Any, undo: bool) -> None:
    """A forward hook that changes what comes."""
    if undo:
        t.notes.pop("handle").remove()
    else:
        t.notes["handle"] = t.net.register_forward_hook(lambda module, args, out: out * 1.5)


@change
def hooked_backward(t: Any, undo: bool) -> None:
    if undo:
        t.notes.pop("backward handle").remove()
    else:
        hook: Any = lambda module, before, after: (None if before[0] is None else before[0] * 0.5,)  # noqa: E731
        t.notes["backward handle"] = last_linear(t).register_full_backward_hook(hook)


@change
def hooked_parameters(t: Any, undo: bool) -> None:
    if undo:
        for handle in t.notes.pop("handles"):
            handle.remove()
    else:
        t.notes["handles"] = [p.register_hook(lambda grad: grad * 2) for p in some(t) if p.requires_grad]


@change
def hooked_accumulation(t: Any, undo: bool) -> None:
    def halve(p: Tensor) -> None:
        if p.grad is not None and not p.grad.is_sparse:
            p.grad.mul_(0.5)

    if undo:
        for handle in t.notes.pop("after handles"):
            handle.remove()
    else:
        t.notes["after handles"] = [p.register_post_accumulate_grad_hook(halve) for p in some(t) if p.requires_grad]


@change
def hooked_optimizer(t: Any, undo: bool) -> None:
    def pre(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and not p.grad.is_sparse:
                    p.grad.clamp_(-0.01, 0.01)

    if undo:
        t.notes.pop("step handle").remove()
    else:
        t.notes["step handle"] = t.optimizer.register_step_pre_hook(pre)


@change
def attribute(t: Any, undo: bool) -> None:
    for module in t.net.modules():
        for name, value in (
            ("factor", 1.0 if undo else 2.0),
            ("power", 1 if undo else 2),
            ("p", 0.1 if undo else 0.4),
            ("eps", 1e-5 if undo else 1e-2),
        ):
            if name in vars(module) or hasattr(type(module), name):
                setattr(module, name, value)


@change
def closure_variable(t: Any, undo: bool) -> None:
    t.scale = 1.0 if undo else 3.0


@change
def closure_flag(t: Any, undo: bool) -> None:
    t.negate = not undo


@change
def global_(t: Any, undo: bool) -> None:
    SCALES["global"] = 1.0 if undo else 0.7


@change
def default_argument(t: Any, undo: bool) -> None:
    kind = type(t.net)
    if "between" in vars(kind) and kind.between.__defaults__:
        kind.between.__defaults__ = (0.5 if undo else 0.25,)


@change
def replaced_function(t: Any, undo: bool) -> None:
    """Of torch.nn.functional, by one that calls it."""
    if undo:
        F.linear, F.cross_entropy = t.notes.pop("functions")
    else:
        linear, entropy = t.notes["functions"] = F.linear, F.cross_entropy
        F.linear = lambda x, w, b=None: linear(x, w, b) * 1.25
        F.cross_entropy = lambda *args, **kwargs: entropy(*args, **kwargs) * 2


@change
def replaced_forward(t: Any, undo: bool) -> None:
    """Of a module, and of a class."""
    last = last_linear(t)
    if undo:
        vars(last).pop("forward", None)
        nn.Tanh.forward = t.notes.pop("forward")
    else:
        t.notes["forward"] = nn.Tanh.forward
        nn.Tanh.forward = lambda self, x: torch.sin(x)
        last.forward = lambda x: F.linear(x, last.weight) + 0.5


@change
def another_optimizer(t: Any, undo: bool) -> None:
    kind = torch.optim.SGD if undo else torch.optim.RMSprop
    t.optimizer = t.run.optimizer(kind, list(t.net.parameters()), 0.01)


@change
def averaged(t: Any, undo: bool) -> None:
    """A copy of the model whose weights follow."""
    if undo:
        t.net, t.averaged = t.averaged or t.net, None
        t.optimizer = t.run.optimizer(torch.optim.SGD, list(t.net.parameters()), 0.01)
    else:
        t.averaged = copy.deepcopy(t.net)


@change
def seeded(t: Any, undo: bool) -> None:
    torch.manual_seed(7)


@change
def without_gradients(t: Any, undo: bool) -> None:
    """Steps without any: what is trained is not."""
    torch.set_grad_enabled(undo)


@change
def tied_late(t: Any, undo: bool) -> None:
    layers = [m for m in t.net.modules() if type(m) is nn.Linear]
    for a in layers:
        for b in layers:
            if a is not b and a.weight.shape == b.weight.shape:
                a.weight = nn.Parameter(b.weight.detach().clone()) if undo else b.weight
                return


@change
def gradients_by_zeros(t: Any, undo: bool) -> None:
    for p in t.net.parameters():
        p.grad = None if undo else torch.zeros_like(p)


@change
def another_library(t: Any, undo: bool) -> None:
    torch._C._set_mkldnn_enabled(undo)


@change
def momentum(t: Any, undo: bool) -> None:
    for group in t.optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (0.9, 0.999) if undo else (0.8, 0.99)
        if "momentum" in group:
            group["momentum"] = 0.9 if undo else 0.0


@change
def forgotten_state(t: Any, undo: bool) -> None:
    t.optimizer.state.clear()


@change
def pruned(t: Any, undo: bool) -> None:
    from torch.nn.utils import prune

    last = last_linear(t)
    if undo:
        if prune.is_pruned(last):
            prune.remove(last, "weight")
    else:
        prune.l1_unstructured(last, "weight", 0.3)


@change
def channels_last(t: Any, undo: bool) -> None:
    t.net.to(memory_format=torch.contiguous_format if undo else torch.channels_last)


@change
def swapped_layers(t: Any, undo: bool) -> None:
    """Two layers change places."""
    layers = [m for m in t.net.modules() if type(m) is nn.Linear]
    if len(layers) > 1:
        for name in ("weight", "bias"):
            a, b = getattr(layers[0], name), getattr(layers[-1], name)
            if a is not None and b is not None and a.shape == b.shape:
                setattr(layers[0], name, b)
                setattr(layers[-1], name, a)
