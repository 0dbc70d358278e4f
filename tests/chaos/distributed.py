"""Two processes train a model together, in eager and then under Kitsune: is every number of every rank the same?

    python -m tests.chaos.distributed cpu 100

prints, as JSON, what is different of each way to train together, of each rank, and of either warmup; null where nothing is. With
`cuda` each rank has a GPU of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import tests.conftest  # noqa: F401  (its settings are those of the tests)

import torch  # isort: skip
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import kitsune
from tests import _compare

RANKS = 2


class Model(nn.Module):
    """Two branches, one of which may be left out, and buffers that the ranks agree on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        hidden = self.norm(self.first(x)).tanh()
        out: Tensor = self.left(hidden)
        return out + self.right(hidden) if both else out


def summed(model: nn.Module) -> nn.Module:
    """Gradients are added up by the program, between backward and update."""
    return model


def buckets(model: nn.Module, **options: Any) -> nn.Module:
    # Small ones, so that the first is sent while the backward is under way.
    return DistributedDataParallel(model, bucket_cap_mb=1e-4, **options)


def hooked(model: nn.Module) -> nn.Module:
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, fp16_compress_hook)
    return wrapped


def sharded(model: nn.Module) -> nn.Module:
    for part in model.children():
        fully_shard(part)
    return fully_shard(model)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "summed by the program": summed,
    "buckets": buckets,
    "gradients are views of buckets": partial(buckets, gradient_as_bucket_view=True),
    "a branch is left out": partial(buckets, find_unused_parameters=True),
    "added up over two steps": buckets,
    "buckets in float16": hooked,
    "a graph that stays": partial(buckets, static_graph=True),
    "made inside of the context": buckets,
    "sharded parameters": sharded,
}


def train(way: str, device: torch.device, n_steps: int, context: Callable[[], Any]) -> list[Tensor]:
    """Losses, and what is left in the end."""
    torch.manual_seed(0)
    with context() if way == "made inside of the context" else contextlib.nullcontext():
        model = WAYS[way](Model().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    losses = []
    with context():
        for i in range(n_steps):
            x, y = torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)
            waits = way == "added up over two steps" and i % 2 == 0
            with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                out = model(x.to(device), way != "a branch is left out" or i % 3 > 0)
                loss = nn.functional.cross_entropy(out, y.to(device))
                loss.backward()
            if way == "summed by the program":
                for p in model.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= RANKS  # type: ignore[operator]
            losses.append(loss.detach())
            if not waits:
                optimizer.step()
                optimizer.zero_grad()
    state = itertools.chain.from_iterable(state.values() for state in optimizer.state.values())
    return [plain(t) for t in (*losses, *model.parameters(), *model.buffers(), *state)]


def plain(t: Tensor) -> Tensor:
    return (t.to_local() if isinstance(t, DTensor) else t).detach().clone()


def work(rank: int, port: int, kind: str, n_steps: int) -> None:
    """One rank. The first one prints what all have found."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True, warn_only=True)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    found = [(f"{way}, warmup {n}, rank {rank}", told(way, device, n_steps, n)) for way in WAYS for n in (0, 1)]
    everything: list[Any] = [None] * RANKS
    dist.all_gather_object(everything, found)
    if rank == 0:
        print(json.dumps(dict(itertools.chain.from_iterable(everything))))
    # Who ends first takes what the others ask with it.
    dist.barrier()
    dist.destroy_process_group()
    # What is compared has been said. A thread of C++ that is still there when the interpreter ends aborts the process: 1 of 12 of
    # these runs with torch 2.11, in eager alone (KITSUNE=0).
    sys.stdout.flush()
    os._exit(0)


def told(way: str, device: torch.device, n_steps: int, warmup: int) -> str | None:
    """What tells a training under Kitsune from eager's."""
    expected = train(way, device, n_steps, contextlib.nullcontext)
    kitsune.reset()
    got = train(way, device, n_steps, lambda: kitsune.accelerate(warmup=warmup, device=device.type))
    if kitsune.counters()["recorded"] < n_steps:
        return "Kitsune has taken no part"
    found = (f"tensor {k} of {len(got)}: {_compare.difference(a, b)}" for k, (a, b) in enumerate(zip(expected, got, strict=True)))
    return next((words for words in found if not words.endswith(": None")), None)


def main(kind: str = "cpu", n_steps: str = "100") -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, kind, int(n_steps)), nprocs=RANKS)


if __name__ == "__main__":
    main(*sys.argv[1:])
