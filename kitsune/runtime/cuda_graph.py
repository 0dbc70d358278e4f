"""CUDA graphs: how work is captured, and what is put right when a capture breaks off."""

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from kitsune.ir import plain_times, streams, workspaces
from kitsune.runtime import branches
from kitsune.runtime.idle import WORTH_GIVING_BACK, give_back, reserved_bytes
from kitsune.runtime.letter import Letter

# Hears of tensors of one element whose numbers the host waits for.
Sending = Callable[[list[torch.Tensor]], None]
# From the inputs to the outputs. What it is called with must not be kept: the inputs' holders decide when they die.
Work = Callable[[Sequence[torch.Tensor], Sending], list[torch.Tensor]]


class Recorded(Protocol):
    """Work that can be repeated: `outputs` are the tensors that it fills each time, `nbytes` the memory that it keeps."""

    outputs: list[torch.Tensor]
    nbytes: int

    def replay(self) -> None:
        """Do the work, on the current stream."""
        ...

    def sent(self, k: int) -> Any:
        """Wait until the last replay has sent tensor number k; returns its number."""
        ...

    def destroy(self) -> None:
        """Let go of it and of its memory; what others hold of its outputs stays."""
        ...


class GraphRecorder(Protocol):
    """What makes work repeatable."""

    def record(self, work: Work, inputs: Sequence[torch.Tensor], n_sent: int = 0, nbytes: int = 0) -> Recorded:
        """Take down what `work` does to the memory of `inputs`. It has no effect yet, on none of the inputs that it writes.

        `work` sends `n_sent` tensors to the host, at one place in the middle; none if that is 0. About `nbytes` of
        memory are in use at once.
        """
        ...

    def follow_stream(self) -> bool:
        """To be called before each run: runs share memory, so that one must not overtake another on another stream.

        False where nothing can be replayed now, because the program itself captures what runs.
        """
        ...


# The part of a graph's memory that its pool asks the device for in one piece, from which torch's allocator cuts what is smaller.
# BERT's, op by op, is 103 pieces otherwise. Were it the whole, a last large tensor would find no room among the smaller ones.
AT_ONCE = 0.8
# torch can capture on one thread at a time only: the default generator takes part in each capture.
_one_capture = threading.Lock()
# Captures that broke off. torch's allocators may still ask them which memory is theirs.
_broken_off: list[Any] = []
# Counts, by device, how often the generator's state had to be replaced: graphs that were captured before draw from the old one.
_generator_changes: dict[int, int] = {}


class CudaGraph:
    """Work of one device: a captured graph or, where the host waits for something in the middle, two that follow each other."""

    def __init__(
        self, graphs: list[Any], letter: Letter | None, outputs: list[torch.Tensor], nbytes: int, recorder: "CudaGraphs"
    ) -> None:
        self.outputs, self.nbytes = outputs, nbytes
        self._graphs, self._letter, self._recorder = graphs, letter, recorder
        self._generator = _generator_changes.get(recorder.index, 0)

    def replay(self) -> None:
        """Start it on the current stream. Raises RuntimeError if it can no longer draw random numbers as eager would."""
        if _generator_changes and self._generator != _generator_changes.get(self._recorder.index, 0):
            raise RuntimeError("the state of the device's generator was replaced after a capture that broke off")
        first, *rest = self._graphs
        first.replay()
        if self._letter is not None:
            self._letter.mark()
        for graph in rest:
            graph.replay()

    def sent(self, k: int) -> Any:
        """The number is on the host as soon as the first graph has ended."""
        assert self._letter is not None
        return self._letter.read(k)

    def destroy(self) -> None:
        """The memory of outputs stays as long as they do."""
        self.outputs = []
        _reset(self._graphs)
        self._recorder.gave_up(self.nbytes)


