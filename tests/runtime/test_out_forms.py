"""Out= forms: they exist for the ops that matter, use the memory that they are given, and compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kitsune.dispatch import describe
from kitsune.ir import Effects, Op, Operand, OpRow, Value, describe_result, type_of
from kitsune.runtime.calls import call, call_into
from kitsune.runtime.out_forms import out_form, out_names

aten = torch.ops.aten
X, Y, W, B = torch.randn(64, 96), torch.randn(64, 96), torch.randn(96, 80), torch.randn(80)
X3, W3 = torch.randn(4, 64, 96), torch.randn(4, 96, 80)
IMAGE = torch.randn(2, 3, 32, 32)
CLASSES = torch.arange(64) % 96
SOFT = X.softmax(1)

HAVE: list[tuple[Any, ...]] = [
    (aten.mm.default, X, W),
    (aten.addmm.default, B, X, W),
    (aten._addmm_activation.default, B, X, W),
    (aten.bmm.default, X3, W3),
    (aten.baddbmm.default, torch.randn(4, 64, 80), X3, W3),
    (aten.sum.dim_IntList, X, [0]),
    (aten.mean.dim, X, [1], True),
    (aten.amax.default, X, [1]),
    (aten.amin.default, X, [1]),
    (aten.max.dim, X, 1),
    (aten.argmax.default, X, 1),
    (aten.cumsum.default, X, 1),
    (aten.prod.dim_int, X, 1),
    (aten.var.correction, X, [1]),
    (aten.linalg_vector_norm.default, X, 2, [1]),
    (aten.glu.default, X),
    (aten.tril.default, X),
    (aten.scatter_add.default, X, 1, CLASSES[:, None], Y),
    (aten._softmax.default, X, 1, False),
    (aten._log_softmax.default, X, 1, False),
    (aten._softmax_backward_data.default, Y, SOFT, 1, torch.float32),
    (aten._log_softmax_backward_data.default, Y, SOFT.log(), 1, torch.float32),
    (aten.nll_loss_forward.default, X, CLASSES, None, 1, -100),
    (aten.nll_loss_backward.default, torch.ones(()), X, CLASSES, None, 1, -100, torch.tensor(64.0)),
    (aten.cat.default, [X, Y, X], 1),
    (aten.gelu.default, X),
    (aten.gelu_backward.default, Y, X),
    (aten.silu.default, X),
    (aten.threshold_backward.default, Y, X, 0),
    (aten.tanh_backward.default, Y, X),
    (aten.add.Tensor, X, Y),
    (aten.mul.Tensor, X, 2.0),
    (aten.lt.Tensor, X, Y),
    (aten.where.self, X > 0, X, Y),
    (aten.addcmul.default, X, X, Y),
    (aten.index_select.default, X, 0, CLASSES % 64),
    (aten.index.Tensor, X, [CLASSES % 64]),
    (aten.gather.default, X, 1, CLASSES[:, None]),
    (aten.max_pool2d_with_indices.default, IMAGE, [2, 2]),
    (aten.avg_pool2d.default, IMAGE, [2, 2]),
]
HAVE_NOT: list[tuple[Any, ...]] = [
    (aten.native_layer_norm.default, X, [96], None, None, 1e-5),
    (aten.clone.default, X),
    (aten.any.dim, X, 1),
    (aten._to_copy.default, X),
    (aten.t.default, X),
    (aten.add_.Tensor, X.clone(), Y),
    (aten.bernoulli.default, SOFT),
    (aten.relu.default, X.t()),
    (aten.relu.default, IMAGE.contiguous(memory_format=torch.channels_last)),
    (aten.embedding.default, W, CLASSES),
]


def op_of(target: Any, *args: Any) -> tuple[Op, list[Any]]:
    """The op of a call, and its operands."""
    tensors: list[torch.Tensor] = []
    values: list[Value] = []

    def bound(a: Any) -> Any:
        if isinstance(a, list):
            return tuple(bound(x) for x in a)
        if not isinstance(a, torch.Tensor):
            return a
        tensors.append(a)
        values.append(Value(len(values), type_of(a), len(values)))
        return values[-1]

    op_args = tuple(bound(a) for a in args)
    row: OpRow = describe(target)
    spec, _ = describe_result(target(*args), tensors, type_of)
    n = len(values)
    results = tuple(Value(n + k, type_, n + k) for k, (type_, _) in enumerate(spec.results))
    rewritten = ((values[0], Value(n, values[0].type, 0, 1)),) if isinstance(spec.structure, Operand) else ()
    effects = Effects(tuple(after.storage for _, after in rewritten), row.random)
    op = Op(target, row.kind, op_args, (), tuple(values), spec.structure, results, rewritten, effects)
    return op, [*tensors, *[None] * (len(results) + 1)]


def name_of(case: tuple[Any, ...]) -> str:
    return str(case[0]).removeprefix("aten.")


@pytest.mark.parametrize("case", HAVE, ids=name_of)
def test_the_memory_given_is_used_and_the_values_are_the_same(case: tuple[Any, ...]) -> None:
    op, values = op_of(*case)
    form = out_form(op)
    assert form is not None
    call(op, values, [])
    expected = [values[v.id] for v in op.results]
    memory = [torch.full(v.type.shape, 77, dtype=v.type.dtype) for v in op.results]
    addresses = [m.data_ptr() for m in memory]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        call_into(op, form, out_names(form), memory, values, [])
    for value, address, wanted in zip(op.results, addresses, expected, strict=True):
        got = values[value.id]
        assert got.data_ptr() == address
        assert got.stride() == wanted.stride()
        assert torch.equal(got, wanted)
    # No second copy of the result on the way: allocations are those of workspaces.
    allocated = max([event.self_cpu_memory_usage for event in seen.key_averages()], default=0)
    assert allocated < max(v.type.nbytes for v in op.results) or allocated < 4096


@pytest.mark.parametrize("case", HAVE_NOT, ids=name_of)
def test_ops_without_a_form_of_their_own(case: tuple[Any, ...]) -> None:
    op, _ = op_of(*case)
    assert out_form(op) is None
