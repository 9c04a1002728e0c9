"""Files of tensors read straight onto a device: file ranges into pinned buffers, those by asynchronous copies.

    threads:   preadv into a buffer -> copy on a side stream -> the buffer again, once its copy is done
    consumer:  tensors in the order of the files, each waited for by the consumer's own stream

No page of a file is mapped, so no page fault stands between the page cache and the copy. (Format: safetensors,
Hugging Face.)
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_NUM_BUFFERS = 2  # of a reader thread: one is read into while the other is copied
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """offset, num_bytes: of its data, in the file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class StreamLimits:
    """num_threads: readers, each with two pinned buffers of buffer_bytes; ahead_bytes: device memory of tensors that
    are under way and not handed out yet (one tensor may exceed it alone)."""

    num_threads: int = 8
    buffer_bytes: int = 8 << 20
    ahead_bytes: int = 1 << 30


def read_header(path: Path) -> list[StoredTensor]:
    """The file's tensors in the order of their data.

    Raises ValueError naming a file whose header is cut short, is no header, or does not cover the data exactly.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"its header is cut short or too long ({length} bytes of {size})")
            fields = json.loads(file.read(length))
        return _placed(path, fields, 8 + length, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _placed(path: Path, fields: dict[str, Any], data: int, size: int) -> list[StoredTensor]:
    """data: where in the file the tensors begin. Raises ValueError unless they fill the rest without gap or overlap."""
    tensors = []
    for name, entry in fields.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"tensor {name} has dtype {entry['dtype']}; supported: {', '.join(_DTYPES)}")
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"tensor {name} has shape {list(shape)} and data_offsets {[begin, end]}")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name} of {entry['dtype']} {list(shape)} has {end - begin} bytes")
        tensors.append(StoredTensor(path, name, dtype, shape, data + begin, end - begin))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    at = data
    for tensor in tensors:
        if tensor.offset != at:
            raise ValueError(f"tensor {tensor.name} begins at byte {tensor.offset}, expected {at}")
        at += tensor.num_bytes
    if at != size:
        raise ValueError(f"its tensors end at byte {at}, the file at {size}")
    return tensors


class Copies(Protocol):
    """How bytes get from a buffer to the device. Called from several threads."""

    def buffer(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] in host memory."""
        ...

    def allocate(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the device, that copies started from now on may write."""
        ...

    def start(self, source: Tensor, target: Tensor) -> Any:
        """Copy buffer to device; something that `finish` takes."""
        ...

    def finish(self, started: Any) -> None:
        """Wait until the buffer of a started copy can be written again."""
        ...

    def hand_over(self, started: Any) -> None:
        """Make the caller's later work on the device come after this copy and all started before it."""
        ...

    def close(self) -> None:
        """Wait for every copy."""
        ...


class HostCopies:
    """To ordinary memory, at once."""

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    allocate = buffer

    def start(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def finish(self, started: None) -> None:
        """Nothing is pending."""

    def hand_over(self, started: None) -> None:
        """Nothing is pending."""

    def close(self) -> None:
        """Nothing is pending."""


class CudaCopies:
    """To a GPU, on a stream of their own. `allocate` and `hand_over` are the consumer's: one thread, one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def allocate(self, num_bytes: int) -> Tensor:
        made = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        # The memory may have been another tensor's, which the consumer's stream has yet to read.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return made

    def start(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def finish(self, started: torch.cuda.Event) -> None:
        started.synchronize()

    def hand_over(self, started: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(started)

    def close(self) -> None:
        self._stream.synchronize()


@dataclass
class _Arrival:
    """A tensor under way. Reader threads write all but `stored` and `memory`, under the stream's condition."""

    stored: StoredTensor
    memory: Tensor  # uint8 [num_bytes], on the device
    num_pieces: int  # not started yet
    last: Any = None  # the copy that was started last
    error: ValueError | None = None


@dataclass(frozen=True)
class _Piece:
    arrival: _Arrival
    begin: int  # in the tensor's bytes
    end: int


@dataclass
class _Files:
    """Open descriptors of the files that are read from."""

    descriptors: dict[Path, int] = field(default_factory=dict)

    def open(self, path: Path) -> None:
        if path not in self.descriptors:
            self.descriptors[path] = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


class _Stream:
    """Reader threads and what they have under way."""

    def __init__(self, copies: Copies, limits: StreamLimits) -> None:
        self._copies = copies
        self._limits = limits
        self._files = _Files()
        self._pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._read_all, daemon=True) for _ in range(limits.num_threads)]
        self._failure: BaseException | None = None  # of a thread, other than a file's fault
        self._stopped = False
        for thread in self._threads:
            thread.start()

    def send_for(self, stored: StoredTensor) -> _Arrival:
        """Have a tensor read. Raises ValueError if its file cannot be opened."""
        try:
            self._files.open(stored.path)
        except OSError as error:
            raise ValueError(f"{stored.path} cannot be read: {error}") from error
        size = self._limits.buffer_bytes
        arrival = _Arrival(stored, self._copies.allocate(stored.num_bytes), -(-stored.num_bytes // size))
        for begin in range(0, stored.num_bytes, size):
            self._pieces.put(_Piece(arrival, begin, min(begin + size, stored.num_bytes)))
        return arrival

    def wait_for(self, arrival: _Arrival) -> Tensor:
        """The tensor, once all its copies are started and ordered before the caller's work on the device."""
        with self._changed:
            self._changed.wait_for(lambda: not arrival.num_pieces or arrival.error or self._failure)
            if self._failure is not None:
                raise self._failure
            if arrival.error is not None:
                raise arrival.error
        if arrival.stored.num_bytes:
            self._copies.hand_over(arrival.last)
        return arrival.memory.view(arrival.stored.dtype).view(arrival.stored.shape)

    def close(self) -> None:
        """No thread reads or copies any more on return."""
        self._stopped = True
        for _ in self._threads:
            self._pieces.put(None)
        for thread in self._threads:
            thread.join()
        self._copies.close()
        self._files.close()

    def _read_all(self) -> None:
        ring: deque[tuple[Tensor, Any]] = deque()  # a buffer, and the copy out of it that was started last
        try:
            # In inference mode a thread may write the memory that a consumer allocated in or out of it.
            with torch.inference_mode():
                while self._serve(self._pieces.get(), ring):
                    pass
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _serve(self, piece: _Piece | None, ring: deque[tuple[Tensor, Any]]) -> bool:
        """Read a piece, unless nobody wants it any more. Returns whether to go on."""
        if piece is None or self._stopped:
            return False
        if piece.arrival.error is None:
            if len(ring) < _NUM_BUFFERS:
                buffer = self._copies.buffer(self._limits.buffer_bytes)
            else:
                buffer, started = ring.popleft()
                if started is not None:
                    self._copies.finish(started)
            ring.append((buffer, self._bring(piece, buffer)))
        return True

    def _bring(self, piece: _Piece, buffer: Tensor) -> Any:
        arrival, source = piece.arrival, buffer[: piece.end - piece.begin]
        stored, started, error = arrival.stored, None, None
        try:
            _read(self._files.descriptors[stored.path], source, stored.offset + piece.begin)
            started = self._copies.start(source, arrival.memory[piece.begin : piece.end])
        except OSError as caught:
            error = ValueError(f"{stored.path}: tensor {stored.name} cannot be read: {caught}")
        with self._changed:
            arrival.num_pieces -= 1
            arrival.error = error or arrival.error
            arrival.last = started if error is None else arrival.last
            self._changed.notify_all()
        return started


def _read(descriptor: int, target: Tensor, offset: int) -> None:
    """Fill target, uint8 in host memory, from a file. Raises OSError at the file's end."""
    view = target.numpy().data
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise OSError(f"the file ends at byte {offset}")
        view, offset = view[count:], offset + count


def stream_tensors(
    tensors: list[StoredTensor], device: torch.device, limits: StreamLimits | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on the device, in the order given; it is the consumer's own.

    Raises ValueError naming the file and the tensor that cannot be read. On a GPU the work of the stream that is
    current at `next` comes after the copies; closing the iterator early waits for those under way.
    """
    limits = limits or StreamLimits()
    copies = CudaCopies(device) if device.type == "cuda" else HostCopies()
    stream = _Stream(copies, limits)
    try:
        waiting, under_way, ahead = deque(tensors), deque[_Arrival](), 0
        while waiting or under_way:
            while waiting and (not under_way or ahead + waiting[0].num_bytes <= limits.ahead_bytes):
                under_way.append(stream.send_for(waiting.popleft()))
                ahead += under_way[-1].stored.num_bytes
            ahead -= under_way[0].stored.num_bytes
            # No name here holds the tensor: the consumer alone decides how long its memory lives.
            yield under_way[0].stored.name, stream.wait_for(under_way.popleft())
    finally:
        stream.close()
