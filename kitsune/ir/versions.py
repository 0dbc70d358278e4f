"""Version counters: autograd's count of the writes to a tensor."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.autograd.graph import increment_version

_version = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]


@contextlib.contextmanager
def versions_kept(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Leave the counters of `tensors` as they are, whatever the kernels inside count.

    The list kernels of CUDA count each write below autograd and those of the CPU none: who records a write counts it himself.
    """
    counted = tuple(t for t in tensors if not t.is_inference())
    versions = tuple(t._version for t in counted)
    yield
    if counted:
        torch._C._autograd._unsafe_set_version_counter(counted, versions)


@contextlib.contextmanager
def list_writes_counted(operands: Sequence[torch.Tensor], reals: Sequence[torch.Tensor]) -> Iterator[None]:
    """Count a write to each operand of a list kernel that runs on `reals` and counts its writes to them.

    One that raises half way has written the first of them, in order.
    """
    ours = [(operand, real) for operand, real in zip(operands, reals, strict=True) if not real.is_inference()]
    counted = tuple(real for _, real in ours)
    before = list(map(_version, counted))
    try:
        yield
    except Exception:
        written = list(map(_version, counted))
        torch._C._autograd._unsafe_set_version_counter(counted, tuple(before))
        for operand, real in ours:
            if list(map(_version, counted)) == written:
                break
            increment_version([real] if operand is real else [real, operand])
        raise
    if counted:
        torch._C._autograd._unsafe_set_version_counter(counted, tuple(before))
    increment_version(list(operands))


def count_writes_to(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Count a write to each tensor, as often as it is there; returns those that were counted.

    A view, or what was detached, shares the counter of its base: where both are there, it has moved with that.
    """
    if len(tensors) == 1:
        increment_version(tensors)
        return tensors
    before = list(map(_version, tensors))
    increment_version(tensors)
    now = list(map(_version, tensors))
    if now == [then + 1 for then in before]:
        return tensors
    # An update in lists writes each tensor several times: 31 counts in a step of an MLP.
    times = Counter(map(id, tensors))
    if now == [then + times[id(tensor)] for then, tensor in zip(before, tensors, strict=True)]:
        return tensors
    torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(before))
    counted = []
    for tensor, then in zip(tensors, before, strict=True):
        if _version(tensor) < then + times[id(tensor)]:
            increment_version(tensor)
            counted.append(tensor)
    return counted
