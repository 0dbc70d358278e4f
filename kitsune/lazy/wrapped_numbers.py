"""Numbers that autograd has saved as tensors (`(x / 4).grad_fn._saved_other`): torch gives a dispatch mode the number in place of
the tensor, and then refuses it where the operator wants a tensor."""

from typing import Any

import torch

from kitsune.ir import Barrier
from kitsune.lazy.at_once import pass_through
from kitsune.lazy.rebuild import tensors_in
from kitsune.lazy.recording import PLAIN

# The tensor that torch makes of a number.
_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
# Those that a functorch transform stands behind have no number of their own.
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
_REFUSED = ("Expected a value of type 'Tensor", "Expected a value of type 'List[", "Expected a value of type 'Optional[")


def take_refused(recorder: Any, error: BaseException, func: Any, args: Any, kwargs: Any) -> Any:
    """An op has failed with `error`, which is being handled: if that was why, make it with the tensors of its call."""
    if not isinstance(error, RuntimeError) or recorder.lane is None or not any(words in str(error) for words in _REFUSED):
        raise
    given = Given(recorder.lane.given)
    values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
    values |= {a.name: given.put(values[a.name]) for a in func._schema.arguments if "Tensor" in str(a.type) and a.name in values}
    if given.is_unclear:
        raise
    args, kwargs = tuple(values.values())[: len(args)], dict(tuple(values.items())[len(args) :])
    if func is torch.ops.aten.detach.default:
        # Such a number, too; the overload would return it as one.
        with recorder.below_autograd(), torch._C.DisableTorchFunction():
            return args[0].detach()
    row = recorder.describe(func)
    result = pass_through(recorder, row, args, kwargs, Barrier.UNSUPPORTED)
    # What was written is such a number still, and came back as one.
    return args[0] if row.in_place and type(result) in _DTYPES else result


class Given:
    """The tensors of a call that may stand behind numbers."""

    def __init__(self, tree: Any) -> None:
        found = {id(t): t for t in tensors_in(tree) if type(t) in PLAIN and t.device.type == "cpu" and not _is_transformed(t)}
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            self._numbers = [(repr(t.item()), t) for t in found.values() if not t.dim() and t.dtype in _DTYPES.values()]
        self.is_unclear = False

    def put(self, value: Any) -> Any:
        """A value with tensors in place of its numbers."""
        if type(value) is list:
            return [self.put(x) for x in value]
        if type(value) not in _DTYPES:
            return value
        alike = [t for number, t in self._numbers if number == repr(value)]
        # Which of two that are equal, writes to it would tell.
        self.is_unclear = self.is_unclear or len(alike) != 1
        return alike[0] if alike else value
