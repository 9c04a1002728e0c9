"""The files of a batch: requests in, results out, one JSON object a line (OpenAI's Batch API).

Neither file is ever held whole. What is kept of each line is a digest of its custom_id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta


class BatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the input. body: what would be posted to `url`."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class BatchResponse(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchError(msgspec.Struct, frozen=True):
    code: str
    message: str


class BatchResult(msgspec.Struct, frozen=True):
    """One line of the output. id: batch_req_ and the number of the input's line, from 1.

    A request that was answered has a response, whatever its status; a line that is no request has an error.
    """

    id: str
    custom_id: str | None
    response: BatchResponse | None
    error: BatchError | None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code != 200


class _Seen(msgspec.Struct, frozen=True):
    """Of a line of the output, what resuming needs."""

    class Response(msgspec.Struct, frozen=True):
        status_code: int

    id: str
    custom_id: str | None
    response: Response | None


@dataclass
class Finished:
    """What an earlier run has written: requests by their custom_id, refused lines by their result's id."""

    custom_ids: set[bytes] = field(default_factory=set)  # digests
    refused: set[str] = field(default_factory=set)
    num_failed: int = 0

    def __len__(self) -> int:
        return len(self.custom_ids) + len(self.refused)


def digest(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(), digest_size=12).digest()


def read_finished(path: Path) -> Finished:
    """The results in `path`, none where there is no such file. A last line that was cut short is cut off.

    Raises ValueError for a file that has something else in it, OSError for one that cannot be read or written.
    """
    finished = Finished()
    if not path.exists():
        return finished
    decode = msgspec.json.Decoder(_Seen).decode
    with path.open("r+b") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                lines.seek(-len(line), 2)
                lines.truncate()
                break
            try:
                seen = decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise ValueError(
                    f"output_file={path} has no result of a batch in line {number}; "
                    "allowed: a new file, or one that an earlier run has written"
                ) from None
            if seen.response is None:
                finished.refused.add(seen.id)
            elif seen.custom_id is not None:
                finished.custom_ids.add(digest(seen.custom_id))
            finished.num_failed += seen.response is None or seen.response.status_code != 200
    return finished


def count_lines(path: Path) -> int:
    """Lines that are not empty. Raises OSError."""
    with path.open("rb") as file:
        return sum(1 for _ in _lines(file, 1))


def read_requests(path: Path, max_bytes: int) -> Iterator[tuple[str, BatchRequest | BatchError, str | None]]:
    """(result id, request or what is wrong with the line, custom_id where there is one) of each line in turn.

    A line longer than `max_bytes` is refused without being held, an empty one passed over. Raises OSError.
    """
    seen: set[bytes] = set()
    decode = msgspec.json.Decoder(BatchRequest).decode
    with path.open("rb") as file:
        for number, line in _lines(file, max_bytes):
            name = f"batch_req_{number}"
            if len(line) > max_bytes:
                yield name, BatchError("line_too_long", f"line {number} is longer than {max_bytes} bytes"), None
                continue
            try:
                request = decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                yield name, BatchError("invalid_line", f"line {number}: {error}"), _custom_id(line)
                continue
            key = digest(request.custom_id)
            if key in seen:
                message = f"line {number}: an earlier line has the custom_id {request.custom_id!r} too"
                yield name, BatchError("duplicate_custom_id", message), request.custom_id
                continue
            seen.add(key)
            yield name, request, request.custom_id


def _lines(file: Any, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of lines that are not empty; of a line over `max_bytes`, a part over it."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(2**16)):
            pass
        line = line.rstrip(b"\r\n")
        if line.strip():
            yield number, line


def _custom_id(line: bytes) -> str | None:
    class Named(msgspec.Struct):
        custom_id: str | None = None

    try:
        return msgspec.json.decode(line, type=Named).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
