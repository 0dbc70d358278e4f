"""CUDA graphs: how work is captured, and what is put right when a capture breaks off."""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

Work = Callable[[], list[torch.Tensor]]


class Recorded(Protocol):
    """Work that can be repeated: `outputs` are the tensors that it fills each time, `nbytes` the memory that it keeps."""

    outputs: list[torch.Tensor]
    nbytes: int

    def replay(self) -> None:
        """Do the work again, on the current stream."""
        ...

    def destroy(self) -> None:
        """Let go of it and of its memory; what others hold of its outputs stays."""
        ...


class GraphRecorder(Protocol):
    """What makes work repeatable."""

    def record(self, work: Work, inputs: Sequence[torch.Tensor]) -> Recorded:
        """Take `work` down, which returns its outputs. It has no effect yet, not on the `inputs` either, which it may write."""
        ...

    def follow_stream(self) -> None:
        """To be called before each replay: replays share memory, so that one must not overtake another on another stream."""
        ...


# torch can capture on one thread at a time only: the default generator takes part in each capture.
_one_capture = threading.Lock()
# Captures that broke off. torch's allocators may still ask them which memory is theirs.
_broken_off: list[Any] = []
# Counts, by device, how often the generator's state had to be replaced: graphs that were captured before draw from the old one.
_generator_changes: dict[int, int] = {}


class CudaGraph:
    """A captured graph of one device."""

    def __init__(self, graph: Any, outputs: list[torch.Tensor], nbytes: int, index: int) -> None:
        self.outputs, self.nbytes = outputs, nbytes
        self._graph, self._index = graph, index
        self._generator = _generator_changes.get(index, 0)

    def replay(self) -> None:
        """Start it on the current stream. Raises RuntimeError if it can no longer draw random numbers as eager would."""
        if _generator_changes and self._generator != _generator_changes.get(self._index, 0):
            raise RuntimeError("the state of the device's generator was replaced after a capture that broke off")
        self._graph.replay()

    def destroy(self) -> None:
        """The memory of outputs stays as long as they do."""
        self.outputs = []
        self._graph.reset()


class CudaGraphs:
    """Captures on a stream of its own. Each graph has a memory pool of its own: two graphs that shared one could run in
    another order than they were captured in, and what the one uses in between would be where the other's outputs are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._index: int = device.index or 0
        self._stream: torch.cuda.Stream | None = None
        self._last: tuple[int, torch.cuda.Stream] | None = None

    def follow_stream(self) -> None:
        """Let the current stream wait for the last replay where that was on another one."""
        handle = torch._C._cuda_getCurrentRawStream(self._index)
        if self._last is not None and self._last[0] == handle:
            return
        stream = torch.cuda.current_stream(self._index)
        if self._last is not None:
            event = torch.cuda.Event()
            event.record(self._last[1])
            event.wait(stream)
        self._last = (handle, stream)

    def record(self, work: Work, inputs: Sequence[torch.Tensor]) -> CudaGraph:
        """Capture. Raises what `work` raises and what CUDA says of it; memory and generator are then as before."""
        del inputs  # nothing runs while it is captured
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._index)
        # Instantiated apart, to know what is to be undone where that fails.
        graph, pool = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.graph_pool_handle()
        before = torch.cuda.memory_reserved(self._index)
        with _one_capture, _no_collection(), torch.cuda.device(self._index), torch.cuda.stream(self._stream):
            # A workspace from outside could be in use on another stream when the graph runs, and one from inside must not be
            # found by others.
            torch._C._cuda_clearCublasWorkspaces()
            # Not "global", which breaks off when another thread, such as a loader's, pins memory.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                outputs = work()
                torch._C._cuda_clearCublasWorkspaces()
                graph.capture_end()
            except BaseException:
                self._break_off(graph, pool)
                raise
            try:
                graph.instantiate()
            except BaseException:
                graph.reset()
                raise
        nbytes = torch.cuda.memory_reserved(self._index) - before
        return CudaGraph(graph, outputs, max(nbytes, 0), self._index)

    def _break_off(self, graph: Any, pool: Any) -> None:
        torch._C._cuda_clearCublasWorkspaces()
        try:
            graph.capture_end()
        except RuntimeError:
            # CUDA has ended the capture, but torch has stopped halfway through its own end of it.
            _broken_off.append(graph)
            for give_back in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with contextlib.suppress(RuntimeError):
                    give_back(self._index, pool)
            self._free_generator()
        else:
            graph.reset()

    def _free_generator(self) -> None:
        """A generator that still takes itself to be captured gets a new state object, with the same seed and offset."""
        generator = torch.cuda.default_generators[self._index]
        fresh = generator.clone_state()
        probe = torch.empty(1, device=self.device)
        try:
            probe.uniform_()
        except RuntimeError:
            _generator_changes[self._index] = _generator_changes.get(self._index, 0) + 1
            generator.graphsafe_set_state(fresh)
        else:
            generator.set_offset(fresh.get_offset())


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
