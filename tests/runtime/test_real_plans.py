"""Plans as they are made for a device, run on the CPU: kernels walk over memory by their strides, or are all broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import kitsune
from kitsune.ir import Access, Graph, Kernel, Load, Local, Plan, Step
from kitsune.planning import plan_for
from kitsune.runtime.calls import bind
from tests.property import steps, steps_autograd  # noqa: F401  (they fill the table)
from tests.property.strategies import programs
from tests.property.test_programs import SLOW
from tests.property.world import Program
from tests.runtime.checked import checked
from tests.runtime.naive import FakeLaunch, at_address
from tests.runtime.programs import PROGRAMS
from tests.runtime.test_plan_executor import Broken


class Walk(FakeLaunch):
    """Runs kernels over their domain, as generated code does: of a value, only the address and the strides are looked at."""

    def _run(self, kernel: Kernel, address: Callable[[Access], int], scalars: list[float]) -> None:
        def memory(access: Access, domain: Any = kernel.domain) -> torch.Tensor:
            return at_address(address(access), access.value.type.dtype, domain, access.strides)

        loaded = [memory(access).clone() for access in kernel.loads]
        registers: dict[Local, torch.Tensor] = {}
        for k, step in enumerate(kernel.steps):
            for n, result in enumerate(self._step(step, kernel.domain, loaded, registers, scalars)):
                registers[Local(k, n)] = result.to(step.op.outputs[n].type.dtype).broadcast_to(kernel.domain)
        for store in kernel.stores:
            # What is one for a whole row is written once. A write that failed would come behind others.
            once = tuple(min(n, 1) if stride == 0 else n for n, stride in zip(kernel.domain, store.access.strides, strict=True))
            memory(store.access, once).copy_(registers[store.source][tuple(map(slice, once))])

    def _step(self, step: Step, domain: Any, loaded: Any, registers: Any, scalars: list[float]) -> list[torch.Tensor]:
        op, table = step.op, dict[int, torch.Tensor]()
        for value, operand in zip(op.inputs, step.operands, strict=True):
            register = torch.zeros(domain, dtype=value.type.dtype)
            if operand is not None:
                register = loaded[operand.index] if isinstance(operand, Load) else registers[operand]
            if not value.type.shape and register.numel():
                # A tensor without dimensions does not take part in the promotion of dtypes as others do.
                register = register[(0,) * len(domain)]
            table[value.id] = register
        for before, _ in op.rewritten:
            table[before.id] = table[before.id].clone()
        values = [table.get(n) for n in range(max(table, default=0) + 1)]
        result = op.target(*[bind(a, values, scalars) for a in op.args], **{n: bind(a, values, scalars) for n, a in op.kwargs})
        if op.rewritten:
            return [table[before.id] for before, _ in op.rewritten]
        return [result] if isinstance(result, torch.Tensor) else list(result)


def plan(graph: Graph) -> Plan:
    return plan_for(graph, "sm_90")


@pytest.mark.parametrize("start", [Walk, Broken])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_programs(program: Any, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(monkeypatch, start=start, plan=plan) as it:
        for _ in range(2):
            with kitsune.accelerate(warmup=0, device="cpu"):
                kept = program()
            del kept
    assert bool(it.told) == (start is Broken and it.n_kernels > 0)


@pytest.mark.parametrize("start", [Walk, Broken])
@settings(SLOW, max_examples=100)
@given(program=programs())
def test_random_programs(start: Any, program: Program) -> None:
    with pytest.MonkeyPatch.context() as patch, checked(patch, start=start, plan=plan) as it:
        for _ in range(2):
            program.run(kitsune.accelerate(warmup=0, device="cpu"))
    assert not it.wrong, it.wrong[0]
    assert not it.told or start is Broken


def overwritten() -> Any:
    x = torch.arange(24.0).view(4, 6)
    x = x * 2
    scratch = x.cumsum(0)
    later = (x * 3).cumsum(0)
    # The value that the library made is never read, so the planner lets it die before the kernel that overwrites it.
    scratch.zero_()
    return scratch + 1, later @ later.t()


def partly_needed() -> Any:
    a, b = torch.arange(6.0) * 2, torch.arange(6.0) * 3
    kitsune.flush()
    c = (a * 2).cumsum(0)
    torch._foreach_copy_([a, b, c], [b * 2, b * 3, b * 4])
    return a, b


def same_memory_twice() -> Any:
    p, state, step = torch.arange(6.0) * 1.5, torch.zeros(6) * 2, torch.tensor(3.0)
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False}
    torch._fused_adamw_([p], [p], [state], [state], [], [step], **numbers)
    return p * 2 + 1, state


def inference() -> Any:
    """Composite operators come by as they are: views that copy, and a normalization that writes its statistics."""
    with torch.inference_mode():
        x = torch.arange(12.0).view(3, 4) * 2
        flat = x.t().reshape(-1)
        x.add_(1)
        wide = x.to(torch.float64)
        x.mul_(3)
        mean, var = torch.zeros(4) * 1, torch.ones(4) * 1
        normal = torch.nn.functional.batch_norm(x, mean, var, training=True)
        before = mean * 2
        torch.nn.functional.instance_norm(x[..., None] + torch.arange(2.0), mean, var)
        return flat * 2, wide + 1, normal, before, mean + 1, var + 1


@pytest.mark.parametrize("start", [Walk, Broken])
@pytest.mark.parametrize("program", [overwritten, partly_needed, same_memory_twice, inference], ids=lambda p: p.__name__)
def test_regressions(program: Any, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(monkeypatch, start=start, plan=plan) as it:
        for _ in range(2):
            with kitsune.accelerate(warmup=0, device="cpu"):
                kept = program()
            del kept
    assert not it.wrong
