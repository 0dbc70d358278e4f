"""What is known of an aten overload before it is called: one row each, made from its schema, its tags and the sets below."""

from functools import cache
from typing import Any

import torch
from torch import Tag
from torch._ops import OpOverload

from kitsune.ir import BACKWARDS_WITH_PLANS, Barrier, Kind, OpRow

# Pointwise in fact, but not tagged so by torch.
POINTWISE = set(
    "add_relu clone copy copy_ fill fill_ zero_ zero _to_copy where masked_fill masked_fill_ native_dropout_backward "
    "threshold_backward gelu_backward silu_backward sigmoid_backward tanh_backward hardtanh_backward elu_backward "
    "leaky_relu_backward softplus_backward hardswish_backward hardsigmoid_backward mish_backward log_sigmoid_backward "
    "mse_loss_backward smooth_l1_loss_backward huber_loss_backward tril triu lerp lerp_ addcmul addcmul_ addcdiv addcdiv_ "
    "_fused_adam_ _fused_adamw_ _fused_sgd_ _fused_adagrad_ _amp_foreach_non_finite_check_and_unscale_ _amp_update_scale_ "
    "ones_like zeros_like full_like masked_fill".split()
)
REDUCTION = set(
    "sum mean amax amin aminmax max min argmax argmin prod any all var std var_mean std_mean norm linalg_vector_norm "
    "logsumexp nansum cumsum cumprod _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data "
    "_foreach_norm _foreach_max count_nonzero native_layer_norm native_layer_norm_backward nll_loss_forward nll_loss_backward "
    "mse_loss l1_loss smooth_l1_loss huber_loss native_group_norm native_group_norm_backward _fused_rms_norm".split()
)
GEMM = set("mm addmm addmm_ bmm baddbmm baddbmm_ mv addmv dot vdot addbmm _addmm_activation".split())
# Not pointwise, reduction, view or matrix product, but torch's meta kernels give the layout that the kernels give.
TRUSTED = set(
    "empty zeros ones full arange eye linspace logspace scalar_tensor new_empty new_zeros new_ones new_full empty_like rand_like "
    "randn_like randint_like rand randn randint randperm bernoulli native_dropout cat stack index index_select gather scatter "
    "scatter_add embedding embedding_dense_backward flip roll repeat constant_pad_nd slice_backward select_backward "
    "empty_strided new_empty_strided select_scatter slice_scatter tril_indices triu_indices".split()
)
# Results that share memory with an operand although the schema does not say so.
UNDECLARED_VIEW = {"_unsafe_view", "lift_fresh", "unsafe_split", "unsafe_split_with_sizes"}
# Operands that are written although the schema does not say so.
# The last three are composite, and come by as they are in inference mode only.
UNDECLARED_WRITES = dict.fromkeys(
    "native_batch_norm cudnn_batch_norm miopen_batch_norm batch_norm_gather_stats batch_norm_gather_stats_with_counts "
    "batch_norm instance_norm _batch_norm_impl_index".split(),
    ((3, "running_mean"), (4, "running_var")),
)
# Views whose error cases depend on the size of the memory behind an operand, which its type does not tell.
UNTRUSTED_VIEW = {"as_strided", "_reshape_alias", "view_as_complex"}
# Whether these raise depends on the float they are given (infinity into an int): another float is another call.
CHECKS_SCALAR = {"fill", "fill_", "full_like", "masked_fill", "masked_fill_"}
# Their kernels call products, which autocast casts for; torch takes them apart for nobody.
CASTS_INSIDE = {"_trilinear", "affine_grid_generator", "linalg_pinv"}
# Reads values on the host.
ITEM = {"_local_scalar_dense", "item", "equal", "is_nonzero", "_is_all_true", "_is_any_true", "_assert_async"}
# The number of results' elements, or an error, depends on values, and torch does not tag them so.
DATA_DEPENDENT = set(
    "_pack_padded_sequence _ctc_loss ctc_loss segment_reduce _segment_reduce_backward _embedding_bag repeat_interleave "
    "_embedding_bag_forward_only _unique _unique2 unique_dim unique_consecutive nonzero_static histogramdd "
    "_histogramdd_bin_edges _histogramdd_from_bin_cts _efficientzerotensor _linalg_check_errors".split()
)
# Tagged as data-dependent by torch, but so only if an operand is a mask and not a list of positions.
COUNTS_MASKS = {"index", "_unsafe_index"}
# Moves metadata or storage of an operand (`addbmm_` gives a small one the size of the product); `detach_` cuts an autograd edge,
# which a recorded op could not.
METADATA = set(
    "set_ set_data resize_ resize_as_ _resize_output_ resize_as_sparse_ detach_ record_stream share_memory_ addbmm_".split()
)
# Namespaces of operators that others than the program's own stream go on with.
COLLECTIVES = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "fsdp", "symm_mem"}


