"""The doors: ways to a tensor's memory, or around the order of ops, that never reach the dispatcher.

One table. The doors are patched while any context is open and put back when the last one closes, unless contexts come and go;
wrappers carry their own overrides (`tensor.py`), which stay for life.
"""

import _thread
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._python_dispatch as python_dispatch

from kitsune.ir import Barrier
from kitsune.lazy.captures import capture_begin_door, capture_end_door, pool_begin_door, pool_end_door, replay_door
from kitsune.lazy.door_makers import (
    data_door,
    deepcopy_door,
    default_door,
    dlpack_door,
    flush_door,
    generator_door,
    history_door,
    kernel_door,
    make_subclass_door,
    memory_door,
    parameter_door,
    property_door,
    random_door,
    reducer_door,
    stream_door,
    subclass_door,
    swap_door,
    thread_door,
)
from kitsune.lazy.door_set import Door, DoorSet
from kitsune.lazy.function_doors import (
    classes_door,
    eager_door,
    elements_door,
    host_door,
    lengths_door,
    operator_door,
    places_door,
    product_door,
    range_door,
    recurrent_door,
    takes_singular_values,
    unheard_door,
)
from kitsune.lazy.recorder import Recorder
from kitsune.lazy.recorders import OPEN
from kitsune.lazy.replaced import DOORS
from kitsune.lazy.storage_doors import NAMES as STORAGE_DOORS, storage_door
from kitsune.lazy.tensor import METHOD_DOORS

_lock = threading.Lock()


def open_doors(recorder: Recorder) -> None:
    """Watch the doors for a recorder."""
    with _lock:
        OPEN.append(recorder)
        _LASTING.put_on()
        _WATCHED.put_on()


def close_doors(recorder: Recorder, for_good: bool = False) -> None:
    """Stop watching for a recorder, or for one that has not come to be watched for; `for_good` where its program goes on as plain
    PyTorch."""
    with _lock:
        if recorder in OPEN:
            OPEN.remove(recorder)
        if not OPEN:
            _WATCHED.may_go(for_good)


def _lasting_doors() -> Iterator[Door]:
    """Doors that only a wrapper needs, or what is known of tensors. Both outlive their context, so these stay from then on."""
    for owner, name in ((torch._C, "_to_dlpack"), (torch.utils.dlpack, "to_dlpack"), (torch, "to_dlpack")):
        if hasattr(owner, name):
            yield owner, name, dlpack_door
    if hasattr(torch._C, "_cuda_jiterator_compile_and_launch_kernel"):
        yield torch._C, "_cuda_jiterator_compile_and_launch_kernel", kernel_door
    yield torch.Tensor, "as_subclass", subclass_door
    # A plain tensor would get a wrapper's memory, which is none.
    yield torch.Tensor, "data", data_door
    yield torch.nn.Parameter, "__new__", parameter_door
    yield torch.Tensor, "_make_subclass", make_subclass_door
    yield torch.utils, "swap_tensors", swap_door
    # What is held of a graph's results lies there between contexts, too, for any stream to read.
    yield from ((owner, name, stream_door) for owner, names in _STREAMS for name in names.split() if hasattr(owner, name))
    yield from ((owner, name, make) for owner, name, make in _CAPTURES if hasattr(owner, name))
    # Functions in C++ take wrappers of former contexts as well.
    yield from ((owner, name, _noted(make)) for owner, name, make in _function_doors())
    DOORS.update(_operator_doors())
    # Not in their place, where each product would go through them.
    matmul = torch.ops.aten.matmul
    DOORS.update((product, product_door(product)) for product in (torch.matmul, torch.linalg.matmul, matmul, matmul.out))


