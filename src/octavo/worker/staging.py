"""Host memory that a GPU reads and writes while the host goes on."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Event:
    """A point in the device's stream. On a CPU, where everything is done at once, it has always been reached."""

    __slots__ = ("_event",)

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None

    def record(self) -> None:
        """Put it after all that was launched so far in the current stream."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Block until the device has reached it."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Event) -> float | None:
        """The device's time between two recorded points, both reached. None on a CPU."""
        if self._event is None or earlier._event is None:
            return None
        return earlier._event.elapsed_time(self._event) / 1000


class Stage:
    """One step's host buffers: `words` go to the device, `out` and `verdict` come back. Free again once `done` is
    reached: until then kernels use them, of which torch knows nothing.

    began: where the step's own work starts. sampled: where that of new guesses does."""

    __slots__ = (
        "began",
        "done",
        "out",
        "out_tensor",
        "sampled",
        "verdict",
        "verdict_tensor",
        "words",
        "words_tensor",
    )

    def __init__(self, num_words: int, max_rows: int, verdict_size: int, device: torch.device) -> None:
        """verdict_size: words that a row is told about guesses, 0 without speculation."""
        pinned = device.type == "cuda"
        self.words_tensor = torch.zeros(num_words, dtype=torch.int32, pin_memory=pinned)
        self.out_tensor = torch.zeros(max_rows, 2, dtype=torch.int32, pin_memory=pinned)
        self.verdict_tensor = torch.zeros(max_rows, verdict_size, dtype=torch.int32, pin_memory=pinned)
        self.words: NDArray[np.int32] = self.words_tensor.numpy()
        self.out: NDArray[np.int32] = self.out_tensor.numpy()
        self.verdict: NDArray[np.int32] = self.verdict_tensor.numpy()
        self.began, self.sampled, self.done = Event(device), Event(device), Event(device)


class Staging:
    """A ring of stages: taking one waits for the step that used it last, which is long done."""

    def __init__(self, count: int, num_words: int, max_rows: int, verdict_size: int, device: torch.device) -> None:
        self._stages = deque(Stage(num_words, max_rows, verdict_size, device) for _ in range(count))

    def take(self) -> Stage:
        """The stage that was used longest ago."""
        stage = self._stages.popleft()
        self._stages.append(stage)
        stage.done.wait()
        return stage


def upload(words: NDArray[np.int32], device: torch.device) -> Tensor:
    """A new device tensor of these words. torch keeps the pinned copy until the device is done with it."""
    host = torch.from_numpy(words)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()


class EarlyCopies:
    """Copies to buffers on the device that do not wait for what is launched already, but for their last readers."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._readers = torch.cuda.Event() if device.type == "cuda" else None

    def copy(self, words: NDArray[np.int32], to: Tensor) -> None:
        """Copy these words to a tensor of as many; what is launched from now on in the current stream reads them. torch
        keeps the pinned copy until the device is done with it."""
        host = torch.from_numpy(words)
        if self._stream is None or self._readers is None:
            to.copy_(host)
            return
        pinned = host.pin_memory()
        self._stream.wait_event(self._readers)
        with torch.cuda.stream(self._stream):
            to.copy_(pinned, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._stream)

    def read(self) -> None:
        """All readers so far have been launched, in the current stream."""
        if self._readers is not None:
            self._readers.record()
