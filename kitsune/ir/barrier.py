"""Why a region ended, or why an op was not recorded: always one of these, always with the user's line."""

import enum
from typing import NamedTuple


class Site(NamedTuple):
    """A line of the user's program."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Barrier(enum.Enum):
    """The value is the sentence that `explain()` prints."""

    EXIT = "the accelerate() context was left"
    NESTED = "a context with other options was entered"
    STEP = "an optimizer finished its step()"
    UPDATE = "the program has written its parameters itself"
    AGAIN = "a model is called again without gradients"
    FLUSH = "kitsune.flush() was called"
    DISABLE = "kitsune.disable() was entered"
    BOUND = "the bound on pending operators or bytes was reached"
    DIVERGED = "the operators differ from every region seen before; the new part is observed"
    ITEM = "a tensor's value became a Python number"
    DATA_DEPENDENT = "the shape of a result depends on values"
    HOST_COPY = "a tensor was copied between devices"
    DOOR = "Python asked for a tensor's memory"
    RANDOM_STATE = "the state of a random generator was read or set"
    DEFAULTS = "a default of torch was changed"
    MODES_OFF = "torch switched dispatch modes off for its own use"
    FORK = "the process is about to be forked"
    THREAD = "a thread was started or waited for"
    SYNCHRONIZE = "the device was synchronised, or an event or a stream was used"
    CAPTURE = "the program captures or replays a CUDA graph of its own, or takes memory from a pool of its own"
    PARAMETER = "a tensor became a Parameter"
    UNTRUSTED = "the layout of an operator's result is not known before it has run once"
    METADATA = "an in-place operator changes a tensor's shape or storage"
    OUT_VARIANT = "an operator writes into a tensor given as out="
    CASTS = "autocast gives operators inside of an operator's kernel other types"
    FOREIGN_NAMESPACE = "an operator of another library"
    PROFILER = "a range of torch.profiler begins or ends"
    FOREIGN_TENSOR = "a tensor subclass of another library"
    FOREIGN_MODE = "a dispatch mode of another library was open already"
    FOREIGN_LAYOUT = "a sparse, nested, quantized or otherwise special tensor"
    FOREIGN_MEMORY = "memory that is shared with NumPy, another process or a file"
    OTHER_DEVICE = "tensors of a device that is not the one recorded for"
    HOST_SCALAR = "a counter with one element on the CPU is updated at once"
    GENERATOR = "a random operator with its own generator"
    PYTHON_RESULT = "an operator whose result is not made of tensors"
    UNSUPPORTED = "an argument that cannot be part of a region's key"
    OUTSIDE = "a recorded tensor was used where nothing is recorded"
    RAISED = "an operator raised"
    INPUT_VIEW = "a view of a tensor that comes in from outside, and of which no gradient is wanted"
    NEW_STATE = "an optimizer makes what it keeps of each parameter, which later steps find there"
    PAUSED = "recording is switched off here"
    STANCE = "the stance is eager_on_recompile, and the operator is new at its place"
    FORCED = "the stance became force_eager"

    def __str__(self) -> str:
        return self.name
