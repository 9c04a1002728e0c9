"""GrammarCompiler: a front end's check of a constraint, within limits of time and memory."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from typing import BinaryIO, cast

import msgspec

from octavo.protocol.structured import StructuredOutputsParams
from octavo.structured.frames import Verdict, read_frame, write_frame
from octavo.structured.vocabulary import TokenSource, Vocabulary, vocabulary_of

COMPILE_SECONDS = 5.0
_START_SECONDS = 60.0
_MAX_VERDICTS = 512
_MAX_CACHED_BYTES = 32 * 2**20


class GrammarCompiler:
    """Compiles in a process of its own, started at the first use, killed when it takes too long. Any thread may call.

    Verdicts are kept by the constraint's kind, text and options, the least recently used dropped first.
    """

    def __init__(self, source: TokenSource, vocab_size: int, seconds: float = COMPILE_SECONDS) -> None:
        """vocab_size: the model's. seconds: what one constraint may take."""
        self._source = source
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._vocabulary: Vocabulary | None = None
        self._spelled: frozenset[int] = frozenset()  # the bytes that its tokens have; written with it
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._num_cached_bytes = 0
        self._lock = threading.Lock()  # of the checker
        self._checker: _Checker | None = None

    def compile(self, params: StructuredOutputsParams) -> str:
        """The grammar's text, for Request.grammar. Raises ValueError, naming the kind, with llguidance's reason."""
        key = msgspec.json.encode(params)
        with self._lock:
            verdict = self._verdicts.get(key)
            if verdict is not None:
                self._verdicts.move_to_end(key)
            else:
                verdict = self._check(params)
                self._keep(key, verdict)
        if verdict.grammar is None:
            raise ValueError(f"structured_outputs.{params.kind} cannot be used: {verdict.error}")
        return verdict.grammar

    def start(self) -> None:
        """Start the process now, unless it runs: the first `compile` then need not wait for it."""
        with self._lock, contextlib.suppress(ValueError, TimeoutError, EOFError, BrokenPipeError):
            self._started()

    def close(self) -> None:
        """End the process, and with it what it compiles. The next `compile` starts another."""
        checker = self._checker
        if checker is not None:
            checker.process.kill()
            with self._lock:  # whoever waits for the process hears of its end at once
                self._drop()

    def _check(self, params: StructuredOutputsParams) -> Verdict:
        """Raises ValueError, and keeps nothing, where the limit of time or memory was passed."""
        self._read_vocabulary()
        for text in params.choice or ():
            # Some vocabularies lack bytes that no text they were made from had: the output would come to a dead end.
            if not self._spelled.issuperset(text.encode()):
                return Verdict(None, f"no tokens of the model spell {text[:64]!r}")
        try:
            return self._started().ask(params, self._seconds)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            self._drop()
            late = isinstance(error, TimeoutError)
            reason = f"it takes more than {self._seconds:g} s to compile" if late else "it takes too much memory"
            raise ValueError(f"structured_outputs.{params.kind} cannot be used: {reason}") from None

    def _started(self) -> _Checker:
        if self._checker is None:
            self._checker = _Checker(self._read_vocabulary())
        return self._checker

    def _read_vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = vocabulary_of(self._source, self._vocab_size)
            self._spelled = frozenset(b"".join(self._vocabulary.tokens))
        return self._vocabulary

    def _keep(self, key: bytes, verdict: Verdict) -> None:
        self._verdicts[key] = verdict
        self._num_cached_bytes += _size(key, verdict)
        while len(self._verdicts) > _MAX_VERDICTS or self._num_cached_bytes > _MAX_CACHED_BYTES:
            self._num_cached_bytes -= _size(*self._verdicts.popitem(last=False))

    def _drop(self) -> None:
        if self._checker is not None:
            self._checker.kill()
            self._checker = None


def _size(key: bytes, verdict: Verdict) -> int:
    return len(key) + len(verdict.grammar or verdict.error or "")


class _Checker:
    """The process `octavo.structured.checker`. It ends with this object, with `kill`, or with its parent."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises TimeoutError or EOFError where it does not come up."""
        process = subprocess.Popen(
            (sys.executable, "-m", "octavo.structured.checker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self.process = process
        self.kill = weakref.finalize(self, _kill, process)
        self._input = cast(BinaryIO, process.stdin)
        self._output = cast(BinaryIO, process.stdout)
        self._exchange(vocabulary, _START_SECONDS)

    def ask(self, params: StructuredOutputsParams, seconds: float) -> Verdict:
        """Raises TimeoutError, or EOFError or BrokenPipeError where the process is gone; it is of no use then."""
        return self._exchange(params, seconds)

    def _exchange(self, message: msgspec.Struct, seconds: float) -> Verdict:
        write_frame(self._input, message)
        frame = read_frame(cast(BinaryIO, _Deadline(self._output, time.monotonic() + seconds)))
        if frame is None:
            raise EOFError
        return msgspec.msgpack.decode(frame, type=Verdict)


class _Deadline:
    """A pipe whose `read` gives up at a time of the monotonic clock."""

    def __init__(self, pipe: BinaryIO, end: float) -> None:
        self._pipe = pipe
        self._end = end

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end of the stream. Raises TimeoutError."""
        found = b""
        while len(found) < size:
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, self._end - time.monotonic()))
            if not ready:
                raise TimeoutError
            piece = self._pipe.read(size - len(found))
            if not piece:
                break
            found += piece
        return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()
