"""Which ops become one kernel: kernel counts, loads and stores, and the reasons of what was kept apart."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kitsune
from tests.plan.recorded import launched, plan_of, reasons


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


@pytest.fixture
def x() -> torch.Tensor:
    return torch.zeros(4, 6)


def kernel_of(plan):
    kernels = [kernel for launch in plan.launches for kernel in launch.kernels]
    assert len(kernels) == 1
    return kernels[0]


def test_a_chain_is_one_kernel_that_reads_once_and_writes_once(x):
    kernel = kernel_of(plan_of(lambda: torch.tanh((x + 1) * x).relu()))
    assert kernel.name == "add_mul_tanh_relu"
    assert (len(kernel.loads), len(kernel.stores)) == (1, 1)
    assert kernel.domain == (24,)
    assert kernel.nbytes == 2 * x.nbytes


def test_one_op_alone_stays_with_the_library(x):
    plan = plan_of(lambda: x + 1)
    assert launched(plan) == ["add"]
    assert not plan.launches[0].kernels


def test_both_operands_of_an_op_join_it(x):
    assert launched(plan_of(lambda: (x + 1) * (x - 1).exp())) == ["add_sub_exp_mul"]


def test_ops_that_read_the_same_join(x):
    plan = plan_of(lambda: (x + 1, x * 2))
    assert launched(plan) == ["add_mul"]
    assert len(kernel_of(plan).loads) == 1


def test_what_a_library_call_reads_is_stored(x):
    plan = plan_of(lambda: (y := (x + 1) * 2).sum() + y.mul(3).sum())
    kernel = next(launch.kernels[0] for launch in plan.launches if launch.kernels and "add" in launch.name)
    assert len(kernel.stores) == 2


def test_an_intermediate_that_nobody_reads_has_no_memory(x):
    plan = plan_of(lambda: (x + 1) * 2)
    assert plan.arena == 0 and plan.offsets == {}


def test_a_transposed_view_is_folded_into_indexing(x):
    y = torch.zeros(6, 4)
    kernel = kernel_of(plan_of(lambda: (x + 1).t() * y))
    assert kernel.domain == (4, 6) or kernel.domain == (6, 4)
    assert {access.strides for access in kernel.loads} in ({(1, 6), (4, 1)}, {(6, 1), (1, 4)})


def test_a_reshape_that_splits_and_merges_is_folded(x):
    y = torch.zeros(8, 3)
    kernel = kernel_of(plan_of(lambda: (x + 1).view(2, 2, 6).reshape(8, 3) * y))
    assert kernel.domain == (24,)


def test_a_broadcast_operand_has_stride_zero(x):
    row = torch.zeros(6)
    kernel = kernel_of(plan_of(lambda: (x + row).relu()))
    assert [access.strides for access in kernel.loads] == [(6, 1), (0, 1)]


def test_a_view_in_two_orders_is_refused():
    x = torch.zeros(4, 4)
    plan = plan_of(lambda: (y := x + 1) * y.t())
    assert launched(plan) == ["add", "mul"]
    assert any("different orders" in reason for reason in reasons(plan))


def test_a_broadcast_result_is_refused(x):
    row = torch.zeros(6)
    plan = plan_of(lambda: (row + 1) * x)
    assert launched(plan) == ["add", "mul"]
    assert "it works on another number of elements" in reasons(plan)


def test_a_part_of_a_result_is_refused(x):
    plan = plan_of(lambda: (x + 1)[1:] * 2)
    assert launched(plan) == ["add", "mul"]


def test_an_operator_between_keeps_two_apart(x):
    plan = plan_of(lambda: (y := x + 1) * y.sum())
    assert launched(plan) == ["add", "sum", "mul"]
    assert "another operator lies between them" in reasons(plan)


def test_a_reduction_is_named_as_the_reason(x):
    said = reasons(plan_of(lambda: (x + 1).sum(), numerics="bitwise"))
    assert said == {"aten.sum.default is a reduction, and numerics='bitwise' keeps eager's order of summation"}


def test_writes_in_place_are_fused_and_stored_once(x):
    y = torch.zeros(4, 6)
    plan = plan_of(lambda: y.add_(x).mul_(2).relu_())
    kernel = kernel_of(plan)
    assert [store.access.value.storage for store in kernel.stores] == [plan.graph.inputs[0].storage]
    assert len(kernel.loads) == 2


def test_a_write_through_a_view_is_a_kernel_on_that_view(x):
    base = torch.zeros(4, 6, requires_grad=True)

    def program():
        y = base * 1
        y[1].add_(1).mul_(2)
        return y

    plan = plan_of(program)
    assert launched(plan) == ["mul", "add_mul"]
    assert plan.launches[-1].kernels[0].domain == (6,)


def test_a_write_that_a_read_through_another_view_would_meet_is_refused():
    base = torch.zeros(4, 4, requires_grad=True)

    def program():
        y = base * 1
        z = y.t() + 1
        y.mul_(z)
        return y

    plan = plan_of(program)
    assert sum(bool(launch.kernels) for launch in plan.launches) == 1
    assert any("order" in reason for reason in reasons(plan))


def test_a_copy_within_one_tensor_is_no_kernel():
    x = torch.zeros(8, requires_grad=True)

    def program():
        y = x * 1
        y[:2].copy_(y[6:])
        return y

    plan = plan_of(program)
    assert launched(plan) == ["mul", "copy_"]
    assert not any(launch.kernels for launch in plan.launches)


def test_two_inputs_that_share_memory_are_not_mixed():
    memory = torch.zeros(8)
    low, shifted = memory[:6], memory[1:7]

    def program():
        low.add_(1)
        return shifted * 2

    plan = plan_of(program)
    assert not any(launch.kernels for launch in plan.launches)
    assert "it reads memory that the kernel writes, through another tensor" in reasons(plan)


def test_an_overwritten_operand_is_not_read(x):
    y = torch.zeros(4, 6)
    kernel = kernel_of(plan_of(lambda: y.copy_(x + 1)))
    assert len(kernel.loads) == 1


def test_equal_casts_of_several_tensors_are_one_launch():
    weights = [torch.zeros(5, n) for n in (3, 4, 5)]
    plan = plan_of(lambda: [w.to(torch.bfloat16) for w in weights])
    assert launched(plan) == ["to_copy x 3"]


def test_equal_kernels_in_a_chain_are_not_started_together():
    x = torch.zeros(4, 4)

    def program():
        y = (x @ x).add(1).relu()
        return (y @ y).add(1).relu()

    assert launched(plan_of(program)) == ["mm", "add_relu", "mm", "add_relu"]


def test_a_list_call_joins_the_kernels_around_it():
    tensors = [torch.zeros(n) for n in (3, 4)]

    def program():
        torch._foreach_mul_(tensors, 0.5)
        torch._foreach_add_(tensors, tensors)

    plan = plan_of(program)
    assert launched(plan) == ["mul_add x 2"]
    assert len(plan.launches[0].ops) == 4


def test_a_part_of_a_list_call_that_nobody_needs_is_not_launched():
    x, y = torch.zeros(6), torch.ones(6)

    def program():
        torch._foreach_copy_([x, x.cumsum(0)], [y, y])

    assert launched(plan_of(program)) == ["_foreach_copy_"]


def test_fuel_bounds_the_fusions(x):
    names = [launched(plan_of(lambda: torch.tanh((x + 1) * x).relu(), fuel=n)) for n in range(4)]
    assert list(map(len, names)) == [4, 3, 2, 1]


def test_a_kernel_has_at_most_64_ops(x):
    def program():
        y = x
        for _ in range(100):
            y = torch.sin(y)
        return y

    plan = plan_of(program)
    assert [len(launch.ops) for launch in plan.launches] == [64, 36]
    assert "the kernel would have more than 64 operators" in reasons(plan)


def test_random_ops_keep_their_order(x):
    plan = plan_of(lambda: (torch.rand_like(x) + 1, torch.bernoulli(x) * 2, torch.rand_like(x)))
    random = [name for name in launched(plan) if name in ("rand_like", "bernoulli")]
    assert random == ["rand_like", "bernoulli", "rand_like"]


def test_a_buffer_that_no_kernel_reads_is_no_operand() -> None:
    x, grad = torch.randn(64), torch.randn(64)

    def program() -> torch.Tensor:
        _, buffer = torch.ops.aten.log_sigmoid_forward(x)
        return torch.ops.aten.log_sigmoid_backward(grad * 2, x, buffer) + 1

    steps = [step for launch in plan_of(program).launches for kernel in launch.kernels for step in kernel.steps]
    (backward,) = (step for step in steps if step.op.target._opname == "log_sigmoid_backward")
    assert backward.operands[2] is None and None not in backward.operands[:2]
