"""The doors of Python to a tensor's memory: each gives the computed value and flushes by its own cause."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import math
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils import dlpack

import kitsune

Door = Callable[[torch.Tensor], Any]


def lazily() -> Any:
    return kitsune.accelerate(warmup=0, device="cpu")


def pending(base: torch.Tensor) -> torch.Tensor:
    """A result that is not computed yet."""
    return base * 2 + 1


def written(base: torch.Tensor) -> torch.Tensor:
    """A plain tensor with a write that is not done yet."""
    return base.add_(1.5)


def made_outside() -> torch.Tensor:
    return nn.Parameter(torch.arange(6.0).view(2, 3), requires_grad=False)


@contextmanager
def flushes(*causes: str) -> Iterator[None]:
    """Everything inside flushes by these causes and no others."""
    before = kitsune.counters()["flushed"]
    yield
    after = kitsune.counters()["flushed"]
    assert {cause for cause, n in after.items() if n > before.get(cause, 0)} == set(causes)


def from_address(address: int) -> list[float]:
    return list((ctypes.c_float * 6).from_address(address))


def saved(t: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return file


MEMORY: dict[str, Door] = {
    "numpy": lambda t: t.numpy().tolist(),
    "asarray": lambda t: numpy.asarray(t).tolist(),
    "asarray of another dtype": lambda t: numpy.asarray(t, dtype=numpy.float64).tolist(),
    "__array__": lambda t: t.__array__().tolist(),
    "numpy of a detached": lambda t: t.detach().numpy().tolist(),
    "a numpy function": lambda t: float(numpy.linalg.norm(t)),
    "tolist": lambda t: t.tolist(),
    "data_ptr": lambda t: from_address(t.data_ptr()),
    "data_ptr, unbound": lambda t: from_address(torch.Tensor.data_ptr(t)),
    "numpy.from_dlpack": lambda t: numpy.from_dlpack(t).tolist(),
    "torch.from_dlpack": lambda t: torch.from_dlpack(t).tolist(),
    "__dlpack__": lambda t: torch.from_dlpack(t.__dlpack__()).tolist(),
    "to_dlpack": lambda t: torch.from_dlpack(dlpack.to_dlpack(t)).tolist(),
    "__dlpack_device__": lambda t: tuple(map(int, t.__dlpack_device__())),
    "untyped_storage": lambda t: from_address(t.untyped_storage().data_ptr()),
    "storage": lambda t: from_address(t.storage().data_ptr()),
    "pickle": lambda t: partial(pickle.loads, pickle.dumps(t)),
    "torch.save": lambda t: partial(torch.load, saved(t)),
    "deepcopy": lambda t: copy.deepcopy(t.detach()).tolist(),
    "share_memory_": lambda t: t.share_memory_().numpy().tolist(),
    "repr": repr,
    "str": str,
    "format": lambda t: f"{t}",
    "print a list": lambda t: str([t]),
    "data": lambda t: t.data.tolist(),
}
NUMBERS: dict[str, Door] = {
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.mean()),
    "int": lambda t: int(t.sum()),
    "bool": lambda t: bool((t > 2).all()),
    "if": lambda t: 1 if t.sum() > 5 else 2,
    "complex": lambda t: complex(t.sum()),
    "math": lambda t: math.sqrt(t.sum()),
    "iteration": lambda t: [float(v.sum()) for v in t],
    "in": lambda t: 7.0 in t,
    "format of one": lambda t: f"{t.sum():.3f}",
    "equal": lambda t: torch.equal(t, t + 1),
    "a list's index": lambda t: [*range(100)][t.sum().to(torch.int64)],
    "a size": lambda t: torch.zeros(int(t.sum()), 2).shape,
}
SUBJECTS = {"pending": pending, "written": written}


def read(door: Door, subject: Door, cause: str) -> Any:
    """The door's answer. The first round only makes each operator known, whose first sight may be made at once."""
    with lazily():
        door(subject(made_outside()))
    base = made_outside()
    with lazily():
        tensor = subject(base)
        with flushes(cause):
            answer = door(tensor)
    return answer().tolist() if callable(answer) else answer  # what was saved is loaded out of the context


