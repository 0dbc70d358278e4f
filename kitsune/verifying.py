"""`kitsune.verify`: a training step under Kitsune, checked against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kitsune.accepts import accepted, whole
from kitsune.checking import CheckReport, reporting
from kitsune.config import config
from kitsune.pipeline import tally, wait_for_kernels
from kitsune.session import accelerate

# Steps after which kernels are waited for: the first is observed, the second learned, the third planned.
SETTLED = 3


def verify(
    train_step: Callable[..., Any],
    *batch: Any,
    steps: int = 8,
    device: str | torch.device | None = None,
    numerics: str | None = None,
    **keywords: Any,
) -> CheckReport:
    """Run `train_step(*batch, **keywords)` under Kitsune, `steps` times, and compare each of its regions with eager.

    The report is true where everything was equal, and prints as sentences: bit for bit or, with numerics="strict", as near to
    float64 as eager where sums are in an order of their own. Otherwise it names the first operator that differs, its line, and a
    file that shows the difference again. The steps are real ones: they change the model, the optimizer and the random state as
    `steps` steps do. The first only shows Kitsune what the step does; after the third, kernels are waited for, and CUDA graphs
    follow. It is slow, and needs memory for copies of what a step writes and makes.
    """
    accepted("steps", steps, whole(1))
    report = CheckReport()
    n_observed = tally.observed
    # Within one context, as a loop would be: leaving it between steps would end regions that belong together.
    context = accelerate(device=device, numerics=numerics)
    try:
        with reporting(report), config.patch(check=True, gate=False), context:
            for step in range(steps):
                train_step(*batch, **keywords)
                report.steps += 1
                if step + 1 == SETTLED:
                    wait_for_kernels()
    finally:
        report.observed = tally.observed - n_observed
    return report
