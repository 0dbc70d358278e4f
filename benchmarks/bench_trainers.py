"""A step of other libraries' trainers, with torch's optimizer and with a KitsuneOptimizer in its place.

    python -m benchmarks.bench_trainers [--trainers transformers lightning] [--models bert mlp] [--device cuda] [--json FILE]

`eager` passes a fused AdamW (foreach on a CPU), `kitsune` wraps it (one graph, no fusion: eager's bits), and `fusion` wraps it
with enable_fusion=True. bf16 autocast is the trainer's own; batches come from the host. A figure is the median of the blocks of
a run, once all kernels are there and tuned; a step holds all that the trainer does, its callbacks and the reading of the loss
included.
"""

import argparse
import contextlib
import gc
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import kitsune
from benchmarks.environment import keep
from benchmarks.models import RECIPES, Workload, make

WRAPS: dict[str, Callable[[torch.optim.Optimizer], torch.optim.Optimizer]] = {
    "eager": lambda optimizer: optimizer,
    "kitsune": lambda optimizer: kitsune.KitsuneOptimizer(optimizer),
    "fusion": lambda optimizer: kitsune.KitsuneOptimizer(optimizer, enable_fusion=True),
}
N_BATCHES = 4


class Stopwatch:
    """Told of each step: waits for the kernels once after a warm-up, lets the steps go by in which the gate compares Kitsune with
    eager, and then takes the time of blocks of steps."""

    def __init__(self, options: Any) -> None:
        self.warm, self.block, self.cuda = options.warm_up, options.block, options.device != "cpu"
        self.settled = self.warm + options.settle
        self.steps, self.blocks, self.start = 0, [], 0.0

    def __call__(self) -> None:
        self.steps += 1
        if self.steps == self.warm:
            kitsune.wait_for_kernels(tuned=True)
        since = self.steps - self.settled
        if since >= 0 and since % self.block == 0:
            if self.cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            if since:
                self.blocks.append((now - self.start) / self.block * 1e3)
            self.start = now

    def total(self, rounds: int) -> int:
        """The steps of a whole run."""
        return self.settled + self.block * rounds


def by_transformers(workload: Workload, optimizer: Any, batches: list[Any], watch: Stopwatch, rounds: int) -> None:
    """`transformers.Trainer` with everything as it comes, but for checkpoints and reports."""
    import transformers

    transformers.logging.set_verbosity_error()

    class Trainer(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return workload.loss(model, (inputs["x"], inputs["y"]))

    class Told(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch()

    steps = watch.total(rounds)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            bf16=True,
            use_cpu=not watch.cuda,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / (2 * steps))
        trainer = Trainer(
            workload.model,
            arguments,
            train_dataset=batches * (steps // len(batches) + 1),
            data_collator=lambda found: {"x": found[0][0], "y": found[0][1]},
            optimizers=(optimizer, schedule),
            callbacks=[Told()],
        )
        trainer.train()


def by_lightning(workload: Workload, optimizer: Any, batches: list[Any], watch: Stopwatch, rounds: int) -> None:
    """`lightning.Trainer` in bf16-mixed, without a logger."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Model(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = workload.model

        def training_step(self, batch: Any, number: int) -> Any:
            return workload.loss(self.net, batch)

        def on_train_batch_end(self, *_: Any) -> None:
            watch()

        def configure_optimizers(self) -> Any:
            return optimizer

    steps = watch.total(rounds)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cuda" if watch.cuda else "cpu",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(batches * (steps // len(batches) + 1), batch_size=None)
    trainer.fit(Model(), loader)


TRAINERS = {"transformers": by_transformers, "lightning": by_lightning}


def measure(trainer: str, model: str, column: str, options: Any) -> dict[str, Any]:
    """One row."""
    kitsune.reset()
    workload = make(model, options.device, "amp", options.size)
    batches = [RECIPES[model].batch(options.size, torch.Generator().manual_seed(k)) for k in range(N_BATCHES)]
    watch = Stopwatch(options)
    # Trainers print their last figures, whatever they are told.
    with contextlib.redirect_stdout(io.StringIO()):
        TRAINERS[trainer](workload, WRAPS[column](workload.optimizer), batches, watch, options.rounds)
    counters = kitsune.counters()
    row = {
        "trainer": trainer,
        "model": model,
        "column": column,
        "step_ms": round(statistics.median(watch.blocks), 4),
        "blocks_ms": [round(block, 4) for block in watch.blocks],
        "steps": watch.steps,
        "recorded": counters["recorded"],
        "replayed": counters["replayed"],
        "flushed": dict(counters["flushed"]),
    }
    del workload
    gc.collect()
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    add("--models", nargs="+", default=["bert", "mlp"], choices=list(RECIPES))
    add("--columns", nargs="+", default=list(WRAPS), choices=list(WRAPS))
    add("--size", default="full", choices=("full", "small"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=7)
    add("--block", type=int, default=20, help="steps of a block (%(default)s)")
    add("--warm-up", type=int, default=40, help="steps before the first block (%(default)s)")
    add("--settle", type=int, default=240, help="steps after that which are not measured; the gate takes up to 200 (%(default)s)")
    add("--json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, eager = [], 0.0
    print(f"{'trainer':14s}{'model':10s}{'column':10s}{'step ms':>10s}{'x eager':>9s}{'replayed':>10s}")
    for trainer in options.trainers:
        for model in options.models:
            for column in options.columns:
                row = measure(trainer, model, column, options)
                eager = row["step_ms"] if column == "eager" else eager
                faster = f"{eager / row['step_ms']:9.2f}" if eager else f"{'':9s}"
                print(f"{trainer:14s}{model:10s}{column:10s}{row['step_ms']:10.3f}{faster}{row['replayed']:10d}", flush=True)
                rows.append(row)
    print(f"kept in {keep('trainers', rows, torch.device(options.device), options.json)}")


if __name__ == "__main__":
    main()
