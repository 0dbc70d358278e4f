"""What `import kitsune` offers, and what it costs at import."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import kitsune


def test_the_public_names_are_these() -> None:
    assert sorted(kitsune.__all__) == [
        "KitsuneOptimizer",
        "KitsuneWarning",
        "StreamConfig",
        "accelerate",
        "config",
        "counters",
        "disable",
        "explain",
        "flush",
        "last_plan",
        "reset",
        "set_stance",
        "verify",
        "wait_for_kernels",
    ]


@pytest.mark.parametrize("name", kitsune.__all__)
def test_a_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(kitsune, name))


def test_everything_that_a_module_exports_exists() -> None:
    for name in ("amp", "fusion", "ir", "dispatch", "lazy", "runtime", "profiler", "scheduler", "session"):
        module = importlib.import_module(f"kitsune.{name}")
        assert [n for n in module.__all__ if not hasattr(module, n)] == []


def test_import_loads_neither_a_compiler_nor_fake_tensors() -> None:
    # FakeTensor costs a second at its first op, dynamo and sympy as much at import: neither may come with us.
    code = (
        "import sys, torch; before = set(sys.modules); import kitsune; "
        "print([m for m in set(sys.modules) - before if m.startswith(('torch._dynamo', 'torch._inductor', 'sympy', 'triton'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# With warmup=0 torch's own meta kernels load dynamo, 1 to 2 s once: the default, warmup=1, needs none of them.
def test_steps_load_neither() -> None:
    code = (
        "import sys, torch, kitsune; before = set(sys.modules)\n"
        "for _ in range(3):\n"
        "    with kitsune.accelerate(device='cpu'):\n"
        "        w = torch.ones(3, requires_grad=True); (w * 2).sum().backward()\n"
        "bad = ('torch._dynamo', 'torch._inductor', 'torch._subclasses.fake_tensor', 'triton')\n"
        "print([m for m in set(sys.modules) - before if m.startswith(bad)], w.grad.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] [2.0, 2.0, 2.0]"
