"""Functions of torch's whose C++ reads numbers, or asks who listens, where no operator tells of it: in every step as in eager."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import one_hot as bound_one_hot
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import kitsune
from kitsune.lazy import function_doors

aten = torch.ops.aten
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
STEPS = 5
bound_split = torch.tensor_split


@pytest.fixture(autouse=True, params=[True, False], ids=["followed", "not followed"])
def afresh(request: pytest.FixtureRequest) -> Iterator[None]:
    kitsune.reset()
    with kitsune.config.patch(gate=False, follow=request.param):
        yield
    kitsune.reset()


def lazily(warmup: int = 0) -> Any:
    return kitsune.accelerate(warmup=warmup, device="cpu")


def same(program: Callable[..., Any], given: Sequence[Any], warmup: int) -> None:
    """Called with each of these, in one context after the other."""
    expected = [program(one) for one in given]
    got = []
    for one in given:
        with lazily(warmup):
            got.append(program(one))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def sizes(*lengths: int) -> Tensor:
    """How many sequences of these lengths are still there at each position."""
    return torch.tensor([sum(length > at for length in lengths) for at in range(max(lengths))])


# As many numbers in each, for as many positions.
SIZES = [sizes(5, 3, 3), sizes(5, 4, 2), sizes(5, 5, 1)] * 3


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("kind", RECURRENT)
def test_a_packed_sequence_of_other_lengths_and_of_the_same_size_is_not_followed(kind: Any, warmup: int) -> None:
    torch.manual_seed(0)
    net, data = kind(2, 3), torch.randn(11, 2)

    def step(batch_sizes: Tensor) -> list[Tensor]:
        net.zero_grad()
        output, _ = net(PackedSequence(data, batch_sizes))
        output.data.square().sum().backward()
        return [output.data.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]

    same(step, SIZES, warmup)


def test_numbers_that_a_function_computes_with_in_c_are_looked_at_in_each_step() -> None:
    def step(x: Tensor) -> Any:
        return torch.choose_qparams_optimized(x, 4, 2, 0.16, 8)

    same(step, [torch.arange(4.0) * k for k in (1, 2, 1, 5, 3, 2)], 1)


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_a_network_of_packed_sequences_is_trained(kind: Any, in_order: bool, warmup: int) -> None:
    torch.manual_seed(0)
    net, batch = kind(3, 4, batch_first=True, bidirectional=True), torch.randn(2, 5, 3)

    def step(lengths: Tensor) -> list[Tensor]:
        net.zero_grad()
        x = batch.clone().requires_grad_()
        packed = pack_padded_sequence(x * 2, lengths * 1, batch_first=True, enforce_sorted=in_order)
        padded, seen = pad_packed_sequence(net(packed)[0], batch_first=True)
        padded.square().sum().backward()
        return [padded.detach(), seen, *(t.grad for t in (x, *net.parameters()) if t.grad is not None)]

    same(step, [torch.tensor(lengths) for lengths in ([5, 3], [4, 4], [5, 3], [5, 1], [5, 3])], warmup)


def as_triples(matrix: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 1], [2, 0]]) * 1, matrix[0, :2], (3, 3), check_invariants=True).to_dense()


PLACES = (2, 1)


def padded(matrix: Tensor, pad: Any) -> list[Tensor]:
    return [*pad(matrix[0, :3] * 2, torch.tensor(PLACES) * 1, True, 0.0, 3)]


def saturated(matrix: Tensor) -> Tensor:
    weight = matrix * 1e6
    return torch.stack([aten._saturate_weight_to_fp16(weight), weight])


def packed_in_halves(matrix: Tensor) -> Tensor:
    packed = torch.fbgemm_pack_gemm_matrix_fp16(matrix * 2)  # type: ignore[attr-defined]
    found: Tensor = aten.fbgemm_linear_fp16_weight_fp32_activation.default(matrix * 3, packed, matrix[:, 0] * 1)
    return found


READS: dict[str, Callable[[Tensor], Any]] = {
    "fbgemm": packed_in_halves,
    "aten.tensor_split": lambda m: aten.tensor_split(m, torch.tensor([1, 3]) * 1, 1),
    "aten.tensor_split, an overload": lambda m: aten.tensor_split.tensor_indices_or_sections(m, torch.tensor([1, 3]) * 1, 1),
    "aten.tensor_split, named": lambda m: aten.tensor_split.tensor_indices_or_sections(
        self=m, tensor_indices_or_sections=torch.tensor(2) * 1
    ),
    "aten.tensor_split with a history": lambda m: aten.tensor_split.tensor_indices_or_sections(
        m.detach().requires_grad_(), torch.tensor([1, 3]) * 1, 1
    )[1].square(),
    "aten._pad_packed_sequence": lambda m: padded(m, aten._pad_packed_sequence.default),
    "aten.choose_qparams_optimized": lambda m: aten.choose_qparams_optimized.default(m[0], 4, 2, 0.16, 8),
    "aten._shape_as_tensor": lambda m: aten._shape_as_tensor.default(m[1:]) * 3,
    "_shape_as_tensor": lambda m: torch._shape_as_tensor(m[1:]) * 3,  # type: ignore[attr-defined]
    "aten._saturate_weight_to_fp16": saturated,
    "aten.ctc_loss": lambda m: aten.ctc_loss.IntList(m.view(3, 1, 4).log_softmax(2), torch.tensor([[1, 2]]) * 1, [3], [2]),
    "tensor_split, bound before": lambda m: bound_split(m, torch.tensor([1, 3]) * 1, 1),
    "sparse_coo_tensor": as_triples,
    "sparse_coo_tensor without a size": lambda m: torch.sparse_coo_tensor(torch.tensor([[0, 1]]) + 1, m[0, :2]).to_dense(),
    "choose_qparams_optimized": lambda m: torch.choose_qparams_optimized(m[0], 4, 2, 0.16, 8),
    "LongTensor": lambda m: torch.LongTensor([m[0, 0].long(), 3]),
    "FloatTensor": lambda m: torch.FloatTensor([[m[0, 0], 3], (m[1, 1], 0.5)]),
    "new": lambda m: m.new([m[0, 0], 3]),  # type: ignore[no-untyped-call]
    "tensor": lambda m: torch.tensor([[m[0, 0], 3], (m[1, 1] > 0, 0.5)]),
    "asarray of complex": lambda m: torch.asarray([m[0, 0] * 1j, 3]),
    "SobolEngine": lambda m: torch.quasirandom.SobolEngine(2, scramble=True, seed=3).draw(4) + m[0, :2],
    "narrow": lambda m: torch.narrow(m, 1, torch.tensor(1) * 2, 2),
    "repeat_interleave": lambda m: torch.repeat_interleave(m, torch.tensor([2, 0, 1]) * 1, 0),
    "one_hot": lambda m: F.one_hot((m[0] > 0).long(), 3),
    "quantile": lambda m: torch.quantile(m, torch.tensor([0.25, 1.0]) * 1, dim=1),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:fbgemm")
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("name", READS)
def test_what_is_read_may_be_pending(name: str, warmup: int) -> None:
    matrices = [torch.arange(12.0).cos().view(3, 4) * k for k in (1, 2, 1, 3, 1)]
    same(lambda matrix: READS[name](matrix * 2), matrices, warmup)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:fbgemm")
@pytest.mark.parametrize("name", READS)
def test_it_may_be_of_a_context_that_is_closed(name: str) -> None:
    matrix = torch.arange(12.0).cos().view(3, 4)
    with lazily():
        lazy = matrix * 2
    if "bound before" not in name and not name.startswith("aten."):  # which only a call lane can tell
        torch.testing.assert_close(READS[name](lazy), READS[name](matrix * 2), rtol=0, atol=0)
    with lazily():
        again = READS[name](lazy)
    torch.testing.assert_close(again, READS[name](matrix * 2), rtol=0, atol=0)


def test_places_of_a_closed_context_are_read_by_an_operators_name() -> None:
    x = torch.arange(5.0)
    with lazily():
        places = torch.tensor([1, 3]) * 1
    expected = torch.tensor_split(x, torch.tensor([1, 3]))
    for around in (contextlib.nullcontext, kitsune.disable):
        with lazily(), around():
            found = aten.tensor_split.tensor_indices_or_sections(x, places)
        torch.testing.assert_close(found, [*expected], rtol=0, atol=0)


def test_sizes_of_a_closed_context_are_those_of_a_packed_sequence() -> None:
    torch.manual_seed(0)
    net, data = nn.GRU(2, 3), torch.randn(11, 2)
    with lazily():
        batch_sizes = SIZES[1] * 1
    for packed in (PackedSequence(data, batch_sizes), net(PackedSequence(data, batch_sizes))[0]):
        expected = pad_packed_sequence(PackedSequence(packed.data, SIZES[1]))
        torch.testing.assert_close(pad_packed_sequence(PackedSequence(packed.data, batch_sizes)), expected, rtol=0, atol=0)


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "a class beyond the last": lambda x: F.one_hot(x.long() + 3, 4),
    "a class below the first": lambda x: F.one_hot(x.long() - 3, 4),
    "by a function bound before": lambda x: bound_one_hot(x.long() + 3, 4),
    "by the operator's name": lambda x: aten.one_hot(x.long() + 3, 4),
    "by an overload's name": lambda x: aten.one_hot.default(x.long() + 3, 4),
    "a probability, by its name": lambda x: aten.quantile.default(x, x[2:] / x[2:] + 0.1),
    "a class that nobody has counted": lambda x: F.one_hot(x.long() - 3),
    "a probability above one": lambda x: torch.quantile(x, x[2:] / x[2:] + 0.1, interpolation="nearest"),
    "a probability below zero": lambda x: x.nanquantile(x[1] - 1.1, interpolation="higher"),
    "no number": lambda x: torch.quantile(x, x[0] / x[0]),
    "a plain probability": lambda x: torch.quantile(x, torch.tensor(1.1), interpolation="nearest"),
    "an index of a sparse tensor": lambda x: torch.sparse_coo_tensor(x[None].long() + 9, x, (3,), check_invariants=True),
}


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_out_of_range_is_refused_as_in_eager(name: str, warmup: int) -> None:
    x = torch.arange(3.0)
    with pytest.raises(RuntimeError) as expected:
        REFUSED[name](x * 1)
    for _ in range(STEPS):
        with lazily(warmup), pytest.raises(RuntimeError) as raised:
            REFUSED[name](x * 1)
        assert str(raised.value) == str(expected.value)


OF_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "svdvals": torch.linalg.svdvals,
    "eigvalsh": lambda m: torch.linalg.eigvalsh(m @ m.mT),
    "eigvals": torch.linalg.eigvals,
    "cond": torch.linalg.cond,
    "matrix_norm": partial(torch.linalg.matrix_norm, ord=2),
    "norm": lambda m: torch.linalg.norm(m, "nuc"),
    "torch.norm": lambda m: torch.norm(m, "nuc"),
    "matrix_rank of infinities": lambda m: torch.linalg.matrix_rank(m.exp() * float("inf")),
}


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("name", OF_VALUES)
def test_what_needs_no_vectors_is_computed_without_them_as_in_eager(name: str, warmup: int) -> None:
    torch.manual_seed(0)
    same(lambda matrix: OF_VALUES[name](matrix * 1), [torch.randn(17, 17) for _ in range(STEPS)], warmup)


def test_those_of_which_a_gradient_is_wanted_have_it() -> None:
    torch.manual_seed(0)

    def step(matrix: Tensor) -> Tensor:
        leaf = matrix.clone().requires_grad_()
        (torch.linalg.svdvals(leaf * 1).sum() + torch.linalg.norm(leaf, 2) + torch.quantile(leaf, torch.tensor(0.5))).backward()
        assert leaf.grad is not None
        return leaf.grad

    same(step, [torch.randn(5, 5) for _ in range(STEPS)], 1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_transformer_in_evaluation_gives_zeros_for_what_is_padded(depth: int, frozen: bool, warmup: int) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = (nn.TransformerEncoder(layer, depth) if depth else layer).eval().requires_grad_(not frozen)
    padding = torch.tensor([[False, False, True, True], [False, True, True, True]])

    def step(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(frozen):
            return net(x * 1, src_key_padding_mask=padding)

    batches = list(torch.randn(STEPS, 2, 4, 8))
    assert bool(step(batches[0])[1, 1:].any()) is not bool(depth)
    same(step, batches, warmup)


def test_an_attention_in_evaluation_is_eagers() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    def step(x: Tensor) -> Any:
        with torch.no_grad():
            return attention(x * 1, x, x)

    same(step, list(torch.randn(STEPS, 2, 4, 8)), 1)


def test_a_transform_sees_the_original() -> None:
    batch = torch.randn(3, 4, 4)

    def step(x: Tensor) -> Any:
        return torch.vmap(torch.linalg.svdvals)(x), torch.vmap(lambda m: torch.linalg.norm(m, 2))(x)

    same(step, [batch, batch * 2, batch * 3], 1)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiler_sees_the_original() -> None:
    with lazily():
        torch.ones(2) * 2

    def step(x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x) + F.one_hot(torch.arange(4), 4).sum(0) + torch.tensor_split(x, 2)[0][0]

    # torch 2.11 does not compile a quantile without breaks.
    steps = [step] if torch.__version__ < "2.13" else [step, lambda x: step(x) * torch.quantile(x, 0.5)]
    for one in steps:
        torch._dynamo.reset()
        x = torch.randn(4, 4)
        compiled = torch.compile(one, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), one(x), rtol=0, atol=0)


PRODUCTS: tuple[Callable[..., Any], ...] = (torch.matmul, torch.linalg.matmul, aten.matmul, aten.matmul.out)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("shape", [(2, 2, 2), (4,), (0,), (9,)])
@pytest.mark.parametrize("product", PRODUCTS, ids=["torch", "linalg", "aten", "an overload"])
def test_batches_are_multiplied_into_memory_that_is_given(
    product: Callable[..., Any], shape: tuple[int, ...], warmup: int
) -> None:
    def step(x: Tensor) -> list[Any]:
        found: list[Any] = []
        for out in (given.clone(), given * 2):
            before, version = out * 3, out._version
            is_out = product(x * 1, x[0].t() + 1, out=out) is out
            found += [before, out.clone(), is_out, out._version - version]
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                product(x * 1, x[0] + 1, out=out)
            found += [out.shape, out._version - version]
        return found

    given = torch.arange(float(torch.Size(shape).numel())).view(shape)
    same(step, [torch.arange(12.0).cos().view(2, 2, 3) * k for k in (1, 2, 1, 3, 1)], warmup)


@pytest.mark.parametrize("warmup", [0, 1])
def test_where_a_kernel_looks_at_classes_it_looks_at_those_of_a_wrapper(warmup: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, whose kernel stops the program where that of a CPU raises.
    monkeypatch.setattr(function_doors, "on_host", lambda input: False)
    same(lambda x: F.one_hot(x * 2, 7), [torch.tensor(classes) for classes in ([0, 1], [3, 1], [[2], [0]], [3, 0])], warmup)
    same(lambda x: F.one_hot(x * 2, num_classes=7).sum(), [torch.zeros(n, 2, dtype=torch.int64) for n in (0, 1, 0)], warmup)
    with lazily(warmup):
        found = F.one_hot(torch.tensor([1, 4]) * 2, 7)
        with pytest.raises(RuntimeError, match="out of bounds"):
            found.tolist()


@pytest.mark.parametrize(("dtype", "classes"), [(torch.int64, 0), (torch.int64, -2), (torch.int32, 3), (torch.float32, 3)])
def test_where_a_kernel_looks_at_classes_others_are_refused(dtype: Any, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function_doors, "on_host", lambda input: False)
    with pytest.raises(RuntimeError) as expected:
        F.one_hot(torch.ones(2, dtype=dtype), classes)
    with lazily(), pytest.raises(RuntimeError) as refused:
        F.one_hot(torch.ones(2, dtype=dtype) * 1, classes)
    assert str(refused.value) == str(expected.value)
