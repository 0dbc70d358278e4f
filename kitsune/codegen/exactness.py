"""Which rules give other bits than eager's kernel on the same GPU: by how much, and why. Measured on an H200, torch 2.11.

All other rules were bit-equal on 131,072 ordinary values, on random bits and on all 65,536 values of the 16-bit types
(`tests/parity/test_fused_ops.py`). Strict numerics leaves an op of these tables to the library.
"""

import torch

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
WITHOUT_TOOLKIT: dict[str, tuple[int, str]] = {
    **dict.fromkeys("erf erfc atan asin acos asinh acosh atan2 pow erfinv hypot".split(), (3, OLDER)),
    # 1 + erf(x) and 1 - beta ** step cancel, and what is left of them is compared.
    **dict.fromkeys("gelu gelu_backward _fused_adam_ _fused_adamw_".split(), (2**31 - 1, OLDER)),
}


def distance(op: Op, toolkit: bool) -> tuple[int, str]:
    """How far an op's rule may be from eager, in units in the last place, and why; (0, "") if it is exact."""
    name = base_name(op)
    if name == "_fused_adam_" and op.inputs[0].type.dtype is torch.float32 and arguments_of(op).get("weight_decay") != 0:
        return ADAM_WITH_DECAY
    if not toolkit and name in WITHOUT_TOOLKIT:
        return WITHOUT_TOOLKIT[name]
    return DISTANCE.get(name, (0, ""))


def why_not_exact(op: Op, toolkit: bool) -> str | None:
    """A sentence saying why an op's kernel would not give eager's bits; None if it would.

    `toolkit`: is the math library there that eager was built with?
    """
    ulp, reason = distance(op, toolkit)
    return f"{base_name(op)} would not be equal to eager's in every bit: {reason}" if ulp else None
