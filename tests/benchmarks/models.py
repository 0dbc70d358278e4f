"""The models that the documents measure: an MLP and LeNet on 28x28 pictures, ResNet-18 on 32x32 ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import LeNet


def create_mlp(num_classes: int = 10, dropout: float = 0.2) -> nn.Module:
    """784-512-256-10, with ReLU and dropout."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(256, num_classes),
    )


def create_lenet() -> nn.Module:
    """LeNet-5 for ten classes."""
    return LeNet()


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def create_resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 with the first layer for small pictures: 3x3, and no pooling behind it."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    n_in = 64
    for n_out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(n_in, n_out, stride), Block(n_out, n_out, 1)]
        n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


# The models by name, and the size of their pictures.
MODELS = {"mlp": (create_mlp, (1, 28, 28)), "lenet": (create_lenet, (1, 28, 28)), "resnet18": (create_resnet18, (3, 32, 32))}


def parameters_of(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def example(size: tuple[int, ...], batch_size: int = 2) -> Tensor:
    """A batch of random pictures."""
    return torch.randn(batch_size, *size)
