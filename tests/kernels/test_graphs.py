"""A recording that fails leaves the process as it was, and says what failed first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from deltaw.kernels import graphs
from deltaw.kernels.graphs import capture


class Device:
    """A stand-in for torch.cuda: recording `broken` work can't be ended, and its generator goes on believing in it."""

    def __init__(self) -> None:
        self.stream, self.recording = "the caller's", False
        self.default_generators = [self]

    def CUDAGraph(self) -> object:
        return object()

    def current_stream(self) -> str:
        return self.stream

    def set_stream(self, stream: str) -> None:
        self.stream = stream

    def current_device(self) -> int:
        return 0

    def clone_state(self) -> "Device":
        return Device()

    def graphsafe_set_state(self, state: "Device") -> None:
        self.recording = state.recording

    @contextmanager
    def graph(self, graph: object, pool: Any, capture_error_mode: str) -> Iterator[None]:
        before, self.stream, self.recording = self.stream, "the recording's", True
        try:
            yield
        except Exception:
            raise RuntimeError("the capture was invalidated")  # noqa: B904 as PyTorch does
        self.stream, self.recording = before, False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(graphs.torch, "cuda", made)
    return made


def test_a_recording(device: Device) -> None:
    assert capture(lambda: 3)[1] == 3 and not device.recording and device.stream == "the caller's"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too much"), ValueError("no such size")])
def test_what_failed_first_is_said_and_nothing_is_left_behind(device: Device, error: Exception) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        capture(work)
    assert not device.recording and device.stream == "the caller's"
