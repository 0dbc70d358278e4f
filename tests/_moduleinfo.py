"""Samples of torch's databases of modules and of optimizers, with what a sample of an operator offers."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from tests import _opinfo

STEPS = 6


@functools.cache
def modules() -> dict[str, Any]:
    _opinfo.names()  # it undoes what an import of the databases does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db
    return {f"module/{info.name}": info for info in module_db}


@functools.cache
def optimizers() -> dict[str, Any]:
    _opinfo.names()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_optimizers import optim_db
    return {f"optimizer/{info.optim_cls.__name__}": info for info in optim_db}


@dataclass(frozen=True)
class ModuleSample:
    """A call of a module; ``inputs`` is (module, args, kwargs)."""

    name: str
    dtype: torch.dtype
    inputs: tuple[Any, ...]

    def call(self) -> Any:
        return self.inputs[0](*self.inputs[1], **self.inputs[2])

    def tensors(self) -> list[torch.Tensor]:
        module = self.inputs[0]
        leaves = [t for t in tree_leaves(self.inputs[1:]) if isinstance(t, torch.Tensor)]
        return [*module.parameters(), *module.buffers(), *leaves]

    def loss_of(self, outputs: Any) -> Any:
        return outputs

    def fresh(self, moved: bool = False) -> ModuleSample:
        module, *given = self.inputs
        return replace(self, inputs=(copy.deepcopy(module), *_opinfo.copies(given, moved)))


def module_samples(name: str, device: str, dtype: torch.dtype) -> Iterator[ModuleSample]:
    info = modules()[name]
    if dtype not in info.supported_dtypes(device):
        return
    for training in (True, False) if info.train_and_eval_differ else (True,):
        _opinfo.reseed()
        for found in info.module_inputs_func(info, device, dtype, requires_grad=True, training=training):
            if found.forward_input is not None:
                made = found.constructor_input
                module = info.module_cls(*made.args, **made.kwargs).to(device, dtype).train(training)
                yield ModuleSample(name, dtype, (module, tuple(found.forward_input.args), dict(found.forward_input.kwargs)))


@dataclass(frozen=True)
class OptimizerSample:
    """Six steps of an optimizer on a small model, with what an optimizer's test of torch's own gives it."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    model: nn.Module
    batch: torch.Tensor

    def call(self) -> Any:
        trained = list(self.model.parameters())
        kind = optimizers()[self.name].optim_cls
        optimizer = kind([p for p in trained if p.dim() == 2] if kind.__name__ == "Muon" else trained, **self.options)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).detach() for _ in range(STEPS)]
        return losses, [p.grad for p in trained], optimizer.state_dict()

    def loss(self) -> torch.Tensor:
        out: torch.Tensor = self.model(self.batch)
        return out.square().mean()

    def tensors(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), self.batch]

    def loss_of(self, outputs: Any) -> Any:
        return ()

    def fresh(self, moved: bool = False) -> OptimizerSample:
        [batch] = _opinfo.copies([self.batch], moved)
        options = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, self.options)
        return replace(self, model=copy.deepcopy(self.model), batch=batch, options=options)


def optimizer_samples(name: str, device: str, dtype: torch.dtype) -> Iterator[OptimizerSample]:
    info = optimizers()[name]
    if dtype not in (torch.float32, torch.float64):
        return
    _opinfo.reseed()
    if name == "optimizer/SparseAdam":
        model: nn.Module = nn.Embedding(8, 4, sparse=True)
        batch = torch.tensor([1, 5, 1, 2])
    else:
        model, batch = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(4, 5, dtype=dtype)
    for found in info.optim_inputs_func(device=device):
        # By default it evaluates its closure 20 times in a step.
        fewer = {"max_iter": 3} if name == "optimizer/LBFGS" else {}
        yield OptimizerSample(name, dtype, {**found.kwargs, **fewer}, model.to(device, dtype), batch)
