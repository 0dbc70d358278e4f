"""Version counters: autograd's count of the writes to a tensor."""

import contextlib
from collections.abc import Iterator, Sequence

import torch


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