@cache
def describe(target: OpOverload) -> OpRow:
    """The row of an overload."""
    if not isinstance(target, OpOverload):  # a higher-order operator, which runs Python
        return OpRow(target, Kind.EXTERN, barrier=Barrier.FOREIGN_NAMESPACE, detour=True, is_foreign=True)
    name = _base_name(target)
    kind = _kind(target, name)
    writes = _writes(target, name)
    in_place = bool(writes) and name not in UNDECLARED_WRITES
    composite = _is_composite(target)
    barrier = _barrier(target, name)
    known = kind is not Kind.EXTERN and name not in UNTRUSTED_VIEW
    returns_operands = in_place and all(r.alias_info and r.alias_info.is_write for r in target._schema.returns)
    return OpRow(
        target=target,
        kind=kind,
        writes=writes,
        random=Tag.nondeterministic_seeded in target.tags,
        barrier=barrier,
        scalars_move=kind is Kind.POINTWISE and Tag.nondeterministic_seeded not in target.tags and name not in CHECKS_SCALAR,
        trusted=known or name in TRUSTED or returns_operands,
        in_place=in_place,
        composite=composite,
        detour=barrier is not None or in_place or kind is Kind.VIEW or composite,
        is_view=kind is Kind.VIEW,
        sees_grad_mode=kind is Kind.EXTERN,
        bumps=name.startswith("_foreach_") and in_place and not _has_version_kernel(target),
        functional=_functional(target, name),
        counts_masks=name in COUNTS_MASKS,
        moves_metadata=barrier in (Barrier.METADATA, Barrier.OUT_VARIANT),
        is_foreign=target.namespace != "aten",
        works_aside=target.namespace in COLLECTIVES,
        makes_plans=name in BACKWARDS_WITH_PLANS,
    )


def _base_name(target: OpOverload) -> str:
    return target._schema.name.partition("::")[2]


def _kind(target: OpOverload, name: str) -> Kind:
    if name in UNDECLARED_VIEW or any(r.alias_info and not r.alias_info.is_write for r in target._schema.returns):
        return Kind.VIEW
    if name in GEMM:
        return Kind.GEMM
    if name in REDUCTION:
        return Kind.REDUCTION
    if name in POINTWISE or Tag.pointwise in target.tags or name.startswith("_foreach_"):
        return Kind.POINTWISE
    return Kind.EXTERN


def _writes(target: OpOverload, name: str) -> tuple[tuple[int, str], ...]:
    declared = tuple(
        (i, a.name) for i, a in enumerate(target._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    )
    return declared or UNDECLARED_WRITES.get(name, ())


def _has_version_kernel(target: OpOverload) -> bool:
    return _has_kernel(target, "ADInplaceOrView")


def _has_kernel(target: OpOverload, key: str) -> bool:
    # Questions that torch asks of a subclass's sizes (`sym_size`, `is_non_overlapping_and_dense`) are no operators of the
    # dispatcher's: it raises for them, which C++ that asks for a size cannot pass on, and the process ends.
    name = target.name()
    return torch._C._dispatch_has_kernel(name) and bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


def _is_composite(target: OpOverload) -> bool:
    own = (_has_kernel(target, key) for key in ("CPU", "CUDA", "ADInplaceOrView"))
    return target.namespace == "aten" and _has_kernel(target, "CompositeImplicitAutograd") and not any(own)


def _functional(target: OpOverload, name: str) -> OpOverload | None:
    if Tag.inplace_view not in target.tags or name in METADATA:
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    # By its arguments: that of `transpose_.default` is `transpose.int`.
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    same = [one for one in overloads if _arguments(one) == _arguments(target)]
    return same[0] if same and _kind(same[0], name.removesuffix("_")) is Kind.VIEW else None


def _arguments(target: OpOverload) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]


def _barrier(target: OpOverload, name: str) -> Barrier | None:
    if target.namespace == "profiler":
        return Barrier.PROFILER
    if target.namespace != "aten":
        return Barrier.FOREIGN_NAMESPACE
    if name in ITEM:
        return Barrier.ITEM
    tagged = Tag.dynamic_output_shape in target.tags or Tag.data_dependent_output in target.tags
    if (tagged and name not in COUNTS_MASKS) or name in DATA_DEPENDENT:
        return Barrier.DATA_DEPENDENT
    if Tag.inplace_view in target.tags or name in METADATA:
        return Barrier.METADATA
    if any(a.kwarg_only and a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments):
        return Barrier.OUT_VARIANT
    if target._schema.returns and not any(_holds_tensors(r.type) for r in target._schema.returns):
        return Barrier.PYTHON_RESULT
    return Barrier.CASTS if name in CASTS_INSIDE else None


def _holds_tensors(type_: Any) -> bool:
    while isinstance(type_, (torch.ListType, torch.OptionalType)):
        type_ = type_.getElementType()
    return isinstance(type_, torch.TensorType)
