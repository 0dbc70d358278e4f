"""The TorchFunctionMode that hands every call of torch's API to the call lane."""

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext


class CallMode(TorchFunctionMode):
    """Sees each call before autograd. What becomes of it is its subclass's `__torch_function__`, which the pipeline gives it."""

    # What was beneath it when it was last taken off the stack; None where no context has been open since.
    beneath: list[TorchFunctionMode] | None = None

    def enter(self) -> bool:
        """Put this mode on top of the calling thread's stack; False if others are there that are to see every call."""
        # Left inside of a backward, it has been put back.
        self.leave()
        stack = _get_current_function_mode_stack()
        if any(type(mode) is not DeviceContext for mode in stack):
            return False
        # The end of `with torch.device(...)` takes off whatever is on top: one begun while this mode was away stays above it.
        # The default device is at the bottom, and is looked for there.
        default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
        known = stack if self.beneath is None else [default, *self.beneath]
        above: list[TorchFunctionMode] = []
        try:
            while len(above) < len(stack) and stack[-1 - len(above)] not in known:
                above.append(_pop_mode())
            _push_mode(self)
        finally:
            for mode in reversed(above):
                _push_mode(mode)
        return True

    def leave(self) -> bool:
        """Take this mode off the stack wherever it is; False if it is not there."""
        stack = _get_current_function_mode_stack()
        if self not in stack:
            return False
        self.beneath = stack[: stack.index(self)]
        above: list[TorchFunctionMode] = []
        try:
            while (mode := _pop_mode()) is not self:
                above.append(mode)
        finally:
            for mode in reversed(above):
                _push_mode(mode)
        return True