def in_eager(door: Door, subject: Door) -> Any:
    answer = door(subject(made_outside()))
    return answer().tolist() if callable(answer) else answer


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_memory_is_computed_before_it_is_seen(name: str, subject: str) -> None:
    door = MEMORY[name]
    assert read(door, SUBJECTS[subject], "DOOR") == in_eager(door, SUBJECTS[subject])


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_computed_before_it_is_seen(name: str, subject: str) -> None:
    door = NUMBERS[name]
    assert read(door, SUBJECTS[subject], "ITEM") == in_eager(door, SUBJECTS[subject])


def in_a_file(storage: torch.UntypedStorage) -> bytes:
    with tempfile.TemporaryFile() as file:
        storage._write_file(file, True, True, 1)
        file.seek(0)
        return file.read()


# Of a storage that the program has had since before the write that is pending.
HELD: dict[str, Callable[[torch.UntypedStorage], Any]] = {
    "an address": lambda storage: from_address(storage.data_ptr()),
    "elements": lambda storage: storage.tolist(),
    "a copy": lambda storage: storage.clone().tolist(),
    "a file": in_a_file,
    "a pickle": lambda storage: torch.load(saved(storage), weights_only=False).tolist(),
    "shared memory": lambda storage: from_address(storage.share_memory_().data_ptr()),
    "bytes in another order": lambda storage: storage.byteswap(torch.float32) or storage.tolist(),
}


@pytest.mark.parametrize("made", [made_outside, lambda: pending(made_outside())], ids=["a plain tensor", "a result"])
@pytest.mark.parametrize("name", HELD)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_storage_that_is_held_has_what_was_written_since(name: str, made: Callable[[], torch.Tensor]) -> None:
    def read() -> Any:
        base = made()
        storage = base.untyped_storage()
        written(base)
        return HELD[name](storage), base.tolist()

    expected = read()
    with lazily():
        assert read() == expected
        assert kitsune.counters()["recorded"]


def test_memory_that_a_held_storage_gives_back_was_read_before() -> None:
    base = made_outside()
    with lazily():
        storage = base.untyped_storage()
        n, doubled = storage.nbytes(), base * 2
        storage.resize_(0)
        storage.resize_(n)
        storage.fill_(0)
        assert doubled.tolist() == in_eager(lambda t: (t * 2).tolist(), lambda t: t)


def view_of_unknown_history() -> torch.Tensor:
    leaf = torch.arange(3.0).requires_grad_()
    with torch.no_grad():
        view = leaf[1:]
        view.add_(1)
    return view


PRINTED: dict[str, Callable[[], torch.Tensor]] = {
    "a result": lambda: torch.arange(3.0) * 2,
    "a result with history": lambda: torch.ones(3, requires_grad=True) * 2,
    "a line that is too long": lambda: torch.full((7,), 1.2345).requires_grad_() * 2,
    "a leaf": lambda: torch.ones(3, requires_grad=True),
    "a result of foreach": lambda: torch._foreach_mul([torch.ones(3, requires_grad=True)], 2.0)[0],
    "a history that autograd does not tell": view_of_unknown_history,
    "a number": lambda: torch.ones(3).sum(),
    "another dtype": lambda: torch.ones(3, dtype=torch.float64) > 0,
    "nothing": lambda: torch.ones(0, 3) * 2,
    "many": lambda: torch.ones(2000) * 2,
    "infinities": lambda: torch.ones(3) / torch.arange(3.0),
}


@pytest.mark.parametrize("name", PRINTED)
def test_a_tensor_prints_as_in_eager(name: str) -> None:
    expected = repr(PRINTED[name]())
    with lazily():
        assert repr(PRINTED[name]()) == expected


