"""The training steps that are measured: seven models, each full and small, in fp32 or under bf16 autocast.

    workload = make("bert", "cuda", precision="amp")
    loss = workload.step()

Weights and batches are random and made from one seed, without downloads. Small versions run on a CPU in about a second a step.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = Literal["full", "small"]
# Bf16 autocast; 32 bits; 32 bits with convolutions in TF32, which is what torch does by default.
Precision = Literal["amp", "fp32", "tf32"]
Batch = tuple[Tensor, Tensor]


@dataclass
class Workload:
    """One training, ready to step."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch
    loss: Callable[[nn.Module, Batch], Tensor]
    device: torch.device
    precision: Precision

    def step(self) -> Tensor:
        """One step on the resident batch; returns its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "amp"):
            loss = self.loss(self.model, self.batch)
        loss.backward()
        # Before the step, which ends a region: the next one would begin with it.
        kept = loss.detach()
        self.optimizer.step()
        return kept


@dataclass(frozen=True)
class Recipe:
    """How to make a model, its batch and its loss, by size."""

    model: Callable[[Size], nn.Module]
    batch: Callable[[Size, torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


def make(
    name: str,
    device: str | torch.device,
    precision: Precision = "amp",
    size: Size = "full",
    optimizer: Literal["fused", "foreach"] | None = None,
    seed: int = 0,
) -> Workload:
    """A model, its optimizer and a batch. `optimizer` None is AdamW as most people have it: fused for amp on CUDA, else torch's
    default. The random state is seeded last, so that two workloads of one seed draw the same dropout."""
    if name not in RECIPES:
        raise ValueError(f"There is no model {name!r}; choose one of {', '.join(RECIPES)}.")
    device, recipe = torch.device(device), RECIPES[name]
    torch.manual_seed(seed)
    model = recipe.model(size).to(device).train()
    x, y = recipe.batch(size, torch.Generator().manual_seed(seed))
    if optimizer is None and precision == "amp" and device.type == "cuda":
        optimizer = "fused"
    choice: dict[str, Any] = {optimizer: True} if optimizer else {}
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, **choice)
    torch.manual_seed(seed)
    return Workload(name, model, adamw, (x.to(device), y.to(device)), recipe.loss, device, precision)


def make_batches(name: str, device: str | torch.device, n: int, size: Size = "full", seed: int = 0) -> list[Batch]:
    """`n` different batches on the device; the first is that of `make`."""
    batches = []
    for i in range(n):
        x, y = RECIPES[name].batch(size, torch.Generator().manual_seed(seed + i))
        batches.append((x.to(device), y.to(device)))
    return batches


class LeNet(nn.Module):
    """LeNet-5 on 28x28 pictures, with ReLU and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


def _library(name: str, module: str = "") -> Any:
    try:
        return importlib.import_module(module or name)
    except ImportError as error:
        raise RuntimeError(f"This model is taken from {name}, which is not installed: pip install {name}.") from error


def _mlp(size: Size) -> nn.Module:
    widths = (784, 512, 256, 10) if size == "full" else (784, 64, 32, 10)
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _lenet(size: Size) -> nn.Module:
    return LeNet()


def _resnet18(size: Size) -> nn.Module:
    resnet = _library("torchvision", "torchvision.models.resnet")
    layers = [2, 2, 2, 2] if size == "full" else [1, 1, 1, 1]
    model: nn.Module = resnet.ResNet(resnet.BasicBlock, layers, num_classes=10)
    return model


def _resnet50(size: Size) -> nn.Module:
    resnet = _library("torchvision", "torchvision.models.resnet")
    layers = [3, 4, 6, 3] if size == "full" else [1, 1, 1, 1]
    model: nn.Module = resnet.ResNet(resnet.Bottleneck, layers)
    return model


def _vit(size: Size) -> nn.Module:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model: nn.Module = _library("timm").create_model("vit_base_patch16_224", **(small if size == "small" else {}))
    return model


def _bert(size: Size) -> nn.Module:
    transformers = _library("transformers")
    small = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    model: nn.Module = transformers.BertForMaskedLM(transformers.BertConfig(**(small if size == "small" else {})))
    return model


def _gpt2(size: Size) -> nn.Module:
    transformers = _library("transformers")
    small: dict[str, Any] = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    small |= {"bos_token_id": None, "eos_token_id": None}
    # A key-value cache is for generating; its copies would be measured as if training needed them.
    config = transformers.GPT2Config(use_cache=False, loss_type="ForCausalLM", **(small if size == "small" else {}))
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def _images(full: tuple[int, ...], small: tuple[int, ...], n_classes: int) -> Callable[[Size, torch.Generator], Batch]:
    def batch(size: Size, generator: torch.Generator) -> Batch:
        shape = full if size == "full" else small
        return torch.randn(shape, generator=generator), torch.randint(0, n_classes, shape[:1], generator=generator)

    return batch


def _tokens(full: tuple[int, ...], small: tuple[int, ...], vocabulary: int) -> Callable[[Size, torch.Generator], Batch]:
    def batch(size: Size, generator: torch.Generator) -> Batch:
        shape, n = (full, vocabulary) if size == "full" else (small, 512)
        tokens = torch.randint(0, n, shape, generator=generator)
        return tokens, tokens.clone()

    return batch


def _masked(full: tuple[int, ...], small: tuple[int, ...], vocabulary: int) -> Callable[[Size, torch.Generator], Batch]:
    plain = _tokens(full, small, vocabulary)

    def batch(size: Size, generator: torch.Generator) -> Batch:
        tokens, labels = plain(size, generator)
        hidden = torch.rand(tokens.shape, generator=generator) < 0.15
        # 103 is [MASK] in BERT's vocabulary; -100 is a position that the loss leaves out.
        return tokens.masked_fill(hidden, 103), labels.masked_fill(~hidden, -100)

    return batch


def _classes(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _language(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(input_ids=batch[0], labels=batch[1]).loss
    return loss


RECIPES = {
    "mlp": Recipe(_mlp, _images((64, 784), (8, 784), 10), _classes),
    "lenet": Recipe(_lenet, _images((64, 1, 28, 28), (4, 1, 28, 28), 10), _classes),
    "resnet18": Recipe(_resnet18, _images((128, 3, 32, 32), (4, 3, 32, 32), 10), _classes),
    "resnet50": Recipe(_resnet50, _images((64, 3, 224, 224), (4, 3, 32, 32), 1000), _classes),
    "vit": Recipe(_vit, _images((64, 3, 224, 224), (4, 3, 32, 32), 1000), _classes),
    "bert": Recipe(_bert, _masked((32, 128), (4, 16), 30522), _language),
    "gpt2": Recipe(_gpt2, _tokens((8, 1024), (2, 64), 50257), _language),
}
MODELS = tuple(RECIPES)
