"""Tokenizer: text to token ids and back, from a model folder or a GGUF file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from octavo.text.gguf_tokenizer import read_gguf
from octavo.text.tokenizer_files import TokenizerParts, read_folder

_SPACE_MARK = "▁"


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model folder or of a .gguf file.

    Raises FileNotFoundError where there is none, ValueError for one that cannot be read or is of an unknown kind.
    """
    if path.is_dir():
        return Tokenizer(read_folder(path))
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer at {path}")
    return Tokenizer(read_gguf(path))


class Tokenizer:
    """Safe to call from several threads at once; encoding releases the GIL.

    Decoding goes through bytes: every token is a byte string, and a text is their concatenation read as UTF-8,
    with U+FFFD for what is not. So a text can be built token by token and comes out the same.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._backend = parts.backend
        self._to_bytes, self.leading_spaces_stripped = _byte_scheme(parts.backend)
        self._bytes: dict[int, bytes | None] = {}  # a cache; every writer of a key writes the same value
        self.bos_token = parts.bos_token
        self.eos_token = parts.eos_token
        self.bos_token_id = self._id_of(parts.bos_token)
        self.eos_token_ids = parts.eos_token_ids
        self.chat_template = parts.chat_template
        added = parts.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = 1 + max(parts.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids. Special tokens written in `text` become their ids; `add_special_tokens` adds the model's BOS.

        Raises ValueError for text with a lone surrogate, which no UTF-8 can hold.
        """
        try:
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError:
            check_encodable(text)
            raise

    def encode_pair(self, first: str, second: str, add_special_tokens: bool) -> list[int]:
        """Token ids of two texts as the tokenizer joins them. Raises as `encode`."""
        try:
            pairs = [(first, second)]
            return self._backend.encode_batch_fast(pairs, add_special_tokens=add_special_tokens)[0].ids
        except TypeError:
            check_encodable(first)
            check_encodable(second)
            raise

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of `ids`; ids outside the vocabulary have none."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        raw = b"".join(self.token_bytes(i) or b"" for i in ids if i not in skipped)
        text = raw.decode(errors="replace")
        stripped = len(text) - len(text.lstrip(" "))
        return text[min(stripped, self.leading_spaces_stripped) :]

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that this token adds to a text: part of a character, maybe. None for an unknown id."""
        try:
            return self._bytes[token_id]
        except KeyError:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            return self._bytes.setdefault(token_id, None if token is None else self._to_bytes(token))

    def token_text(self, token_id: int) -> str:
        """One token as text, with U+FFFD for a part of a character. Empty for an unknown id."""
        return (self.token_bytes(token_id) or b"").decode(errors="replace")

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)


def check_encodable(text: str) -> None:
    """Raises ValueError for text with a lone surrogate."""
    try:
        codecs.encode(text, "utf-8")
    except UnicodeEncodeError as error:
        found = text[error.start].encode("unicode_escape").decode()
        raise ValueError(f"the text has a lone surrogate ({found}) at character {error.start}") from None


def _byte_scheme(backend: Any) -> tuple[Callable[[str], bytes], int]:
    """How a token spells its bytes, and how many leading spaces a whole text loses."""
    steps = _decoder_steps(backend)
    kinds = [step["type"] for step in steps if step["type"] != "Fuse"]
    if kinds == ["ByteLevel"]:
        return _byte_level, 0
    to_space = {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "}
    if kinds[:2] == ["Replace", "ByteFallback"] and steps[0] == to_space:
        if kinds[2:] == []:
            return _byte_fallback, 0
        strip = steps[-1]
        if kinds[2:] == ["Strip"] and strip["content"] == " " and not strip["stop"]:
            return _byte_fallback, strip["start"]
    raise ValueError(
        f"the tokenizer's decoder ({', '.join(kinds) or 'none'}) is not supported; "
        "supported: byte-level (GPT-2) and byte-fallback (SentencePiece)"
    )


def _decoder_steps(backend: Any) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters (Radford et al. 2019): character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    """Added tokens may be plain text; one with a character outside the alphabet is."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    """<0x0A> is the byte 10; all else is text, with a mark for a space (Kudo & Richardson 2018, SentencePiece)."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE_MARK, " ").encode()
