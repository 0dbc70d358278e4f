"""How near each form of a kernel with reductions comes to the bandwidth of a copy: eager, Kitsune and torch.compile.

    python -m benchmarks.bench_reductions [--only "layer norm,bias gradient"] [--columns eager,kitsune,tuned] [--runs 30]

GB/s count what the program must move, each input once and each output once, whatever was really moved. What must be read again
counts again: an operand of which every element is needed before the first result can be computed, as the images of a batch norm
and the logits of a loss with its gradient. On CUDA the time is that of the kernels alone, from torch.profiler, without the one by
which every replay learns where its batch is, and with none started early: one that is has the end of the one before in its time.
On a CPU it is that of the call, of a part of each operand, and only shows that all works. `kitsune` has the first choice of each
tile, `tuned` the fastest of those that are tried. Distances are from the same function of float64, in units of the largest
result.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kitsune
from benchmarks.bench_chain import micros, row_of
from benchmarks.environment import keep

aten = torch.ops.aten
BF16, FP32 = torch.bfloat16, torch.float32
# Of which a CPU takes one.
PART = 64
# Runs before and after kernels are there, and seconds to wait for them.
PREPARED, WAIT = 4, 120.0


@dataclass(frozen=True)
class Program:
    """What is timed: a function of tensors of these shapes and dtypes, and how many of them it must read twice.

    Images lie in memory as `layout` has it.
    """

    name: str
    function: Callable[..., Sequence[Tensor]]
    operands: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    twice: int = 0
    layout: torch.memory_format = torch.contiguous_format


def residual_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """The sum of two streams, and its norm as the next product wants it."""
    total = x + y
    return total, F.layer_norm(total, (total.shape[-1],), weight, bias).to(BF16)


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """All three gradients, with the statistics made first."""
    _, mean, rstd = aten.native_layer_norm(x, [x.shape[-1]], weight, bias, 1e-5)
    return aten.native_layer_norm_backward(grad.to(x.dtype), x, [x.shape[-1]], mean, rstd, weight, bias, [True, True, True])


def norm_backward_kept(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """The same with the statistics that the forward has kept, as a training step has it."""
    return aten.native_layer_norm_backward(grad.to(x.dtype), x, [x.shape[-1]], mean, rstd, weight, bias, [True, True, True])


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """Training: normalised by what the batch itself has, which is returned for the backward pass."""
    return aten.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)


def batch_norm_backward(x: Tensor, grad: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> Sequence[Tensor]:
    """All three gradients, from saved statistics."""
    return aten.native_batch_norm_backward(grad, x, weight, None, None, mean, rstd, True, 1e-5, [True, True, True])


def softmax_backward(grad: Tensor, y: Tensor) -> Sequence[Tensor]:
    """From what the softmax has returned."""
    return [aten._softmax_backward_data(grad, y, -1, y.dtype)]


def gelu_bias(grad: Tensor, x: Tensor) -> Sequence[Tensor]:
    """A gradient through an activation, and the bias gradient of the layer before."""
    through = aten.gelu_backward(grad, x)
    return through, through.sum(0).float()


def loss_and_gradient(x: Tensor) -> Sequence[Tensor]:
    """Cross entropy of 16-bit logits in float32, and its gradient."""
    target = torch.arange(x.shape[0], device=x.device) % x.shape[1]
    log = aten._log_softmax(x.float(), 1, False)
    loss, weight = aten.nll_loss_forward(log, target, None, 1, -100)
    grad = aten.nll_loss_backward(torch.ones_like(loss), log, target, None, 1, -100, weight)
    return loss, aten._log_softmax_backward_data(grad, log, 1, FP32).to(x.dtype)


def of(*shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    return tuple((shape, dtype) for shape in shapes)


IMAGES = (128, 256, 56, 56)
CHANNELS = ((256,), FP32)
NORM = (*of(IMAGES), CHANNELS, CHANNELS)
NORM_BACKWARD = (*of(IMAGES, IMAGES), CHANNELS, CHANNELS, CHANNELS)
LAST = torch.channels_last

PROGRAMS = [
    Program("softmax, rows in registers", lambda x: [x.softmax(-1)], of((65536, 1024))),
    Program("softmax, rows in a loop", lambda x: [x.softmax(-1)], of((4096, 16384))),
    Program("softmax backward", softmax_backward, of((65536, 1024), (65536, 1024))),
    Program("sum of rows", lambda x: [x.sum(-1)], of((65536, 1024))),
    Program("sum of long rows", lambda x: [x.sum(-1)], of((2048, 65536))),
    Program("layer norm", lambda x, w, b: [F.layer_norm(x, (1024,), w, b)], of((65536, 1024), (1024,), (1024,))),
    Program("layer norm, short rows", lambda x: [F.layer_norm(x, (64,))], of((1048576, 64))),
    Program("residual and layer norm", residual_norm, of((32768, 768), (32768, 768), (768,), (768,), dtype=FP32)),
    Program("layer norm backward", norm_backward, (*of((32768, 768)), *of((32768, 768), (768,), (768,), dtype=FP32))),
    Program(
        "layer norm backward, statistics kept",
        norm_backward_kept,
        (*of((32768, 768)), *of((32768, 768), (32768, 1), (32768, 1), (768,), (768,), dtype=FP32)),
    ),
    Program("bias gradient, in parts", lambda x: [x.sum(0).float()], of((65536, 768))),
    Program("bias gradient, in one", lambda x: [x.sum(0).float()], of((4096, 30522))),
    Program("gelu backward and bias gradient", gelu_bias, of((32768, 3072), (32768, 3072))),
    Program("sum of all", lambda x: [x.sum()], of((65536, 1024))),
    Program("norm of all", lambda x: [torch.linalg.vector_norm(x)], of((65536, 1024), dtype=FP32)),
    Program("mean of images", lambda x: [x.mean((2, 3))], of((256, 2048, 14, 14))),
    Program("mean of images, channels last", lambda x: [x.mean((2, 3))], of((256, 2048, 14, 14)), layout=LAST),
    Program("statistics of channels", lambda x: torch.var_mean(x, (0, 2, 3)), of(IMAGES)),
    Program("batch norm", batch_norm, NORM, twice=1),
    Program("batch norm, channels last", batch_norm, NORM, twice=1, layout=LAST),
    Program("batch norm backward", batch_norm_backward, NORM_BACKWARD, twice=2),
    Program("batch norm backward, channels last", batch_norm_backward, NORM_BACKWARD, twice=2, layout=LAST),
    Program("argmax of rows", lambda x: [x.argmax(-1)], of((4096, 30522))),
    Program("cross entropy and gradient", loss_and_gradient, of((4096, 50304)), twice=1),
]


def operands_of(program: Program, device: torch.device) -> list[Tensor]:
    """Random numbers of a seed. A standard deviation is none that is negative."""
    torch.manual_seed(0)
    found = []
    for shape, dtype in program.operands:
        if device.type != "cuda" and len(shape) > 1:
            shape = (max(shape[0] // PART, 1), *shape[1:])
        made = torch.randn(shape, device=device).to(dtype)
        found.append(
            made.contiguous(memory_format=program.layout) if len(shape) == 4 else made.abs() if len(shape) == 1 else made
        )
    return found


def measure(program: Program, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows of a program; the copy of its first operand comes first, for the others to be compared with."""
    operands = operands_of(program, device)
    expected = program.function(*operands)
    exact = [t.double() for t in program.function(*(t.double() for t in operands))]
    nbytes = sum(t.nbytes for t in (*operands, *operands[: program.twice], *expected))
    target = torch.empty_like(operands[0])
    source = operands[0]
    rows = [row_of("copy", program.name, *micros(lambda: target.copy_(source), options.runs, device), 2 * source.nbytes)]

    compiled = torch.compile(program.function)
    columns: dict[str, Callable[[], Any]] = {
        "eager": lambda: program.function(*operands),
        "kitsune": lambda: flushed(program.function, operands),
        "tuned": lambda: flushed(program.function, operands),
        "compile": lambda: compiled(*operands),
    }
    for name in options.columns.split(","):
        with under(name, device):
            prepare(columns[name], name == "tuned", device)
            row = row_of(name, program.name, *micros(columns[name], options.runs, device, "read_page"), nbytes)
            found = [t.detach().clone() for t in columns[name]()]
        row["distance"] = max((distance(a, b) for a, b in zip(found, exact, strict=True) if a.numel()), default=0.0)
        rows.append(row)
    for row in rows:
        row["program"] = row.pop("dtype")
        row["of_copy_%"] = round(100 * (row["bytes"] / row["us"]) / (rows[0]["bytes"] / rows[0]["us"]), 1)
    return rows


