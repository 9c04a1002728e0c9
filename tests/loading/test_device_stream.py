"""Files read by threads: the same tensors, in order, within bounds, and errors that say where."""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tensors, write, write_sharded
from safetensors.torch import save_file
from torch import Tensor

from octavo.loading import device_stream
from octavo.loading.device_stream import HostCopies, StoredTensor, StreamLimits, read_header, stream_tensors
from octavo.loading.weights import safetensors_weights, stored_tensors

CPU = torch.device("cpu")
SMALL = StreamLimits(num_threads=3, buffer_bytes=100, ahead_bytes=1000)


def files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob("*.safetensors")))


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


@pytest.mark.parametrize("limits", [None, SMALL, StreamLimits(1, 7, 0)])
def test_the_same_tensors_in_the_order_of_the_file(limits: StreamLimits | None, tmp_path: Path) -> None:
    (path,) = files(write(tmp_path))
    stored = read_header(path)
    assert [s.offset for s in stored] == sorted(s.offset for s in stored)
    got = list(stream_tensors(stored, CPU, limits))
    assert [name for name, _ in got] == [s.name for s in stored]
    expected = dict(safetensors_weights((path,)))
    assert set(dict(got)) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got)


def test_every_dtype_and_shape(tmp_path: Path) -> None:
    kinds = [d for d in device_stream._DTYPES.values() if not d.is_floating_point or d.itemsize > 1]
    state = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in kinds}
    state |= {"fp8": torch.ones(3).to(torch.float8_e4m3fn), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    got = dict(stream_tensors(read_header(tmp_path / "model.safetensors"), CPU, SMALL))
    assert set(got) == set(state)
    for name, tensor in state.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got[name].float(), tensor.float())


def test_shards_one_after_another(tmp_path: Path) -> None:
    got = dict(stream_tensors(stored_tensors(files(write_sharded(tmp_path))), CPU, SMALL))
    assert all(torch.equal(got.pop(name), tensor) for name, tensor in tensors().items())
    assert not got


def test_a_tensor_that_its_shard_lacks_is_named_first(tmp_path: Path) -> None:
    shard = files(write_sharded(tmp_path))[1]
    save_file({"model.norm.weight": torch.ones(16)}, shard)
    with pytest.raises(ValueError, match=re.escape(f"{shard}: tensor model.layers.0.input_layernorm.weight")):
        stored_tensors(files(tmp_path))


class Watched(HostCopies):
    """Counts what is allocated and not let go, and remembers the most."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.closed = False

    def allocate(self, num_bytes: int) -> Tensor:
        self.allocated.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def close(self) -> None:
        self.closed = True


def test_no_more_is_under_way_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    monkeypatch.setattr(device_stream, "HostCopies", lambda: watched)
    state = {f"t{i:02}": torch.full((50,), float(i)) for i in range(20)}  # 200 bytes each
    save_file(state, tmp_path / "m.safetensors")
    consumed = 0
    for _, tensor in stream_tensors(read_header(tmp_path / "m.safetensors"), CPU, SMALL):
        assert sum(watched.allocated) - consumed <= SMALL.ahead_bytes
        consumed += tensor.nbytes
    assert len(watched.allocated) == 20
    assert watched.closed


def test_leaving_early_ends_the_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    stream = stream_tensors(read_header(files(write(tmp_path))[0]), CPU, SMALL)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def test_memory_is_the_consumers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def allocate(_self: HostCopies, num_bytes: int) -> Tensor:
        array = np.empty(num_bytes, np.uint8)  # lives as long as the storage over it
        alive.append(weakref.ref(array))
        return torch.from_numpy(array)

    monkeypatch.setattr(HostCopies, "allocate", allocate)
    stream = stream_tensors(read_header(files(write(tmp_path))[0]), CPU, StreamLimits(2, 64, 0))
    _, tensor = next(stream)
    (memory,) = alive
    assert memory() is not None
    del tensor
    end = time.monotonic() + 5  # the thread that brought it lets go soon
    while memory() is not None and time.monotonic() < end:
        time.sleep(0.001)
    assert memory() is None
    stream.close()


def test_a_file_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    (path,) = files(write(tmp_path))
    stored = read_header(path)
    path.write_bytes(path.read_bytes()[: stored[-1].offset + 4])
    said = f"{path}: tensor {stored[-1].name} cannot be read: the file ends"
    with pytest.raises(ValueError, match=re.escape(said)):
        list(stream_tensors(stored, CPU, SMALL))


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    missing = tmp_path / "gone.safetensors"
    with pytest.raises(ValueError, match=re.escape(f"{missing} is not a readable safetensors file")):
        read_header(missing)
    with pytest.raises(ValueError, match=re.escape(f"{missing} cannot be read")):
        list(stream_tensors([StoredTensor(missing, "x", torch.float32, (1,), 8, 4)], CPU, SMALL))


def test_a_fault_of_a_thread_reaches_the_consumer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: HostCopies, _source: Tensor, _target: Tensor) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(HostCopies, "start", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        list(stream_tensors(read_header(files(write(tmp_path))[0]), CPU, SMALL))


def test_slow_copies_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = HostCopies.start

    def slow(self: HostCopies, source: Tensor, target: Tensor) -> None:
        time.sleep(0.002 * (int(source[0]) % 2))
        plain(self, source, target)

    monkeypatch.setattr(HostCopies, "start", slow)
    (path,) = files(write(tmp_path))
    got = dict(stream_tensors(read_header(path), CPU, SMALL))
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b"\xff" * 10, b"", "codec"),
        (b"[1]", b"", "items"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", "end at byte"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"123456789", "end at byte"),
        ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678", "tensor x of F32"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678", "tensor x begins"),
        ({"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "dtype F4"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, b"1234", "tensor x has shape"),
        ({"x": {"dtype": "F32", "shape": [1]}}, b"1234", "data_offsets"),
        ({"x": 5}, b"", "not subscriptable"),
    ],
)
def test_corrupt_headers(header: Any, data: bytes, said: str, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a readable safetensors file")) as caught:
        read_header(path)
    assert said in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(keep: int, tmp_path: Path) -> None:
    (path,) = files(write(tmp_path))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a readable safetensors file")):
        read_header(path)
