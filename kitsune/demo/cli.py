"""The command line of the demo: arguments, the two trainings per model, the report, the exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import kitsune
from kitsune.demo import data
from kitsune.demo.compare import Comparison
from kitsune.demo.errors import DemoError
from kitsune.demo.measure import how_peak_is_measured
from kitsune.demo.plot import plot, require_matplotlib
from kitsune.demo.report import render
from kitsune.demo.train import FORMS, MODELS, Progress, train

# Thread pools, library handles and lazy imports start in these, so that neither training pays for them.
REHEARSAL_STEPS = 2
BAR_WIDTH = 30


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kitsune demo")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, help="default: both, one after the other")
    parser.add_argument("--form", choices=FORMS, default="context", help="how Kitsune is switched on (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (%(default)s)")
    parser.add_argument("--steps", type=positive, default=50, help="(%(default)s)")
    parser.add_argument("--warmup", type=int, choices=(0, 1), default=1, help="1 observes a region first (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--numerics",
        choices=("bitwise", "strict"),
        default="bitwise",
        help="strict fuses reductions, too, which sum in an order of their own: the distance from eager is said (%(default)s)",
    )
    parser.add_argument("--plan-for", metavar="ARCH", default=None, help="show the plan for this GPU: sm_80 or sm_90")
    parser.add_argument("--json", type=Path, metavar="F", help="write everything that is printed, and more, to F")
    parser.add_argument("--plot", type=Path, metavar="F", help="draw both loss curves to the PNG F (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    try:
        device = find_device(args.device)
        models = (args.model,) if args.model else MODELS
        check_requirements(models, args)
        with spare_threads(device):
            comparisons = [compare(model, args, device) for model in models]
            if args.json:
                args.json.write_text(json.dumps(as_json(comparisons, device), indent=2, default=str) + "\n")
        if args.plot:
            plot(comparisons, args.plot)
    except DemoError as error:
        print(f"kitsune demo: {error}", file=sys.stderr)
        return 2
    return 0 if all(c.agrees() for c in comparisons) else 1


def check_requirements(models: Sequence[str], args: argparse.Namespace) -> None:
    """Whatever is missing is said before the first training, not after the last."""
    if args.plan_for is not None:
        try:
            kitsune.last_plan(args.plan_for)
        except ValueError as error:
            raise DemoError(str(error)) from None
    if args.plot:
        require_matplotlib()
    for path in (args.json, args.plot):
        if path and not path.resolve().parent.is_dir():
            raise DemoError(f"{path} cannot be written: there is no folder {path.parent}")
    if "lenet" in models:
        data.digits()
    if "gpt" in models:
        data.text()


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DemoError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise DemoError(f"Kitsune's demo runs on cpu or cuda, not on {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DemoError(f"{name} was asked for, but this torch finds no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DemoError(f"there is no {name}; this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


@contextlib.contextmanager
def spare_threads(device: torch.device) -> Iterator[None]:
    """On a CPU use half the threads: with all of them one busy neighbour makes every step wait.

    A LeNet step went from 6.7 to 420 ms (4 cores, torch 2.13) in one of two trainings and not in the other; with half
    the threads the models are about a fifth slower, both ways alike.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare(model: str, args: argparse.Namespace, device: torch.device) -> Comparison:
    def one(form: str | None, steps: int, progress: Progress | None = None) -> Any:
        options = {"warmup": args.warmup, "seed": args.seed, "progress": progress, "plan_for": args.plan_for}
        return train(model, form, steps=steps, device=device, **options)

    print(f"{model}: training twice on {device}, {args.steps} steps each", flush=True)
    with kitsune.config.patch(numerics=args.numerics):
        for form in (None, args.form):
            one(form, min(REHEARSAL_STEPS, args.steps))
        eager = one(None, args.steps, progress_bar("eager", args.steps))
        lazy = one(args.form, args.steps, progress_bar("kitsune", args.steps))
    wipe_bar()
    comparison = Comparison(model, args.form, args.steps, args.warmup, args.seed, eager, lazy, args.numerics)
    print(render(comparison, device), end="\n\n", flush=True)
    return comparison


def progress_bar(name: str, steps: int) -> Progress | None:
    if not sys.stderr.isatty():
        return None

    def show(step: int, loss: float) -> None:
        filled = BAR_WIDTH * step // steps
        bar = "█" * filled + "░" * (BAR_WIDTH - filled)
        print(f"\r{name:8s} {bar} {step}/{steps}  loss {loss:.4f}", end="", file=sys.stderr, flush=True)

    return show


def wipe_bar() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def as_json(comparisons: Sequence[Comparison], device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": {"kitsune": kitsune.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": git_commit(),
        "device": {"device": str(device), "name": name, "threads": torch.get_num_threads()},
        "peak_memory_is": how_peak_is_measured(device),
        "identical": all(c.identical() for c in comparisons),
        "results": [c.to_dict() for c in comparisons],
    }


def git_commit() -> str | None:
    """The commit of the checkout that is running; None for an installed copy, even one inside somebody's repository."""
    root = Path(kitsune.__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    top, commit = done.stdout.split("\n")[:2]
    return commit if Path(top).resolve() == root else None


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