def flushed(function: Callable[..., Sequence[Tensor]], operands: Sequence[Tensor]) -> Sequence[Tensor]:
    """The function as one region."""
    results = function(*operands)
    kitsune.flush()
    return results


@contextlib.contextmanager
def under(name: str, device: torch.device) -> Iterator[None]:
    """The context of a column."""
    if name not in ("kitsune", "tuned"):
        yield
        return
    kitsune.reset()
    tuning = "on" if name == "tuned" else "off"
    options = {"gate": False, "numerics": "strict", "tuning": tuning, "early_starts": False}
    with kitsune.config.patch(**options), kitsune.accelerate(device=device):
        yield


def prepare(run: Callable[[], Any], tuned: bool, device: torch.device) -> None:
    """Kernels are compiled and captured before anything is timed, and the fastest tiles chosen."""
    for k in range(3 * PREPARED):
        run()
        if k < PREPARED or k % PREPARED == 0:
            kitsune.wait_for_kernels(WAIT, tuned=tuned)


def distance(found: Tensor, exact: Tensor) -> float:
    """The largest, of the largest result."""
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def line(rows: list[dict[str, Any]]) -> str:
    """A program's rows as one line of the table."""
    copy, *others = rows
    cells = [f"{copy['program']:36s}{max(row['bytes'] for row in others) / 1e6:7.0f} MB{copy['GB/s']:7.0f}"]
    for row in others:
        launches = "" if row["launches"] is None else f"{row['launches']:4g} x"
        speed = f"{row['us']:9.1f} us{row['GB/s']:6.0f}{row['of_copy_%']:5.0f} %"
        cells.append(f"{row['what']:>8s}{launches}{speed}, off {row['distance']:.1e}")
    return " |".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="programs whose names begin so, with commas between")
    parser.add_argument("--columns", default="eager,kitsune,tuned,compile")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", help="by default benchmarks/results/reductions-<device type>.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    chosen = tuple(options.only.split(",")) if options.only else ("",)
    rows = []
    print("program, bytes that it must move, GB/s of a copy | column, launches, time, GB/s, share of the copy's rate")
    for program in PROGRAMS:
        if program.name.startswith(chosen):
            try:
                found = measure(program, options, device)
            except Exception as error:
                print(f"{program.name:36s} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
                continue
            print(line(found), flush=True)
            rows += found
    print(keep("reductions", rows, device, options.json))


if __name__ == "__main__":
    main()
