"""The TorchFunctionMode that hands every call of torch's API to the call lane."""

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext


class CallMode(TorchFunctionMode):
    """Sees each call before autograd. What becomes of it is its subclass's `__torch_function__`, which the pipeline gives it."""

    def enter(self) -> bool:
        """Put this mode on top of the calling thread's stack; False if others are there that are to see every call."""
        # Left inside of a backward, it has been put back.
        self.leave()
        if any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()):
            return False
        _push_mode(self)
        return True

    def leave(self) -> bool:
        """Take this mode off the stack wherever it is; False if it is not there."""
        if self not in _get_current_function_mode_stack():
            return False
        above = []
        try:
            while (mode := _pop_mode()) is not self:
                above.append(mode)
        finally:
            for mode in reversed(above):
                _push_mode(mode)
        return True