@pytest.mark.parametrize("name", [name for name in MEMORY | NUMBERS if name != "data_ptr, unbound"])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_result_that_outlives_the_context_has_its_doors(name: str) -> None:
    door = (MEMORY | NUMBERS)[name]
    with lazily():
        tensor = pending(made_outside())
    answer = door(tensor)
    assert (answer().tolist() if callable(answer) else answer) == in_eager(door, pending)


def test_a_door_is_explained_with_the_line_that_used_it() -> None:
    with lazily():
        pending(made_outside()).tolist()
    (flush,) = [f for f in kitsune.explain().flushes if f.cause == "DOOR"]
    assert __file__ in flush.site


@pytest.mark.parametrize("read", [len, torch.numel, lambda t: t.shape, lambda t: t.is_contiguous(), id, torch.is_tensor])
def test_what_needs_no_value_flushes_nothing(read: Door) -> None:
    with lazily():
        tensor = pending(made_outside())
        with flushes():
            read(tensor)


@pytest.mark.parametrize("name", ["numpy", "tolist", "untyped_storage", "data_ptr"])
def test_below_the_doors_there_is_no_value_but_an_error_or_a_null_pointer(name: str) -> None:
    """C++ code reaches a wrapper as TensorBase does: without Kitsune's overrides."""
    with lazily():
        tensor = pending(made_outside())
        try:
            with torch._C.DisableTorchFunction():
                found = getattr(torch._C.TensorBase, name)(tensor)
            pointer = found if name == "data_ptr" else found.data_ptr()
        except RuntimeError:
            pointer = 0
        assert pointer == 0


def test_tensors_of_pending_numbers() -> None:
    with lazily():
        base = made_outside()
        inside = torch.tensor([base.sum(), base.max()])
        losses = [(base * i).sum() for i in range(3)]
    assert (inside.tolist(), torch.tensor(losses).tolist()) == ([15.0, 5.0], [0.0, 15.0, 30.0])


@pytest.fixture(autouse=True)
def forgotten() -> None:
    kitsune.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("network", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("follow", [True, False])
def test_a_recurrent_network_packs_its_weights_under_autocast(network: Any, dtype: Any, follow: bool) -> None:
    def train(context: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.Embedding(50, 32), network(32, 32, 2, batch_first=True), torch.nn.Linear(32, 50)])
        model.cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        losses = []
        with context:
            for ids in torch.randint(0, 50, (12, 8, 16), device="cuda"):
                optimizer.zero_grad()
                with torch.autocast("cuda", dtype, enabled=dtype is not None):
                    out = model[2](model[1](model[0](ids))[0])
                    loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), ids.flatten())
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        return [*losses, *model.parameters()]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        expected = train(contextlib.nullcontext())
        kitsune.reset()
        with kitsune.config.patch(follow=follow):
            got = train(kitsune.accelerate())
    finally:
        torch.use_deterministic_algorithms(False)
    assert kitsune.counters()["recorded"] > 200
    assert all(map(torch.equal, got, expected))


def test_python_that_goes_from_element_to_element_finds_what_is_computed_so_far() -> None:
    def run() -> list[Any]:
        found, base = list[Any](), torch.arange(6.0)
        for _ in range(5):
            before = pending(base)
            found += [base.apply_(lambda v: v + 1) is base, before.tolist()]
            result, other = pending(base), pending(base) + 1
            kept = result + 1
            found += [result.map_(other, lambda a, b: a - b) is result, result._version, result.tolist(), kept.tolist()]
            result.map2_(pending(base), other, lambda a, b, c: a * b + c)  # type: ignore[attr-defined]
            found += [result.tolist(), (result * 2).tolist()]
            with pytest.raises(RuntimeError) as refused:
                (base.clone().requires_grad_() * 2).apply_(lambda v: v)
            found.append(str(refused.value))
        return found

    expected = run()
    with kitsune.config.patch(gate=False), lazily():
        assert run() == expected
