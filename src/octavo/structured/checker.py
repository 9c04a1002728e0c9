"""A process that compiles grammars of strangers, `python -m octavo.structured.checker`: it can be killed.

It reads frames from standard input, the vocabulary first, then constraints, and answers each with a Verdict.
"""

from __future__ import annotations

import resource
import sys
from typing import BinaryIO

import msgspec

from octavo.protocol.structured import StructuredOutputsParams
from octavo.structured.compilation import check_beginning, compiled_matcher, ll_tokenizer
from octavo.structured.frames import Verdict, read_frame, write_frame
from octavo.structured.grammar import grammar_of
from octavo.structured.vocabulary import Vocabulary

_MEMORY_BYTES = 4 * 2**30


def main(source: BinaryIO, target: BinaryIO) -> int:
    """Serve until the end of the input."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    first = read_frame(source)
    if first is None:
        return 0
    vocabulary = msgspec.msgpack.decode(first, type=Vocabulary)
    tokenizer = ll_tokenizer(vocabulary)
    spelled = frozenset(b"".join(vocabulary.tokens))
    write_frame(target, Verdict())
    while (frame := read_frame(source)) is not None:
        params = msgspec.msgpack.decode(frame, type=StructuredOutputsParams)
        try:
            grammar = grammar_of(params, vocabulary)
            check_beginning(compiled_matcher(tokenizer, grammar), spelled)
            verdict = Verdict(grammar=grammar)
        except ValueError as error:
            verdict = Verdict(error=str(error))
        except RecursionError:
            verdict = Verdict(error="it is nested too deeply")
        write_frame(target, verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer, sys.stdout.buffer))
