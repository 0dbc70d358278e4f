"""How near each form of a kernel with reductions comes to the bandwidth of a copy: eager, Kitsune and torch.compile.

    python -m benchmarks.bench_reductions [--only "layer norm,bias gradient"] [--columns eager,kitsune] [--runs 30] [--json FILE]

GB/s count what the program must move, each input once and each output once, whatever was really moved; for losses, where
the gradient cannot be had before the loss, the logits count twice. On CUDA the time is that of the kernels alone, from
torch.profiler; on a CPU it is that of the call, and only shows that all works.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Program:
    """What is timed: a function of tensors of these shapes and dtypes, and how often it must read the first of them."""

    name: str
    function: Callable[..., Sequence[Tensor]]
    operands: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    reads: int = 1


def residual_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """The sum of two streams, and its norm as the next product wants it."""
    total = x + y
    return total, F.layer_norm(total, (total.shape[-1],), weight, bias).to(BF16)


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """All three gradients, with the statistics made first."""
    _, mean, rstd = aten.native_layer_norm(x, [x.shape[-1]], weight, bias, 1e-5)
    return aten.native_layer_norm_backward(grad.float(), x, [x.shape[-1]], mean, rstd, weight, bias, [True, True, True])


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


PROGRAMS = [
    Program("rows in registers: softmax", lambda x: [x.softmax(-1)], of((65536, 1024))),
    Program("rows in a loop: softmax", lambda x: [x.softmax(-1)], of((4096, 16384))),
    Program("short rows: layer norm", lambda x: [F.layer_norm(x, (64,))], of((1048576, 64))),
    Program("residual and layer norm", residual_norm, of((32768, 768), (32768, 768), (768,), (768,), dtype=FP32)),
    Program("layer norm backward", norm_backward, (*of((32768, 768)), *of((32768, 768), (768,), (768,), dtype=FP32))),
    Program("bias gradient, in parts", lambda x: [x.sum(0).float()], of((65536, 768))),
    Program("bias gradient, in one", lambda x: [x.sum(0).float()], of((4096, 30522))),
    Program("gelu backward and bias gradient", gelu_bias, of((32768, 3072), (32768, 3072))),
    Program("sum of all", lambda x: [x.sum()], of((65536, 1024))),
    Program("norm of all", lambda x: [torch.linalg.vector_norm(x)], of((65536, 1024), dtype=FP32)),
    Program("mean of images", lambda x: [x.mean((2, 3))], of((64, 2048, 14, 14))),
    Program("statistics of channels", lambda x: torch.var_mean(x, (0, 2, 3)), of((64, 256, 56, 56))),
    Program("argmax of rows", lambda x: [x.argmax(-1)], of((4096, 30522))),
    Program("cross entropy and gradient", loss_and_gradient, of((4096, 50304)), reads=2),
]


def measure(program: Program, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows of a program; the copy comes first, for the others to be compared with."""
    torch.manual_seed(0)
    scale = 1 if device.type == "cuda" else 64
    shapes = [(max(shape[0] // scale, 1), *shape[1:]) if len(shape) > 1 else shape for shape, _ in program.operands]
    operands = [torch.randn(shape, device=device).to(dtype) for shape, (_, dtype) in zip(shapes, program.operands, strict=True)]
    expected = program.function(*operands)
    nbytes = sum(t.nbytes for t in (*operands, *expected)) + (program.reads - 1) * operands[0].nbytes
    target = torch.empty_like(operands[0])
    source = operands[0]
    rows = [row_of("copy", program.name, *micros(lambda: target.copy_(source), options.runs, device), 2 * source.nbytes)]

    def under_kitsune() -> Sequence[Tensor]:
        results = program.function(*operands)
        kitsune.flush()
        return results

    compiled = torch.compile(program.function)
    columns: dict[str, Callable[[], Any]] = {
        "eager": lambda: program.function(*operands),
        "kitsune": under_kitsune,
        "compile": lambda: compiled(*operands),
    }
    for name in options.columns.split(","):
        if name == "kitsune":
            kitsune.reset()
            with kitsune.config.patch(gate=False, compile_workers=0, numerics="strict"), kitsune.accelerate(device=device):
                row = row_of(name, program.name, *micros(columns[name], options.runs, device), nbytes)
                found = [t.detach().clone() for t in under_kitsune()]
        else:
            row = row_of(name, program.name, *micros(columns[name], options.runs, device), nbytes)
            found = list(columns[name]())
        pairs = zip(found, expected, strict=True)
        row["max_error"] = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
        rows.append(row)
    for row in rows:
        row["program"] = row.pop("dtype")
        row["of_copy_%"] = round(100 * (row["bytes"] / row["us"]) / (rows[0]["bytes"] / rows[0]["us"]), 1)
        print(
            f"{row['program']:34s}{row['what']:9s}{row['us']:10.1f} us{row['GB/s']:9.1f} GB/s{row['of_copy_%']:7.1f} % of copy"
            + (f", {row['launches']:g} launches" if row["launches"] is not None else "")
            + (f", off by {row['max_error']:.3g}" if "max_error" in row else ""),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="programs whose names begin so, with commas between")
    parser.add_argument("--columns", default="eager,kitsune,compile")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", help="by default benchmarks/results/reductions-<device type>.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    chosen = tuple(options.only.split(",")) if options.only else ("",)
    rows = [row for p in PROGRAMS if p.name.startswith(chosen) for row in measure(p, options, device)]
    print(keep("reductions", rows, device, options.json))


if __name__ == "__main__":
    main()
