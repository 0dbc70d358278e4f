"""Other layouts on a GPU: at sizes where they pay, steps are no further from float64 than eager's are, and gradients lie as in
eager."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kitsune
from kitsune.ir import Kind, Plan
from kitsune.scheduler.formats import is_channels_last
from tests.behind import behind
from tests.runtime.checked import forget

pytestmark = pytest.mark.gpu
STEPS = 6
# Sums in another order may be this much further from float64 than eager's. cuDNN's own sums have no fixed order: in float32
# one gradient of two trainings by eager was 0.6 % apart after six steps, so eager's is the furthest of three.
AS_FAR, EAGERS = 2.0, 3


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


class Head(nn.Module):
    """The end of a language model: a vocabulary whose size is no multiple of 8."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm, self.words = nn.LayerNorm(256), nn.Linear(256, 50257, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.words(self.norm(x))


class Images(nn.Module):
    """The beginning and the end of a network of residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        self.second, self.other = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.third, self.linear = nn.Conv2d(64, 128, 1), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x)), inplace=True), 3, 2, 1)
        return self.linear(F.relu(self.third(F.relu(x + self.other(self.second(x))))).mean((2, 3)))


class Patches(nn.Module):
    """The beginning of a vision transformer, and the statistics of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.linear = nn.Conv2d(3, 256, 16, stride=16), nn.LayerNorm(256), nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.embed(x).flatten(2).transpose(1, 2)).mean(1)) + x.mean() + x.norm() * 1e-4


def train(
    context: Any,
    make: Any,
    shape: tuple[int, ...],
    classes: int,
    amp: bool = True,
    within: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The losses, gradients and parameters that training leaves; `within` other memory lie the parameters and the batch."""
    torch.manual_seed(0)
    model = make().cuda().to(dtype)
    if within:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = behind(tensor.data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(shape, generator=generator).cuda().to(dtype), torch.randint(classes, shape[:1], generator=generator).cuda()
    if within:
        x, y = behind(x), behind(y)
    losses = []
    with context:
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    found = {"losses": torch.stack([loss.cpu() for loss in losses])}
    for name, p in model.named_parameters():
        found[name], found[f"{name}.grad"] = p.detach(), p.grad
    return found


def laid_out(make: Any, shape: tuple[int, ...], classes: int, amp: bool = True, within: bool = False) -> Plan:
    """Train with and without Kitsune, compare, and return the plan of a step."""
    exact = train(contextlib.nullcontext(), make, shape, classes, amp=False, dtype=torch.float64)
    eagers = [train(contextlib.nullcontext(), make, shape, classes, amp) for _ in range(EAGERS)]
    with kitsune.config.patch(gate=False, compile_workers=0, numerics="strict"):
        found = train(kitsune.accelerate(), make, shape, classes, amp, within)
        plan = kitsune.last_plan()
    assert plan is not None
    for name, true in exact.items():
        a, b = eagers[0][name], found[name]
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name
        off = torch.stack([(eager[name] - true).abs().max() for eager in eagers]).max()
        allowed = AS_FAR * off + 1e-3 * true.abs().max()
        assert (b - true).abs().max() <= allowed, name
    return plan


@pytest.mark.parametrize("bias", [False, True])
def test_a_vocabulary_is_padded(bias: bool) -> None:
    plan = laid_out(lambda: Head(bias), (2048, 256), 50257)
    shapes = [tuple(v.type.shape) for op in plan.graph.ops if op.kind is Kind.GEMM for v in (*op.inputs, *op.results)]
    assert len(shapes) >= 9 and all(50257 not in shape for shape in shapes)


def test_convolutions_are_in_channels_last() -> None:
    plan = laid_out(Images, (64, 3, 128, 128), 10)
    # The batch norms between them have been taken apart.
    calls = [op for op in plan.graph.ops if op.target._opname.startswith(("convolution", "max_pool2d"))]
    images = [v.type for op in calls for v in (*op.inputs, *op.results) if len(v.type.shape) == 4]
    assert len(calls) == 8 and all(is_channels_last(type_) for type_ in images if type_.shape[2:].numel() > 1)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    ("make", "shape"), [(Images, (64, 3, 128, 128)), (Patches, (64, 3, 224, 224))], ids=["channels last", "patches"]
)
def test_batches_and_parameters_may_begin_in_the_middle_of_memory(make: Any, shape: tuple[int, ...], amp: bool) -> None:
    # In TF32 a sum of another order is 2 % off after six steps.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        laid_out(make, shape, 10, amp, within=True)
    assert kitsune.counters()["kernels"] > 0


def test_a_pool_chooses_the_same_elements_in_both_formats() -> None:
    # Where several are the largest, as zeros after relu, the gradient goes to the one that eager chooses.
    x = torch.randn(8, 64, 33, 33, device="cuda").bfloat16().relu()
    _, contiguous = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    _, last = F.max_pool2d(x.to(memory_format=torch.channels_last), 3, 2, 1, return_indices=True)
    assert torch.equal(contiguous, last)
