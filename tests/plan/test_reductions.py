"""Reductions in kernels: what joins them, what is taken apart for it, and what is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import kitsune
from kitsune.fusion.kernels import in_long_rows
from kitsune.ir import Plan
from tests.plan.recorded import launched, plan_of, reasons

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kitsune.reset()
    yield


def strict(program) -> Plan:
    return plan_of(program, numerics="strict")


def kernels(plan: Plan):
    return [kernel for launch in plan.launches for kernel in launch.kernels]


def test_what_is_before_and_after_a_reduction_joins_it():
    x, w = torch.zeros(4, 6), torch.zeros(6)
    plan = strict(lambda: (F.layer_norm((x + 1).relu(), (6,), w) * 2).to(HALF))
    assert launched(plan) == ["add_relu_native_layer_norm_mul_to_copy"]
    (kernel,) = kernels(plan)
    assert (kernel.domain, kernel.reduced, len(kernel.loads), len(kernel.stores)) == ((4, 6), 1, 2, 1)


def test_bitwise_leaves_reductions_to_the_library():
    x = torch.zeros(4, 6)
    plan = plan_of(lambda: (x + 1).mul(2).softmax(1))
    assert launched(plan) == ["add_mul", "_softmax"]
    assert any("numerics='bitwise'" in reason for reason in reasons(plan))


def test_a_row_level_chain_is_one_kernel():
    x = torch.zeros(4, 6)
    plan = strict(lambda: (x - x.amax(1, keepdim=True)).exp().sum(1).log())
    assert launched(plan) == ["amax_sub_exp_sum_log"]
    assert kernels(plan)[0].stores[0].access.strides == (1, 0)


def test_reductions_of_other_dimensions_are_kept_apart():
    x = torch.zeros(4, 6)
    plan = strict(lambda: ((x + 1).sum(0), (x + 1).sum(1)))
    assert sum(kernel.reduced > 0 for kernel in kernels(plan)) == 2
    assert {"it reduces other dimensions"} & reasons(plan)


def test_a_reduction_of_a_reduction_is_another_kernel():
    x = torch.zeros(4, 6)
    plan = strict(lambda: x.exp().sum(1).sum())
    assert launched(plan) == ["exp_sum", "sum"]
    assert "it reduces what is reduced already" in reasons(plan)


def test_one_view_of_a_row_in_two_dimensions_is_refused():
    x = torch.zeros(4, 4)
    plan = strict(lambda: (s := x.sum(1)) * s[:, None])
    assert any("different orders" in reason for reason in reasons(plan))


def test_a_bias_gradient_is_summed_in_parts_with_what_makes_its_terms():
    grad, x = torch.zeros(4096, 64, dtype=HALF), torch.zeros(4096, 64, dtype=HALF)
    plan = strict(lambda: (g := torch.ops.aten.gelu_backward(grad, x), g.sum(0).float()))
    assert launched(plan) == ["gelu_backward_sum", "sum_to_copy"]
    first, second = kernels(plan)
    # The parts take rows in turn: blocks at work together read what lies together.
    assert first.domain == (8192, 32) and first.loads[0].strides == (1, 8192)
    assert [s.access.value.type.dtype for s in first.stores] == [HALF, torch.float32]
    assert second.n_columns == 128 and second.stores[0].access.value.type.dtype is torch.float32


def test_parts_are_chosen_so_that_what_makes_the_terms_joins_them():
    """Wanted are 86 parts in turn, and 64 of them would cut neither dimension of the gradient evenly; 197 do."""
    grad, x = torch.zeros(64, 197, 768, dtype=HALF), torch.zeros(64, 197, 768, dtype=HALF)
    plan = strict(lambda: (g := torch.ops.aten.gelu_backward(grad, x), g.view(-1, 768).sum(0).float()))
    assert launched(plan) == ["gelu_backward_sum", "sum_to_copy"]
    assert kernels(plan)[0].domain == (197 * 768, 64)


def test_statistics_of_images_in_channels_last_are_made_of_pixels_in_turn():
    x = torch.zeros(32, 64, 32, 32, dtype=HALF).to(memory_format=torch.channels_last)
    plan = strict(lambda: torch.var_mean(x.float(), (0, 2, 3), correction=0))
    first = kernels(plan)[0]
    n_parts = first.n_rows // 64
    assert first.loads[0].strides[-1] == n_parts * 64 and first.n_columns * n_parts == 32 * 32 * 32


def test_a_number_of_rows_without_divisors_is_summed_at_once():
    x = torch.zeros(8191, 64)
    assert launched(strict(lambda: x.sum(0))) == ["sum"]


def test_statistics_of_channels_are_made_in_parts():
    x = torch.zeros(32, 16, 32, 32)
    plan = strict(lambda: torch.var_mean(x, (0, 2, 3), correction=0))
    assert launched(plan) == ["var_mean", "var_mean_mean_add"]
    assert kernels(plan)[0].domain == (512, 1024)


def test_each_plane_of_contiguous_images_is_a_row_where_there_are_many():
    x = torch.zeros(64, 16, 32, 32)
    first, second = kernels(strict(lambda: torch.var_mean(x, (0, 2, 3), correction=0)))
    assert first.domain == (64 * 16, 1024) and second.n_rows == 16
    # Planes of 256 are short rows, and two images have too few elements for another launch to pay.
    assert kernels(strict(lambda: x.view(16, 256, 16, 16).sum((0, 2, 3))))[0].domain == (256, 16, 256)
    assert kernels(strict(lambda: torch.zeros(2, 256, 32, 32).sum((0, 2, 3))))[0].domain == (256, 2, 1024)


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom is <= 0")
def test_a_deviation_of_long_rows_is_made_in_parts_too():
    x = torch.zeros(4096, 64, dtype=HALF)
    (first, second) = kernels(strict(lambda: torch.std(x, 0)))
    assert first.n_columns < 4096 and second.n_columns == 4096 // first.n_columns
    assert second.name == "var_mean_mean_add_mul_sqrt_to_copy"
    factors = [op.args[1] for op in strict(lambda: torch.var(x, 0)).graph.ops if op.target is torch.ops.aten.mul.Tensor]
    assert factors == [4096 / 4095]
    assert launched(strict(lambda: torch.var(x, 0, correction=4096))) == ["var"], "rows as long as the correction have none"


def test_parts_may_be_far_more_or_fewer_than_wanted_where_the_rows_have_few_divisors():
    """1024 are wanted of 64 columns, 128 of 512: there are 8191 and 79, which leave 37 and 79 rows for each."""
    assert kernels(strict(lambda: torch.zeros(37 * 8191, 64).sum(0)))[0].domain == (8191 * 64, 37)
    assert kernels(strict(lambda: torch.zeros(79 * 79, 512).sum(0)))[0].domain == (79 * 512, 79)
    assert kernels(strict(lambda: torch.zeros(127 * 16381, 4).sum(0)))[0].n_columns == 16381, (
        "an eighth, and not 16 times as many"
    )


def test_far_more_parts_than_wanted_give_way_to_stretches():
    """29 are wanted of 2304 columns: 197 in turn fit the images, and so do 32 stretches of two images each."""
    x = torch.zeros(64, 197, 2304, dtype=HALF)
    assert kernels(strict(lambda: (x * 2).view(-1, 2304).sum(0)))[0].domain == (32, 2304, 2 * 197)


def norm_backward(rows: int, dtype: torch.dtype):
    grad, x = torch.zeros(rows, 64, dtype=HALF), torch.zeros(rows, 64)
    mean, rstd, w = torch.zeros(rows, 1), torch.ones(rows, 1), torch.ones(64)
    aten = torch.ops.aten
    return lambda: aten.native_layer_norm_backward(grad.to(dtype), x, [64], mean, rstd, w, w, [True, True, True])


def test_the_gradients_of_a_layer_norm_are_a_kernel_along_rows_and_one_across():
    plan = strict(norm_backward(4096, torch.float32))
    assert launched(plan) == ["to_copy_native_layer_norm_backward", "sub_mul_sum", "sum x 2"]
    along, across, *_ = kernels(plan)
    # Nobody needs the gradient in float32: each of the two widens it.
    assert all(HALF in [access.value.type.dtype for access in kernel.loads] for kernel in (across, along))
    assert len(along.stores) == 1


def cross_entropy(keep: bool):
    x = torch.zeros(512, 100, dtype=HALF)
    target = torch.zeros(512, dtype=torch.int64)

    def program():
        log = torch.ops.aten._log_softmax(x.float(), 1, False)
        loss, weight = torch.ops.aten.nll_loss_forward(log, target, None, 1, -100)
        grad = torch.ops.aten.nll_loss_backward(torch.ones_like(loss), log, target, None, 1, -100, weight)
        grad = torch.ops.aten._log_softmax_backward_data(grad, log, 1, torch.float32).to(HALF)
        return (loss, grad, log) if keep else (loss, grad)

    return program


def test_cross_entropy_reads_logits_once_forward_and_once_backward():
    plan = strict(cross_entropy(False))
    wide = [a for k in kernels(plan) for a in (*k.loads, *(s.access for s in k.stores)) if a.value.type.shape.numel() == 51200]
    assert [access.value.type.dtype for access in wide] == [HALF, HALF, HALF]
    assert not any(launch.op for launch in plan.launches if not launch.host_only)


def test_logarithms_that_somebody_sees_are_written():
    plan = strict(cross_entropy(True))
    assert any(torch.float32 in [s.access.value.type.dtype for s in k.stores] and k.n_elements == 51200 for k in kernels(plan))
    assert "nll_loss_forward" in launched(plan)


def test_logits_that_are_overwritten_are_not_read_again():
    y = torch.zeros(512, 100)
    target = torch.zeros(512, dtype=torch.int64)

    def program():
        log = torch.ops.aten._log_softmax(y, 1, False)
        loss, weight = torch.ops.aten.nll_loss_forward(log, target, None, 1, -100)
        y.mul_(0)
        grad = torch.ops.aten.nll_loss_backward(torch.ones_like(loss), log, target, None, 1, -100, weight)
        return loss, torch.ops.aten._log_softmax_backward_data(grad, log, 1, torch.float32)

    assert "nll_loss_forward" in launched(strict(program))


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batch_norm_takes_its_rectifier_in_and_keeps_no_wide_copy(format_):
    x = torch.zeros(32, 16, 32, 32, dtype=HALF).to(memory_format=format_)
    w, mean, var = torch.ones(16), torch.zeros(16), torch.ones(16)
    plan = strict(lambda: torch.ops.aten.native_batch_norm(x, w, w, mean, var, True, 0.1, 1e-5)[0].relu())
    assert len(kernels(plan)) == 3 and not any(launch.op for launch in plan.launches if not launch.host_only)
    stored = [s.access.value.type for k in kernels(plan) for s in k.stores]
    assert sum(type_.shape.numel() >= x.numel() for type_ in stored) == 1
    last = kernels(plan)[-1]
    assert last.reduced == 0 and last.stores[0].access.value.type.stride == x.stride()


def test_what_is_broadcast_along_large_images_is_loaded_once_for_a_row():
    def last(n: int, dims: str):
        x = torch.zeros(n, 64, 32, 32, dtype=HALF).to(memory_format=getattr(torch, dims))
        w, mean, var = torch.ones(64), torch.zeros(64), torch.ones(64)
        return kernels(strict(lambda: torch.ops.aten.native_batch_norm(x, w, w, mean, var, True, 0.1, 1e-5)[0].relu()))[-1]

    kernel = last(32, "channels_last")
    assert (kernel.domain, kernel.reduced) == ((2048, 64, 16), 1)
    assert [access.strides for access in kernel.loads] == [(1024, 1, 64)] + 3 * [(0, 1, 0)]
    planes = last(32, "contiguous_format")
    assert (planes.domain, planes.reduced) == ((32, 64, 1024), 1)
    assert [access.strides for access in planes.loads] == [(65536, 1024, 1)] + 3 * [(0, 1, 0)]
    # Neighbours in a row are to be neighbours in memory, for each operand.
    by_elements = replace(planes, reduced=0)
    apart = replace(planes.loads[0], strides=(131072, 2048, 2))
    assert str(in_long_rows(by_elements)) == str(planes)
    assert in_long_rows(replace(by_elements, loads=(apart, *planes.loads[1:]))) is None
    # A small one is not worth another text.
    assert last(4, "channels_last").reduced == 0 and last(4, "contiguous_format").reduced == 0


def test_a_bias_alone_is_broadcast_for_each_element():
    x, b = torch.zeros(1 << 16, 64, dtype=HALF), torch.zeros(64)
    (kernel,) = kernels(strict(lambda: ((x + b) * 2).to(HALF)))
    assert kernel.reduced == 0


def test_batch_norm_of_an_evaluation_is_the_librarys():
    x = torch.zeros(32, 16, 8, 8)
    w, mean, var = torch.ones(16), torch.zeros(16), torch.ones(16)
    plan = strict(lambda: torch.ops.aten.native_batch_norm(x, w, w, mean, var, False, 0.1, 1e-5)[0].relu())
    assert launched(plan)[0] == "native_batch_norm"


def test_a_sum_in_parts_of_an_input_shares_no_load_with_a_view_from_elsewhere():
    # Both had offset 0 from one root: of a view it counts from the start of the memory, of an input from where that begins.
    memory = torch.zeros(32768 * 768 + 200)
    x, rows = memory[100:][: 32768 * 768].view(32768, 768), torch.tensor([1, 5])

    def program():
        x.index_fill_(0, rows, 3.0)
        return x.sum(0), torch.as_strided(x, (512, 64, 768), (49152, 768, 1), 0).sum(0)

    (kernel,) = [kernel for kernel in kernels(strict(program)) if len(kernel.steps) == 2]
    assert [step.op.target._opname for step in kernel.steps] == ["sum", "sum"] and len(kernel.loads) == 2


def test_a_sum_in_parts_of_an_input_shares_its_load():
    x, w = torch.zeros(32768, 768), torch.zeros(768)
    plan = strict(lambda: ((x * w).sum(1), x.sum(0)))
    kernel = kernels(plan)[0]
    assert kernel.gathered and len(kernel.loads) == 2
