"""What is known of entries of torch's databases: which are left to eager, and which differ from it, each with the reason."""

from __future__ import annotations

import torch

# Entries that reach no lazy recording, or not only: each with what stands in the way.
PASSES_THROUGH: dict[str, str] = {
    name: reason
    for reason, names in {
        "calls no operator": "broadcast_shapes",
        "needs no gradient, and is made with no mode on": "linalg.matrix_rank linalg.matrix_rank.hermitian",
        "the shape of a result depends on values": "argwhere bincount combinations masked_select "
        "nonzero nonzero_static unique unique_consecutive",
        "an operator checks values on the host": "_segment_reduce.lengths _segment_reduce.offsets allclose histogramdd "
        "nn.functional.ctc_loss nn.functional.embedding_bag",
        "the error code of the solver is read": "linalg.cholesky linalg.eig linalg.eigvals linalg.inv "
        "linalg.ldl_factor linalg.lstsq linalg.lstsq.grad_oriented linalg.lu_factor linalg.solve linalg.tensorinv "
        "linalg.tensorsolve",
        "a value becomes a Python number": "corrcoef cov equal istft item nn.functional.gaussian_nll_loss nn.functional.one_hot",
        "an in-place operator changes a shape": "resize_ resize_as_",
        "its backward makes a tensor of zeros without memory": "sgn",
        "works on sparse tensors": "sparse.mm.reduce sparse.sampled_addmm to_sparse",
        "an operator of another namespace": "nn.functional.linear_cross_entropy.chunked "
        "nn.functional.linear_cross_entropy.chunked_none",
    }.items()
    for name in names.split()
}

PASSES_THROUGH_ON_CPU: dict[str, str] = (
    {"quantile": "checks its probabilities", "nanquantile": "checks its probabilities"} if torch.__version__ < "2.12" else {}
)
PASSES_THROUGH_ON_CUDA: dict[str, str] = {
    "jiterator_2inputs_2outputs": "launches its kernel without the dispatcher",
    "jiterator_4inputs_with_extra_args": "launches its kernel without the dispatcher",
    "jiterator_binary": "launches its kernel without the dispatcher",
    "jiterator_binary_return_by_ref": "launches its kernel without the dispatcher",
    "jiterator_unary": "launches its kernel without the dispatcher",
}

# Entries of the other databases of which no sample is recorded lazily, and entries of which some are not.
LEFT_TO_EAGER: dict[str, str] = {
    name: reason
    for reason, names in {
        "an operator of another library": "custom/NumpyCatCustomOp custom/NumpyNMSCustomOp custom/NumpyNonzeroCustomOp "
        "custom/NumpySplitCopyCustomOp custom/NumpySplitCopyWithIntCustomOp custom/NumpyTakeCustomOp "
        "custom/NumpyViewCopyCustomOp",
        "all that it does is done in NumPy": "function/NumpyCubeNotComposableAutogradFunction function/NumpyTakeAutogradFunction",
    }.items()
    for name in names.split()
}
PARTLY_LEFT: dict[str, str] = {
    name: reason
    for reason, names in {
        "an operator of another library, which only its backward follows": "custom/NumpyCubeCustomOp custom/NumpyMulCustomOp "
        "custom/NumpyMulScalarCustomOp custom/NumpySortCustomOp",
        "its forward is done in NumPy": "function/NumpyCubeAutogradFunction function/NumpyMulAutogradFunction "
        "function/NumpySortAutogradFunction",
        "a mask's elements are counted": "__getitem__",
        "where it is cut, a tensor says": "narrow tensor_split",
    }.items()
    for name in names.split()
}


def may_be_left(entry: str) -> bool:
    """May samples of an entry be run as eager runs them?"""
    return any(entry in table for table in (LEFT_TO_EAGER, PARTLY_LEFT, PASSES_THROUGH, PASSES_THROUGH_ON_CPU))


# What differs from eager: (entry, part of the sweep): reason. A row that is equal fails the sweep; there is none at present.
EXPECTED: dict[tuple[str, str], str] = {}


def expected_reason(entry: str, part: str) -> str | None:
    return EXPECTED.get((entry, part))
