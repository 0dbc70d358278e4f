"""Which ops' bits may differ from eager's on the same GPU: by how much, and why. Measured on an H200, torch 2.11.

All other rules were bit-equal on 131,072 ordinary values, on random bits, on all 65,536 values of the 16-bit types and on special
values (`tests/parity/test_fused_ops.py`, `tests/parity/test_special_values.py`). Only "fast" numerics fuses an op of the first
three tables; `kitsune.explain(numerics=True)` prints what applies.
"""

from dataclasses import dataclass

import torch

from kitsune.codegen.libdevice import writes_erf
from kitsune.codegen.lowering import arguments_of, base_name
from kitsune.ir import Op

# By row of the lowering table: units in the last place of float32, and the reason.
DISTANCE: dict[str, tuple[int, str]] = {
    "hypot": (1, "eager's is not the library's function"),
}
# One of the four elements that nvcc unrolls is not contracted; after cancellation 64 units were measured.
ADAM_WITH_DECAY = (256, "with weight decay, nvcc contracts g + p * decay in three of four unrolled elements only")
OLDER = "Triton's own math library is older than the one that eager was built with; CUDA_HOME can name that toolkit"
# Where the CUDA toolkit is not installed, Triton's own library stands in.
CANCELS = 2**31 - 1
WITHOUT_TOOLKIT: dict[str, tuple[int, str]] = {
    **dict.fromkeys("erf erfc atan asin acos asinh acosh atan2 pow erfinv hypot".split(), (3, OLDER)),
    # 1 + erf(x) and 1 - beta ** step cancel, and what is left of them is compared.
    **dict.fromkeys("gelu gelu_backward _fused_adam_ _fused_adamw_".split(), (CANCELS, OLDER)),
}
# Those of which the helper `erf` makes the library's part.
OF_ERF = frozenset("erf gelu gelu_backward".split())

# Reductions in kernels, in "strict" and "fast": how far results were from eager's, at most, in float32 and in 16 bits, in units
# of the dtype's epsilon and of the largest result, over rows and columns of 33, 1023 and 50257 numbers. By
# `python -m tests.parity.distances` on an H200; in the same units and cases, eager itself was up to 3.2 from float64.
REDUCTIONS: dict[str, tuple[float, float]] = {
    "sum": (2.21, 0.0),
    "mean": (2.14, 0.0),
    **dict.fromkeys("amax amin max min argmax argmin".split(), (0.0, 0.0)),
    **dict.fromkeys("var var_mean".split(), (1.73, 0.0)),
    **dict.fromkeys("std std_mean".split(), (2.21, 0.0)),
    **dict.fromkeys("norm linalg_vector_norm".split(), (0.97, 0.0)),
    "logsumexp": (0.53, 0.71),
    "_softmax": (1.0, 0.0),
    "_log_softmax": (0.7, 0.0),
    **dict.fromkeys("_softmax_backward_data _log_softmax_backward_data".split(), (2.67, 0.67)),
    **dict.fromkeys("nll_loss_forward nll_loss_backward".split(), (0.78, 0.0)),
    "native_layer_norm": (2.65, 0.28),
    "native_layer_norm_backward": (1.46, 0.37),
    **dict.fromkeys("native_batch_norm native_batch_norm_backward".split(), (2.2, 0.74)),
}
# No order of a row's elements changes these.
SAME_IN_ANY_ORDER = frozenset("amax amin max min argmax argmin".split())
OWN_ORDER = "its kernel adds up in an order of its own, as near to float64 as eager's"
# The library's functions, asked otherwise than by eager, in "strict" and "fast".
ASKED_OTHERWISE: dict[str, str] = {
    **dict.fromkeys(
        "mm addmm bmm baddbmm".split(),
        "in 16 bits, a dimension that is no multiple of 8 is padded, and the library adds up otherwise",
    ),
    **dict.fromkeys(
        "convolution convolution_backward".split(),
        "in 16 bits, images are in channels-last, and patches that do not overlap rows of a matrix: it adds up otherwise",
    ),
    **dict.fromkeys(
        (
            "cudnn_batch_norm cudnn_batch_norm_backward avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d "
            "_adaptive_avg_pool2d_backward"
        ).split(),
        "between convolutions in channels-last it is, too: the library adds up otherwise",
    ),
    "max_pool2d_with_indices_backward": "its kernel adds up in float32, in the order of the windows",
}
# In every grade: torch asks whether any dispatch mode is on.
FORMULAS: dict[str, str] = {
    "prod": "prod_backward divides the result by the input only while no dispatch mode is on",
    "cumprod": "cumprod_backward divides by the input only while no dispatch mode is on",
    "masked_fill": "the gradient of a tensor that it fills in sums the chosen elements alone only while no dispatch mode is on",
    "householder_product": "its gradient takes another formula while any dispatch mode is on",
    "cross_entropy_loss": "with label smoothing and weights, those of ignored classes are summed as zeros while any mode is on",
    "matmul": "a batch of one matrix that needs no gradient is multiplied as a matrix while any dispatch mode is on",
}
UNROUNDED = "16-bit results"
WIDE = "inside of a kernel they stay in float32 until they are stored, compared or made integers"


@dataclass(frozen=True)
class Difference:
    """An op whose bits may differ from eager's, and why; `measured` says by how much, None where nobody knows."""

    op: str
    reason: str
    measured: str | None = None


def differences(numerics: str, toolkit: bool) -> list[Difference]:
    """The ops whose bits may differ in a grade of numerics. `toolkit`: is the math library there that eager was built with?"""
    found = [Difference(op, reason) for op, reason in FORMULAS.items()]
    if numerics == "bitwise":
        return found
    moved = [Difference(op, OWN_ORDER, _apart(far)) for op, far in REDUCTIONS.items() if op not in SAME_IN_ANY_ORDER]
    found = [*moved, *(Difference(op, reason) for op, reason in ASKED_OTHERWISE.items()), *found]
    if numerics == "strict":
        return found
    inexact = {**DISTANCE, "_fused_adam_": ADAM_WITH_DECAY, **({} if toolkit else _without_toolkit())}
    return [
        *(Difference(op, reason, _units(ulp)) for op, (ulp, reason) in inexact.items()),
        Difference(UNROUNDED, WIDE),
        *found,
    ]


def _apart(far: tuple[float, float] | None) -> str | None:
    return (
        None
        if far is None
        else f"at most {far[0]:g} epsilons of the largest result from eager's in float32, {far[1]:g} in 16 bits"
    )


def _units(ulp: int) -> str:
    return "what is left after cancellation" if ulp == CANCELS else f"at most {ulp} units in the last place of float32"


def distance(op: Op, toolkit: bool) -> tuple[int, str]:
    """How far an op's rule may be from eager, in units in the last place, and why; (0, "") if it is exact."""
    name = base_name(op)
    if name == "_fused_adam_" and op.inputs[0].type.dtype is torch.float32 and arguments_of(op).get("weight_decay") != 0:
        return ADAM_WITH_DECAY
    return ({} if toolkit else _without_toolkit()).get(name) or DISTANCE.get(name, (0, ""))


def _without_toolkit() -> dict[str, tuple[int, str]]:
    return {name: why for name, why in WITHOUT_TOOLKIT.items() if name not in OF_ERF or not writes_erf()}


def why_not_exact(op: Op, toolkit: bool) -> str | None:
    """A sentence saying why an op's kernel would not give eager's bits; None if it would.

    `toolkit`: is the math library there that eager was built with?
    """
    ulp, reason = distance(op, toolkit)
    return f"{base_name(op)} would not be equal to eager's in every bit: {reason}" if ulp else None
