"""What is known of a tensor without its values. Interned: equal types are one object, so keys compare by identity."""

from dataclasses import dataclass, field

import torch
from torch.utils._dtype_abbrs import dtype_abbrs


@dataclass(frozen=True, slots=True, eq=False)
class TensorType:
    """Geometry and dtype of a strided tensor; `offset` and `stride` count elements."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    device: torch.device
    conj: bool = False
    neg: bool = False
    nbytes: int = field(init=False)
    # Contiguous, with the very strides that torch gives a new tensor of this shape.
    canonical: bool = field(init=False)
    # One element, seen as many.
    expanded: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", self.shape.numel() * self.dtype.itemsize)
        expected, strides = 1, []
        for n in reversed(self.shape):
            strides.append(expected)
            expected *= max(n, 1)
        object.__setattr__(self, "canonical", self.stride == tuple(reversed(strides)))
        object.__setattr__(self, "expanded", self.shape.numel() > 1 and not any(self.stride))

    @property
    def extent_bytes(self) -> int:
        """Bytes from the first to the last element."""
        if not self.nbytes:
            return 0
        return (sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1) * self.dtype.itemsize

    def at_start(self) -> "TensorType":
        """The same at the beginning of its memory."""
        if not self.offset:
            return self
        return tensor_type(self.dtype, self.shape, self.stride, 0, self.device, self.conj, self.neg)

    def __str__(self) -> str:
        return f"{dtype_abbrs.get(self.dtype, str(self.dtype))}[{', '.join(map(str, self.shape))}]"


# The method itself, not the attribute of torch.Tensor, which is a door while a context is open.
storage_of = torch._C.TensorBase.untyped_storage

_interned: dict[tuple[object, ...], TensorType] = {}


def tensor_type(
    dtype: torch.dtype,
    shape: torch.Size,
    stride: tuple[int, ...],
    offset: int,
    device: torch.device,
    conj: bool = False,
    neg: bool = False,
) -> TensorType:
    """The one TensorType with these fields."""
    key = (dtype, shape, stride, offset, device, conj, neg)
    found = _interned.get(key)
    if found is None:
        found = _interned[key] = TensorType(dtype, shape, stride, offset, device, conj, neg)
    return found


def type_of(tensor: torch.Tensor, device: torch.device | None = None) -> TensorType:
    """The type of a strided tensor; `device` stands in for the tensor's own (a meta tensor that plays another device)."""
    key = (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        int(tensor.storage_offset()),
        device or tensor.device,
        tensor.is_conj(),
        tensor.is_neg(),
    )
    return _interned.get(key) or tensor_type(*key)


def default_type(dtype: torch.dtype, shape: tuple[int, ...], device: str = "cpu") -> TensorType:
    """A contiguous type; for tests and for reading."""
    like = torch.empty(shape, dtype=dtype, device="meta")
    return type_of(like, torch.device(device))