class CudaGraphs:
    """Captures on a stream of its own. Each graph has a memory pool of its own: two graphs that shared one could run in
    another order than they were captured in, and what the one uses in between would be where the other's outputs are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index: int = device.index or 0
        self._given_up = 0
        self._stream: torch.cuda.Stream | None = None
        # The stream of the last run.
        self._last: int | None = None

    def follow_stream(self) -> bool:
        """Let the current stream wait for all others where the last run was on one of these; False if it is being captured, or
        memory comes from a pool of the program's: to a thread that reads what is pending in another one."""
        if torch._C._cuda_isCurrentStreamCapturing() or plain_times.uses_pool():
            return False
        handle = torch._C._cuda_getCurrentRawStream(self.index)
        if self._last != handle:
            streams.use(torch.cuda.current_stream(self.index))
            if self._last is not None:
                # Not for the last run alone: a third one may still read what a run before has left, and was waited for there.
                streams.wait_for_all(self.device)
            self._last = handle
        return True

    def record(self, work: Work, inputs: Sequence[torch.Tensor], n_sent: int = 0, nbytes: int = 0) -> CudaGraph:
        """Capture. Raises what `work` raises and what CUDA says of it; memory and generator are then as before."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.index)
        with torch.cuda.device(self.index):
            letter = Letter(n_sent, self.device) if n_sent else None
        graphs: list[Any] = []

        def begin() -> None:
            # Instantiated apart, to know what is to be undone where that fails. Not the program's class, whose methods are doors.
            graphs.append(torch._C._CUDAGraph(True))
            # Not "global", which breaks off when another thread, such as a loader's, pins memory.
            graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

        def end() -> None:
            workspaces.let_go()
            _end(graphs[-1])

        def send(tensors: list[torch.Tensor]) -> None:
            assert letter is not None
            letter.write(tensors)
            end()
            begin()

        user = torch.cuda.current_stream(self.index)
        # To begin a capture sets the generator's offset, on the stream that captures: replays that are still under way read it,
        # and the next one sets it to its own.
        self._stream.wait_stream(user)
        with _one_capture, _no_collection(), torch.cuda.device(self.index), streams.entered(self._stream), _then(user):
            # The steps so far have left memory that the graph's pool cannot take.
            give_back(self.device)
            # Not a MemPool, which ends the process if it dies before its graph.
            pool, before = torch.cuda.graph_pool_handle(), reserved_bytes(self.device)
            workspaces.let_go()
            workspaces.keep_outside()
            for stream in branches.of_products(self.device):
                with streams.entered(stream):
                    workspaces.keep_outside()
            try:
                begin()
                # Let go of at once: most of what the work asks for is then cut from one block.
                torch.UntypedStorage(int(AT_ONCE * nbytes), device=self.device)
                outputs = work(inputs, send)
                end()
            except BaseException:
                self._break_off(graphs.pop(), pool)
                _reset(graphs)
                raise
            try:
                for graph in graphs:
                    graph.instantiate()
            except BaseException:
                _reset(graphs)
                raise
            held = max(reserved_bytes(self.device) - before, 0)
        return CudaGraph(graphs, letter, outputs, held, self)

    def gave_up(self, nbytes: int) -> None:
        """A graph was destroyed. torch keeps its pool's memory, for nobody, until its caches are emptied."""
        self._given_up += nbytes
        if self._given_up >= WORTH_GIVING_BACK:
            self._given_up = 0
            torch.cuda.empty_cache()

    def _break_off(self, graph: Any, pool: Any) -> None:
        workspaces.let_go()
        try:
            _end(graph)
        except RuntimeError:
            # CUDA has ended the capture, but torch has stopped halfway through its own end of it.
            _broken_off.append((graph, pool))
            for give_back in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with contextlib.suppress(RuntimeError):
                    give_back(self.index, pool)
            self._free_generator()
        else:
            graph.reset()

    def _free_generator(self) -> None:
        """A generator that still takes itself to be captured gets a new state object, with the same seed and offset."""
        generator = torch.cuda.default_generators[self.index]
        fresh = generator.clone_state()
        probe = torch.empty(1, device=self.device)
        try:
            probe.uniform_()
        except RuntimeError:
            _generator_changes[self.index] = _generator_changes.get(self.index, 0) + 1
            generator.graphsafe_set_state(fresh)
        else:
            generator.set_offset(fresh.get_offset())


@contextlib.contextmanager
def waits_unwatched() -> Iterator[None]:
    """`torch.cuda.set_sync_debug_mode` is to tell where the program waits for the device, not where a capture does."""
    mode = torch._C._cuda_get_sync_debug_mode() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    if not mode:
        yield
        return
    try:
        torch._C._cuda_set_sync_debug_mode(0)
        yield
    finally:
        torch._C._cuda_set_sync_debug_mode(mode)


@contextlib.contextmanager
def _then(user: torch.cuda.Stream) -> Iterator[None]:
    """What comes next on a stream waits for the current one, whatever happens on that."""
    stream = torch.cuda.current_stream(user.device)
    try:
        yield
    finally:
        user.wait_stream(stream)


def _reset(graphs: list[Any]) -> None:
    for graph in graphs:
        graph.reset()


def _end(graph: Any) -> None:
    with warnings.catch_warnings():
        # Of a graph in which nothing is launched, which may be: kernels over no elements.
        warnings.simplefilter("ignore")
        graph.capture_end()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A tensor or a graph that the garbage collector frees in the middle of a capture could break it off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
