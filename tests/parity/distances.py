"""How far reductions in kernels are from eager's on this GPU: what `kitsune/codegen/exactness.py` keeps of each.

    python -m tests.parity.distances [--jobs 8]

Prints, for each row of the lowering table, the largest distance between a kernel's result and eager's, in units of the dtype's
epsilon and of the largest result, in float32 and over the 16-bit types; then how far either is from float64, in float32.
"""

from __future__ import annotations

import os

# What the knobs are is read at import: every step is recorded, and compiled at once.
os.environ.update(KITSUNE_GATE="0", KITSUNE_COMPILE_WORKERS="0", KITSUNE_TUNING="off", KITSUNE_NUMERICS="strict")

import argparse
import json
import multiprocessing

import torch

import kitsune
from tests.codegen.reductions import CASES, Case, draw, exactly, tensors

# Of the cases that look at one op, which.
RULES = {
    "sum": "sum",
    "sum of columns": "sum",
    "sum of all": "sum",
    "sum of two dimensions": "sum",
    "mean": "mean",
    "mean of columns": "mean",
    "amax and amin": "amax",
    "max and min": "max",
    "argmax and argmin": "argmax",
    "var and mean": "var_mean",
    "std of columns": "std",
    "norm": "linalg_vector_norm",
    "softmax": "_softmax",
    "softmax of columns": "_softmax",
    "log_softmax": "_log_softmax",
    "softmax backward": "_softmax_backward_data",
    "logsumexp": "logsumexp",
    "cross entropy": "nll_loss_forward",
    "layer norm": "native_layer_norm",
    "layer norm backward, all": "native_layer_norm_backward",
    "batch norm": "native_batch_norm",
    "batch norm in channels-last": "native_batch_norm",
}
Row = dict[str, float]
SIZES = (33, 1023, 50257)
WIDTHS = {torch.float32: "float32", torch.bfloat16: "16 bits", torch.float16: "16 bits"}


def distances(case: Case, n: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """From eager, from float64, and eager's from float64, in units of epsilon and of the largest result."""
    inputs = [t.cuda() for t in draw(case.shapes(n), dtype)]
    kitsune.reset()
    for _ in range(2):  # at first, some ops are made at once
        with kitsune.accelerate(warmup=0, device="cuda"):
            got = tensors(case.program(*inputs))
    report = kitsune.explain()
    if report.mended or not report.counters["kernels"]:
        raise RuntimeError(f"{case.name}: no kernel was run. {report.mended}")
    found = [0.0, 0.0, 0.0]
    for mine, eager, exact in zip(got, tensors(case.program(*inputs)), exactly(case.program, inputs), strict=True):
        if not eager.dtype.is_floating_point:
            found[0] += int((mine != eager).sum())
            continue
        unit = float(exact.abs().max()) * torch.finfo(dtype).eps
        for k, (a, b) in enumerate(((mine, eager), (mine, exact), (eager, exact))):
            found[k] = max(found[k], float((a.detach().double() - b.double()).abs().max()) / unit)
    return found[0], found[1], found[2]


def of_case(name: str) -> Row:
    """The largest distances of a case, by what they are of."""
    (case,) = (case for case in CASES if case.name == name)
    row: Row = dict.fromkeys(("float32", "16 bits", "from float64", "eager's"), 0.0)
    for n in SIZES:
        for dtype, width in WIDTHS.items():
            apart, ours, eagers = distances(case, n, dtype)
            row[width] = max(row[width], apart)
            if dtype is torch.float32:
                row["from float64"], row["eager's"] = max(row["from float64"], ours), max(row["eager's"], eagers)
    return row


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8)
    worst: dict[str, Row] = {}
    with multiprocessing.get_context("spawn").Pool(parser.parse_args().jobs) as pool:
        for name, row in zip(RULES, pool.map(of_case, RULES, chunksize=1), strict=True):
            known = worst.setdefault(RULES[name], row)
            known.update({key: max(value, row[key]) for key, value in known.items()})
    for rule, row in sorted(worst.items()):
        print(f"{rule:30s}", json.dumps({key: round(value, 2) for key, value in row.items()}))


if __name__ == "__main__":
    main()
