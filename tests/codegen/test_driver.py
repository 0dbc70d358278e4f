"""Starts of kernels, through a driver that only looks at what it is given."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from kitsune.codegen import driver
from kitsune.codegen.driver import LoadedKernel
from kitsune.codegen.machine_code import Binary

CODE = b"\x7fELF code"


class Start(NamedTuple):
    """What the driver reads where it is told how to start a kernel."""

    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int | None
    attributes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, how: Any, function: Any) -> Start:
        """As a C compiler lays it out: seven numbers, the stream, the attributes' address and their number."""
        *numbers, stream, attributes, n_attributes = struct.unpack_from("@7IPPI", bytes(how))
        listed = [struct.unpack("@I4xI", ctypes.string_at(attributes + 72 * i, 12)) for i in range(n_attributes)]
        return cls(function.value, tuple(numbers[:3]), tuple(numbers[3:6]), numbers[6], stream, tuple(listed))  # type: ignore[arg-type]


class Driver:
    """The driver's functions, each of which succeeds unless `fails` names it; `said` is what was asked of it."""

    def __init__(self) -> None:
        self.fails, self.max_threads, self.context = "", 1024, 0
        self.said: list[tuple[Any, ...]] = []
        # The parameters of each start, read as the driver reads them; and what happens in another thread meanwhile.
        self.packed: list[bytes] = []
        self.started: list[Start] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        def function(*args: Any) -> int:
            self.said.append((name, *args))
            if name == self.fails:
                return 700
            answers = {"cuModuleGetFunction": 77, "cuFuncGetAttribute": self.max_threads, "cuCtxGetCurrent": self.context}
            if name in answers:
                args[0]._obj.value = answers[name]
            if name == "cuDevicePrimaryCtxRetain":
                args[0]._obj.value = 9
            if name == "cuCtxSetCurrent":
                self.context = args[0].value
            if name == "cuLaunchKernelEx":
                self.started.append(Start.of(args[0]._obj, args[1]))
                call, self.meanwhile = self.meanwhile, lambda: None
                call()
                extra = args[-1]
                assert (extra[0], extra[2], extra[4]) == (1, 2, None)
                self.packed.append(ctypes.string_at(extra[1], ctypes.c_size_t.from_address(extra[3]).value))
            if name == "cuGetErrorString":
                args[1]._obj.value = b"an illegal memory access"
            return 0

        return function

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [args for said, *args in self.said if said == name]  # type: ignore[misc]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(driver, "_function", lambda name: getattr(found, name))
    driver._primary_context.cache_clear()
    return found


def binary(parameters: str = "Qi", added: str = "QQ", shared: int = 0, warps: int = 4, early: bool = True) -> Binary:
    return Binary("kernel", parameters, added, warps, shared, early, CODE)


def test_parameters_lie_as_a_c_compiler_would_have_them(fake: Driver) -> None:
    LoadedKernel(binary("QifdQi"), 0).launch(6, [2**63 + 5, -7, 0.1, -0.0, 8, 9], 21)
    at = {0: ("Q", 2**63 + 5), 8: ("i", -7), 12: ("f", struct.unpack("f", struct.pack("f", 0.1))[0]), 16: ("d", -0.0)}
    at |= {24: ("Q", 8), 32: ("i", 9), 40: ("Q", 0), 48: ("Q", 0)}
    (memory,) = fake.packed
    assert len(memory) == 56
    for offset, (kind, value) in at.items():
        assert struct.pack(kind, *struct.unpack_from(kind, memory, offset)) == struct.pack(kind, value)
    assert fake.started == [Start(function=77, grid=(6, 1, 1), block=(128, 1, 1), shared=0, stream=21, attributes=((6, 1),))]


@pytest.mark.parametrize(("waits", "early"), [(False, True), (True, False)])
def test_only_a_kernel_that_waits_is_started_early_and_only_where_that_is_wanted(fake: Driver, waits: bool, early: bool) -> None:
    LoadedKernel(binary(early=waits), 0).launch(1, [0, 0], 0, early)
    LoadedKernel(binary(), 0).launch(1, [0, 0], 0)
    assert [start.attributes for start in fake.started] == [(), ((6, 1),)]