def _noted(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For programs that have taken the function itself from torch before."""

    def make_noted(original: Any) -> Any:
        DOORS[original] = door = make(original)
        return door

    return make_noted


def _function_doors() -> Iterator[Door]:
    for table, make in _FUNCTIONS:
        for owner, names in table:
            yield from ((owner, name, make) for name in names.split() if hasattr(owner, name))


def _operator_doors() -> Iterator[tuple[Any, Any]]:
    """The operators behind these functions, which a program may call by their names, and the door of each."""
    for owner, name, make in (*_function_doors(), (torch, "ctc_loss", lengths_door)):
        packet = getattr(torch.ops.aten, f"linalg_{name}" if owner is torch.linalg else name, None)
        for operator in () if packet is None else (packet, *(getattr(packet, it) for it in packet.overloads())):
            # Lengths that come as a list are passed on as a tensor, and the other way round: the packet finds who takes them.
            yield operator, operator_door(make, packet if make is lengths_door else operator)


def _doors() -> Iterator[Door]:
    for name in METHOD_DOORS:
        yield torch.Tensor, name, dlpack_door if name == "__dlpack__" else memory_door
    yield from ((torch.UntypedStorage, name, storage_door) for name in STORAGE_DOORS.split())
    yield torch.Tensor, "__repr__", memory_door
    yield torch.Tensor, "__deepcopy__", deepcopy_door
    yield torch.Tensor, "__cuda_array_interface__", property_door
    # Where what a program has bound beforehand comes by, too.
    yield torch.jit._trace, "_trace_impl", kernel_door
    yield torch.jit, "trace_module", kernel_door
    yield torch, "ctc_loss", lengths_door
    for module in (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerEncoder):
        yield module, "forward", unheard_door
    yield python_dispatch, "_disable_current_modes", flush_door(Barrier.MODES_OFF)
    for table, make in (
        (_RANDOM, random_door),
        (_SYNCHRONIZE, flush_door(Barrier.SYNCHRONIZE)),
        (((threading.Thread, "start join"), (_thread, "start_new_thread")), thread_door),
        (_DEFAULTS, default_door),
        (_GENERATOR, generator_door),
        (_REDUCER, reducer_door),
        (_READS_GRAPH, history_door),
    ):
        for owner, names in table:
            yield from ((owner, name, make) for name in names.split() if hasattr(owner, name))


_SEEDS = "manual_seed seed get_rng_state set_rng_state"
_CUDA_SEEDS = f"{_SEEDS} manual_seed_all seed_all get_rng_state_all set_rng_state_all"
Table = tuple[tuple[Any, str], ...]
_GENERATOR: Table = (
    (
        torch.Generator,
        "manual_seed seed get_state set_state graphsafe_get_state graphsafe_set_state get_offset set_offset clone_state "
        "__reduce__ __setstate__",
    ),
)
_REDUCER: Table = ()
_READS_GRAPH: Table = ()
if torch.distributed.is_available():
    _Reducer: Any = torch.distributed.Reducer  # type: ignore[attr-defined]
    _REDUCER = ((_Reducer, "__init__ _rebuild_buckets"), (torch.distributed, "_verify_params_across_processes"))
    _READS_GRAPH = ((_Reducer, "prepare_for_backward"),)
_RECURRENT: Table = ((torch, "lstm gru rnn_tanh rnn_relu"), (torch._VF, "lstm gru rnn_tanh rnn_relu"))
_PLACES: Table = ((torch, "tensor_split"), (torch.Tensor, "tensor_split"))
_PACKED = "_pack_padded_sequence _pad_packed_sequence"
_ON_HOST: Table = (
    (torch._VF, _PACKED),
    (torch, f"{_PACKED} sparse_coo_tensor _validate_sparse_coo_tensor_args _shape_as_tensor"),
)
_CLASSES: Table = ((torch.nn.functional, "one_hot"),)
_OF_VALUES: Table = (
    (torch.linalg, "svdvals eigvalsh eigvals cond matrix_rank"),
    (
        torch,
        "choose_qparams_optimized _saturate_weight_to_fp16 "
        "_sobol_engine_draw _sobol_engine_ff_ _sobol_engine_initialize_state_ _sobol_engine_scramble_ "
        "fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight "
        "fbgemm_linear_int8_weight_fp32_activation fbgemm_linear_quantize_weight fbgemm_pack_gemm_matrix_fp16 "
        "fbgemm_pack_quantized_matrix",
    ),
)
_OF_NORMS: Table = ((torch.linalg, "matrix_norm norm"),)
_QUANTILES: Table = ((torch, "quantile nanquantile"), (torch.Tensor, "quantile nanquantile"))
_BY_ELEMENT: Table = ((torch.Tensor, "apply_ map_ map2_"),)
_FUNCTIONS: tuple[tuple[Table, Callable[[Any], Any]], ...] = (
    (_RECURRENT, recurrent_door),
    (_PLACES, places_door),
    (_ON_HOST, host_door),
    (_CLASSES, classes_door),
    (_OF_VALUES, eager_door()),
    (_OF_NORMS, eager_door(takes_singular_values)),
    (_QUANTILES, range_door),
    (_BY_ELEMENT, elements_door),
)
_RANDOM: Table = (
    (torch, _SEEDS),
    (torch.random, _SEEDS),
    (torch.cuda, _CUDA_SEEDS),
    (torch.cuda.random, _CUDA_SEEDS),
)
# What kernels read when they run, and results' dtypes depend on: an op must run under the settings that it was called under.
_DEFAULTS: Table = (
    (torch, "set_default_dtype set_default_tensor_type set_default_device set_num_threads set_flush_denormal"),
    (
        torch._C,
        "_set_deterministic_algorithms _set_deterministic_fill_uninitialized_memory _set_cublas_allow_tf32 _set_cudnn_allow_tf32 "
        "_set_cublas_allow_fp16_reduced_precision_reduction _set_cublas_allow_bf16_reduced_precision_reduction "
        "_set_cublas_allow_fp16_accumulation _set_blas_preferred_backend _set_linalg_preferred_backend _set_cudnn_benchmark "
        "_set_cudnn_deterministic _set_cudnn_enabled _set_float32_matmul_precision _set_mkldnn_enabled _set_mkldnn_deterministic "
        "_set_nnpack_enabled _set_fp32_precision_setter _set_math_sdp_allow_fp16_bf16_reduction _set_sdp_use_flash "
        "_set_sdp_use_mem_efficient _set_sdp_use_math _set_sdp_use_cudnn _set_sdp_use_overrideable _set_sdp_priority_order",
    ),
)
_SYNCHRONIZE: Table = (
    (torch.cuda, "synchronize set_device"),
    *((event, "record wait query elapsed_time synchronize") for event in (torch.cuda.Event, torch.Event)),
    *((stream, "wait_event wait_stream record_event query synchronize") for stream in (torch.cuda.Stream, torch.Stream)),
    (torch.accelerator, "synchronize"),
)
# From then on all that runs is on another stream.
_STREAMS: Table = (
    (torch.cuda.StreamContext, "__enter__ __exit__"),
    (torch.cuda, "set_stream"),
    (torch.accelerator, "set_stream"),
    (torch.Stream, "__enter__ __exit__"),
)
_GRAPHS: tuple[Any, ...] = (torch.cuda.CUDAGraph, *filter(None, [getattr(torch.accelerator, "Graph", None)]))
_CAPTURES: tuple[Door, ...] = (
    *((graph, "capture_begin", capture_begin_door) for graph in _GRAPHS),
    *((graph, name, capture_end_door) for graph in _GRAPHS for name in ("capture_end", "reset")),
    *((graph, "replay", replay_door) for graph in _GRAPHS),
)
# Under the names by which `use_mem_pool` and what Inductor compiles call them.
_POOLS: tuple[Door, ...] = (
    *((owner, "_cuda_beginAllocateCurrentThreadToPool", pool_begin_door) for owner in (torch.cuda.memory, torch._C)),
    *((owner, "_cuda_endAllocateToPool", pool_end_door) for owner in (torch.cuda.memory, torch._C)),
)

_LASTING, _WATCHED = DoorSet(_lasting_doors), DoorSet(_doors)
# From the start: the first context may be opened while a pool is used.
_FIRST = DoorSet(lambda: ((owner, name, make) for owner, name, make in _POOLS if hasattr(owner, name)))
_FIRST.put_on()
