"""Runs a kernel of every rule on odd numbers of elements on a GPU; compute-sanitizer looks at it from outside.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 KITSUNE_POOL=0 compute-sanitizer --tool memcheck python -m tests.runtime.sanitized FOLDER
"""

from __future__ import annotations

import sys

import tests.conftest  # noqa: F401  (it sets what tests share)

import torch  # isort: skip

from kitsune.codegen import Compiler, why_not_lowered
from tests.codegen.build import build
from tests.codegen.samples import SAMPLES, draw
from tests.parity.test_fused_ops import run

SIZES = (0, 1, 31, 33, 1023)


def main(folder: str) -> None:
    compiler, n_kernels = Compiler(folder), 0
    for sample in SAMPLES:
        for size in SIZES:
            inputs = draw(sample, sample.dtypes[0], (size,), "cuda")
            fresh = [t.clone() for t in inputs]
            built = build(sample.call, inputs, "kernel", sample.moving)
            if not any(why_not_lowered(op) for op in built.ops):
                run(built, compiler, fresh, inputs)
                n_kernels += 1
    torch.cuda.synchronize()
    print(n_kernels)


if __name__ == "__main__":
    main(sys.argv[1])