@pytest.mark.parametrize(("number", "expected"), [(1e300, float("inf")), (-1e300, float("-inf")), (3.0, 3.0)])
def test_a_number_beyond_float32_is_infinite(fake: Driver, number: float, expected: float) -> None:
    LoadedKernel(binary("fq", ""), 0).launch(1, [number, 5], 0)
    assert struct.unpack("@fq", *fake.packed) == (expected, 5)


def test_an_integer_that_does_not_fit_is_an_error(fake: Driver) -> None:
    with pytest.raises(struct.error):
        LoadedKernel(binary("i", ""), 0).launch(1, [2**31], 0)
    assert not fake.started


def test_a_start_in_another_thread_changes_no_parameter(fake: Driver) -> None:
    kernel = LoadedKernel(binary("i", ""), 0)
    fake.meanwhile = lambda: kernel.launch(1, [2], 0)
    kernel.launch(1, [1], 0)
    assert fake.packed == [struct.pack("i", 2), struct.pack("i", 1)]


def test_what_the_driver_says_is_told(fake: Driver) -> None:
    kernel = LoadedKernel(binary(), 0)
    fake.fails = "cuLaunchKernelEx"
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx: an illegal memory access"):
        kernel.launch(1, [0, 0], 0)


def test_blocks_with_more_threads_than_registers_allow_are_refused(fake: Driver) -> None:
    fake.max_threads = 128
    LoadedKernel(binary(warps=4), 0)
    with pytest.raises(RuntimeError, match="256 threads"):
        LoadedKernel(binary(warps=8), 0)


@pytest.mark.parametrize(("shared", "told"), [(0, []), (48 << 10, []), (100_000, [100_000])])
def test_much_shared_memory_is_asked_for(fake: Driver, shared: int, told: list[int]) -> None:
    kernel = LoadedKernel(binary(shared=shared), 0)
    assert [args[2] for args in fake.named("cuFuncSetAttribute")] == told
    kernel.launch(1, [0, 0], 0)
    assert fake.started[0].shared == shared


def test_a_function_is_loaded_with_its_module_and_not_at_its_first_start(fake: Driver) -> None:
    kernel = LoadedKernel(binary(shared=100_000), 0)
    names = [name for name, *_ in fake.said]
    assert names.index("cuFuncSetAttribute") < names.index("cuFuncLoad")
    assert [args[0].value for args in fake.named("cuFuncLoad")] == [77]
    kernel.launch(1, [0, 0], 0)
    assert len(fake.named("cuFuncLoad")) == 1


def test_a_driver_that_cannot_do_that_does_it_at_the_first_start(fake: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def function(name: str) -> Any:
        if name == "cuFuncLoad":
            raise AttributeError(name)
        return getattr(fake, name)

    monkeypatch.setattr(driver, "_function", function)
    LoadedKernel(binary(), 0).launch(1, [0, 0], 0)
    assert fake.started


def test_a_thread_without_a_context_gets_that_of_the_device(fake: Driver) -> None:
    LoadedKernel(binary(), 3)
    assert fake.context == 9 and fake.named("cuDeviceGet")[0][1] == 3


@pytest.mark.parametrize("fails", ["", "cuModuleGetFunction"])
def test_a_kernel_is_loaded_for_its_device_and_not_for_the_current_one(fake: Driver, fails: str) -> None:
    fake.context, fake.fails = 5, fails
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        LoadedKernel(binary(), 3)
    steps = [(name, *(getattr(a, "value", None) for a in args)) for name, *args in fake.said]
    loads = next(i for i, (name, *_) in enumerate(steps) if name == "cuModuleLoadData")
    assert ("cuCtxSetCurrent", 9) in steps[:loads] and steps[-1] == ("cuCtxSetCurrent", 5) and fake.context == 5


def test_only_what_may_take_long_lets_go_of_pythons_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def __getattr__(self, name: str) -> Any:
            return type("Function", (), {"lock": self.kind})()

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library("lets go"))
    monkeypatch.setattr(ctypes, "PyDLL", lambda name: Library("keeps"))
    driver._function.cache_clear()
    names = ("cuLaunchKernelEx", "cuModuleLoadData", "cuFuncGetAttribute", "cuCtxGetCurrent")
    assert [driver._function(name).lock for name in names] == ["lets go", "lets go", "keeps", "keeps"]
    assert len(driver._function("cuLaunchKernelEx").argtypes) == 4
    driver._function.cache_clear()
