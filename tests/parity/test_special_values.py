"""Every fused op on a GPU, as the planner puts it into a kernel with a neighbour: eager's bits for NaN, Inf, -0.0 and subnormals,
and for each of the 65,536 values of a 16-bit type."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

import kitsune
from kitsune.codegen.lowering import base_name
from kitsune.ir import Plan
from kitsune.pipeline import planned_for
from kitsune.session import trace_regions
from tests._compare import value_difference
from tests.codegen.samples import SAMPLES, Sample, draw

HALVES = (torch.bfloat16, torch.float16)
# Torch takes them apart into others.
OTHER_NAMES = {"square": "pow", "special_expit": "sigmoid"}
# What an operand may be; in words, so that there is one in each dtype.
WORDS = (
    "nan -nan inf -inf 0 -0 least -least below -below least_normal -least_normal one -one two third -third large -large".split()
)
# Combinations of more operands than three are drawn.
N_DRAWN = 4096
# Ops of a region, each with a neighbour.
PER_REGION = 8


def number(word: str, dtype: torch.dtype) -> float:
    """A word's number in a dtype."""
    info = torch.finfo(dtype)
    value = {
        "nan": float("nan"),
        "inf": float("inf"),
        "0": 0.0,
        "least": info.smallest_normal * info.eps,
        "below": info.smallest_normal * (1 - info.eps),
        "least_normal": info.smallest_normal,
        "one": 1.0,
        "two": 2.0,
        "third": 1 / 3,
        "large": info.max,
    }[word.removeprefix("-")]
    return -value if word.startswith("-") else value


def table(dtype: torch.dtype, n: int, generator: torch.Generator) -> list[torch.Tensor]:
    """All combinations of the words in `n` operands; of more than three operands, many."""
    numbers = torch.tensor([number(word, dtype) for word in WORDS], dtype=torch.float64).to(dtype)
    if n > 3:
        return [numbers[torch.randint(len(WORDS), (N_DRAWN,), generator=generator)] for _ in range(n)]
    places = torch.tensor(list(itertools.product(range(len(WORDS)), repeat=n)))
    return [numbers[places[:, i]] for i in range(n)]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """The 65,536 values of a 16-bit type."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def special_inputs(sample: Sample, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """The table and, for one operand of 16 bits, all there are; a mask, and the step of an optimizer, are as they are drawn."""
    generator = torch.Generator().manual_seed(0)
    n_floats = sample.n - (sample.like in ("mask", "adam"))
    tensors = table(dtype, n_floats, generator)
    if n_floats == 1 and dtype in HALVES:
        tensors = [torch.cat([tensors[0], every_value(dtype)])]
    if sample.like == "mask":
        tensors.append(torch.rand(tensors[0].shape, generator=generator) < 0.5)
    if sample.like == "adam":
        tensors.append(torch.tensor(3.0))
    return [t.to(device) for t in tensors]


def neighbour(t: torch.Tensor) -> torch.Tensor:
    """An exact op behind the one that is looked at, which shows the sign of its zeros."""
    return t.logical_not() if t.dtype is torch.bool else t.neg()


def floats(sample: Sample) -> list[torch.dtype]:
    return [dtype for dtype in sample.dtypes if dtype.is_floating_point]


CASES = [(i, dtype) for i, sample in enumerate(SAMPLES) for dtype in floats(sample)]
GROUPS = [
    (dtype, found[k : k + PER_REGION])
    for dtype in sorted({dtype for _, dtype in CASES}, key=str)
    for found in [[i for i, of in CASES if of is dtype]]
    for k in range(0, len(found), PER_REGION)
]


def test_the_table_has_what_it_says() -> None:
    for dtype in (*HALVES, torch.float32, torch.float64):
        (values,) = table(dtype, 1, torch.Generator())
        info = torch.finfo(dtype)
        subnormal = (values != 0) & (values.abs() < info.smallest_normal)
        assert int(values.isnan().sum()) == 2 and int(values.isinf().sum()) == 2 and int(subnormal.sum()) == 4
        assert int(((values == 0) & values.signbit()).sum()) == 1
    assert [t.numel() for t in table(torch.float32, 3, torch.Generator())] == [len(WORDS) ** 3] * 3
    assert len({int(b) for b in every_value(torch.float16).view(torch.int16)}) == 1 << 16


def results(samples: list[Sample], inputs: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """What each op makes of its inputs, and its neighbour of that."""
    found = []
    for sample, tensors in zip(samples, inputs, strict=True):
        made = sample.call(*tensors)
        made = [made] if isinstance(made, torch.Tensor) else list(made)
        found.append([*made, *map(neighbour, made)])
    return found


def run_as_eager(sample: Sample, dtype: torch.dtype) -> bool:
    """Has eager a kernel for it?"""
    try:
        sample.call(*draw(sample, dtype, (4,), "cuda"))
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.gpu
@pytest.mark.usefixtures("every_op_a_kernel")
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"{str(g[0]).removeprefix('torch.')}-{SAMPLES[g[1][0]].rule}-{g[1][0]}")
def test_special_values_are_eagers_bits(group: tuple[torch.dtype, list[int]], record_property: Any) -> None:
    dtype, numbers = group
    samples = [SAMPLES[i] for i in numbers if run_as_eager(SAMPLES[i], dtype)]
    inputs = [special_inputs(sample, dtype, "cuda") for sample in samples]
    expected = results(samples, [[t.clone() for t in tensors] for tensors in inputs])
    for _ in range(2):  # at first, some ops are made at once
        fresh = [[t.clone() for t in tensors] for tensors in inputs]
        with trace_regions() as graphs, kitsune.accelerate(warmup=0, device="cuda"):
            got = results(samples, fresh)
    report = kitsune.explain()
    assert not report.mended and report.counters["fused"] >= len(samples)
    plans = [planned_for(graph) for graph in graphs]
    assert not (lacking := not_fused(samples, plans)), lacking
    record_property("ops", len(samples))
    wrong = [
        f"{sample.rule}: {told}"
        for sample, theirs, mine in zip(samples, expected, got, strict=True)
        for a, b in zip(theirs, mine, strict=True)
        if (told := value_difference(a, b))
    ]
    assert not wrong, wrong[:5]


def not_fused(samples: list[Sample], plans: list[Plan]) -> Counter[str]:
    """The ops that are in no kernel, but for those that no plan fuses, or that one leaves to eager for the sake of their bits."""
    steps = [step.op for plan in plans for launch in plan.launches for kernel in launch.kernels for step in kernel.steps]
    fused = Counter(base_name(op).removesuffix(".mode") for op in steps)
    refusals = [refusal for plan in plans for refusal in plan.refusals]
    refused = Counter(
        r.before
        for r in refusals
        if any(why in r.reason for why in ("every bit", "reciprocal", "power that moves")) or r.reason.endswith("is extern")
    )
    return Counter(OTHER_NAMES.get(sample.rule, sample.rule) for sample in samples) - fused - refused
