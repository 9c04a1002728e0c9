"""A tokenizer out of a GGUF file's metadata (GGUF specification, "Tokenizer"; semantics as in llama.cpp)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from octavo.text.gguf_metadata import read_gguf_metadata
from octavo.text.pre_tokenizers import PRE_TOKENIZERS
from octavo.text.tokenizer_files import TokenizerParts, add_ends, mark_special

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_SPACE_MARK = "▁"
# Files made before tokenizer.ggml.eot_token_id existed name the end of a chat turn only by its spelling.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def read_gguf(path: Path) -> TokenizerParts:
    """Raises ValueError for a file that is not GGUF, lacks a tokenizer, or has one of an unknown kind."""
    metadata = read_gguf_metadata(path, "tokenizer.")
    kind = metadata.get("tokenizer.ggml.model")
    facts = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if not facts.get("tokens"):
        raise ValueError(f"{path} holds no tokenizer")
    try:
        if kind == "gpt2":
            backend, adds_bos = _byte_level_bpe(facts)
        elif kind == "llama":
            backend, adds_bos = _sentencepiece_bpe(facts), True
        else:
            raise ValueError(f"its tokenizer model {kind!r} is not supported; supported: 'gpt2', 'llama'")
        return _with_special_tokens(backend, facts, adds_bos)
    except KeyError as error:
        raise ValueError(f"{path} lacks tokenizer.ggml.{error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: {error}") from error


def _byte_level_bpe(facts: dict[str, Any]) -> tuple[tokenizers.Tokenizer, bool]:
    name = facts.get("pre", "default")
    kind = PRE_TOKENIZERS.get(name)
    if kind is None:
        raise ValueError(f"its pre-tokenizer {name!r} is not known; known: {', '.join(sorted(PRE_TOKENIZERS))}")
    backend = _bpe(facts, [_pair(merge) for merge in facts["merges"]], ignore_merges=kind.ignore_merges)
    if kind.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, kind.adds_bos


def _sentencepiece_bpe(facts: dict[str, Any]) -> tokenizers.Tokenizer:
    merges = [_pair(merge) for merge in facts["merges"]] if "merges" in facts else _merges_by_score(facts)
    unknown = facts["tokens"][facts.get("unknown_token_id", 0)]
    backend = _bpe(facts, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix = facts.get("add_space_prefix", True)
    space = normalizers.Replace(" ", _SPACE_MARK)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE_MARK), space]) if prefix else space
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _bpe(facts: dict[str, Any], merges: list[tuple[str, str]], **settings: Any) -> tokenizers.Tokenizer:
    vocabulary = {token: index for index, token in enumerate(facts["tokens"])}
    try:
        return tokenizers.Tokenizer(models.BPE(vocabulary, merges, **settings))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"its merges do not fit its vocabulary: {error}") from error


def _pair(merge: str) -> tuple[str, str]:
    space = merge.index(" ", 1)  # the left half may itself begin with a space
    return merge[:space], merge[space + 1 :]


def _merges_by_score(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """SentencePiece's BPE joins the neighbours whose union has the best score: each way to cut a token
    in two tokens is a merge, ranked by the token's score."""
    tokens = facts["tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, facts["scores"], strict=True):
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-score, left, right))
    return [(tokens[left], tokens[right]) for _score, left, right in sorted(merges)]


def _with_special_tokens(backend: tokenizers.Tokenizer, facts: dict[str, Any], adds_bos: bool) -> TokenizerParts:
    tokens = facts["tokens"]
    types = facts.get("token_type") or [1] * len(tokens)
    control = [token for token, kind in zip(tokens, types, strict=True) if kind in (_UNKNOWN, _CONTROL)]
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    bos, eos = facts.get("bos_token_id"), facts.get("eos_token_id")
    bos_token = None if bos is None else tokens[bos]
    eos_token = None if eos is None else tokens[eos]
    mark_special(backend, [bos_token, eos_token])
    add_ends(
        backend,
        bos_token if facts.get("add_bos_token", adds_bos) else None,
        eos_token if facts.get("add_eos_token", False) else None,
    )
    ends = [eos, facts.get("eot_token_id")]
    if ends[1] is None:
        ends += [backend.token_to_id(token) for token in _END_OF_TURN if token in control]
    return TokenizerParts(
        backend,
        bos_token,
        eos_token,
        eos_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        chat_template=facts.get("tokenizer.chat_template"),
    )
