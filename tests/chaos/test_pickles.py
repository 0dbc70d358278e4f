"""Pickles, copies and files of what is pending, in mid-step; they load where Kitsune is not installed."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chaos.counting import FULL, Counts, Loop, lazily


def saved(thing: Any) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": lambda thing: loaded(saved(thing)),
    "deepcopy": copy.deepcopy,
}
STATE: dict[str, Callable[[Loop], Any]] = {
    "model": lambda loop: loop.model,
    "state of the model": lambda loop: loop.model.state_dict(),
    "optimizer": lambda loop: loop.optimizer.state_dict(),
    "gradients": lambda loop: [p.grad for p in loop.model.parameters()],
    "loss": lambda loop: loop.losses[-1],
    "all": lambda loop: {"model": loop.model, "loss": loop.losses[-1], "optimizer": loop.optimizer.state_dict()},
}


def tensors(thing: Any) -> list[Any]:
    """Everything in it, in order."""
    if isinstance(thing, torch.nn.Module):
        return tensors(thing.state_dict())
    if isinstance(thing, dict):
        return [part for key in thing for part in tensors(thing[key])]
    if isinstance(thing, (list, tuple)):
        return [part for x in thing for part in tensors(x)]
    return [thing.detach().clone() if isinstance(thing, torch.Tensor) else thing]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", STATE)
def test_in_mid_step(what: str, way: str, counts: Counts) -> None:
    def program(context: Callable[[], Any]) -> list[Any]:
        loop, seen = Loop(), []
        with context():
            for i in range(5):
                loss = loop.loss(i)
                loss.backward()
                loop.losses.append(loss.detach())
                seen.append(WAYS[way](STATE[what](loop)))
                loop.optimizer.step()
                seen.append(WAYS[way](STATE[what](loop)))
                loop.optimizer.zero_grad()
        assert {type(t) for t in tensors(seen) if isinstance(t, torch.Tensor)} <= {torch.Tensor}
        return [*tensors(seen), *loop.state()]

    counts.check(f"{what} by {way}", program)


@pytest.mark.skipif(not FULL, reason="another process, 3 s: make chaos")
def test_files_load_where_kitsune_is_not_installed(tmp_path: Path, counts: Counts) -> None:
    loop = Loop()
    with lazily():
        for i in range(4):
            loop.step(i)
        loss = loop.loss(4)
        things = {"loss": loss.detach(), "model": loop.model, "optimizer": loop.optimizer.state_dict()}
        torch.save(things, tmp_path / "file.pt")
        (tmp_path / "pickle").write_bytes(pickle.dumps(things))
        value = loss.item()
    program = (
        "import sys, pickle, torch; sys.modules['kitsune'] = None\n"
        f"a = torch.load({str(tmp_path / 'file.pt')!r}, weights_only=False)\n"
        f"b = pickle.loads(open({str(tmp_path / 'pickle')!r}, 'rb').read())\n"
        "print(type(a['loss']).__name__, a['loss'].item(), b['loss'].item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False)
    counts.compare("elsewhere", f"Tensor {value} {value}\n", done.stdout or done.stderr)
