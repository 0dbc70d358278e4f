"""Which streams wait for which, with a stand-in for those of a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kitsune.ir import streams

GPU = torch.device("cuda:0")


class Stream:
    """One of torch's; if it is somebody else's, its number is its handle."""

    device, device_index, device_type = GPU, 0, 1

    def __init__(self, number: int, is_external: bool = False) -> None:
        self.stream_id, self.cuda_stream = number, number if is_external or not number else 1000 + number


class Device:
    """Its streams by number, the current one, and what was asked of it: (who waits, for whom), and "work"."""

    def __init__(self) -> None:
        self.streams = {number: Stream(number, is_external=number == 77) for number in (0, 1, 2, 77)}
        self.now, self.captures, self.asked = self.streams[0], False, []  # type: ignore[var-annotated]
        self.current = 3
        self._recorded: dict[Any, int] = {}

    def enter(self, stream_id: int, device_index: int, **_: int) -> None:
        self.now, self.current = self.streams[stream_id], device_index

    def set_device(self, index: int) -> None:
        self.current = index

    def record(self, event: Any, stream: Stream) -> None:
        self._recorded[event] = stream.stream_id

    def wait(self, event: Any, stream: Stream) -> None:
        self.asked.append((stream.stream_id, self._recorded[event]))

    def use(self, *numbers: int) -> None:
        for number in numbers:
            self.now = self.streams[number]
            streams.use(self.now)  # type: ignore[arg-type]
        self.now = self.streams[0]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    base = type("Base", (), {"record": staticmethod(device.record), "wait": staticmethod(device.wait)})
    for name, there in {
        "_CudaEventBase": base,
        "_cuda_setStream": device.enter,
        "_cuda_getCurrentStream": lambda index: streams.place_of(device.now),  # type: ignore[arg-type]
        "_cuda_isCurrentStreamCapturing": lambda: device.captures,
        "_cuda_getDevice": lambda: device.current,
        "_cuda_setDevice": device.set_device,
    }.items():
        monkeypatch.setattr(torch._C, name, there, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.now)
    monkeypatch.setattr(torch.cuda, "Event", object)
    monkeypatch.setattr(streams, "_used", {})
    monkeypatch.setattr(streams, "_left", {})
    yield device


def test_one_stream_waits_for_nobody(device: Device) -> None:
    device.use(0)
    with streams.in_order(GPU):
        device.asked.append("work")
    assert device.asked == ["work"]


def test_work_in_order_is_behind_and_ahead_of_all_others(device: Device) -> None:
    device.use(0, 1, 2, 1)
    with streams.in_order(GPU):
        device.asked.append("work")
    assert device.asked == [(0, 1), (0, 2), "work", (1, 0), (2, 0)]


def test_a_stream_that_is_captured_waits_for_nobody(device: Device) -> None:
    device.use(0, 1)
    device.captures = True
    with streams.in_order(GPU):
        device.asked.append("work")
    assert device.asked == ["work"]


def test_other_devices_are_not_asked(device: Device) -> None:
    device.use(0, 1)
    for other in (torch.device("cpu"), torch.device("cuda:1")):
        with streams.in_order(other):
            pass
    assert not device.asked


def test_a_stream_of_others_is_waited_for_as_it_was_left_and_not_asked_any_more(device: Device) -> None:
    device.use(0, 1, 77)
    assert device.asked == [(77, 0), (77, 1)], "who comes to it may read what was moved"
    device.asked.clear()
    with streams.in_order(GPU):
        device.asked.append("work")
    assert device.asked == [(0, 1), (0, 77), "work", (1, 0)]


@pytest.mark.parametrize("number", [1, 77])
def test_a_stream_that_was_used_is_entered_once_more(device: Device, number: int) -> None:
    device.use(0, number)
    device.asked.clear()
    with streams.on(GPU, device.streams[number].cuda_stream):
        # That of somebody else may be gone: what was to run on it runs here, behind all.
        assert device.now is device.streams[1 if number == 1 else 0]
        assert device.asked == ([] if number == 1 else [(0, 77)])
    # The program's own current device is as it was, too: to make a stream the current one makes its device that.
    assert device.now is device.streams[0] and device.current == 3
