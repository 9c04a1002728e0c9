"""Tokenizers out of GGUF files: against the models' own tokenizer.json, and the real small model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import gguf_reference, pair_of
from tricky_text import TRICKY

from octavo.text.gguf_metadata import read_gguf_metadata
from octavo.text.pre_tokenizers import PRE_TOKENIZERS
from octavo.text.tokenizer import Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def write_gguf(path: Path, facts: dict[str, Any]) -> Path:
    """`facts`: tokenizer.ggml.* without that prefix."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in facts.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def facts_of(name: str) -> dict[str, Any]:
    """A model's tokenizer.json as a converter to GGUF writes it."""
    data = json.loads((pair_of(name).folder / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = dict(data["model"]["vocab"])
    types = dict.fromkeys(vocabulary.values(), NORMAL)
    for token in data["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    tokens = {index: token for token, index in vocabulary.items()}
    assert sorted(tokens) == list(range(len(tokens)))
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    ids = range(len(tokens))
    return {"tokens": [tokens[i] for i in ids], "token_type": [types[i] for i in ids], "merges": merges}


def assert_equal_encoding(built: Tokenizer, original: Tokenizer) -> None:
    for text in TRICKY:
        ids = original.encode(text, add_special_tokens=False)
        assert built.encode(text, add_special_tokens=False) == ids, text
        assert built.decode(ids, False) == original.decode(ids, False)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def check(text: str) -> None:
        assert built.encode(text, False) == original.encode(text, False)

    check()


@pytest.mark.parametrize(("name", "pre"), [("llama3", "llama-bpe"), ("qwen3", "qwen2"), ("deepseek_v3", "deepseek-v3")])
def test_byte_level_equals_the_original(tmp_path: Path, name: str, pre: str) -> None:
    original = pair_of(name).ours
    facts = {"model": "gpt2", "pre": pre, **facts_of(name), "eos_token_id": original.eos_token_ids[0]}
    built = load_tokenizer(write_gguf(tmp_path / "t.gguf", facts))
    assert_equal_encoding(built, original)
    assert built.special_ids == original.special_ids
    assert built.vocab_size == original.vocab_size
    assert set(original.eos_token_ids) <= set(built.eos_token_ids)


def test_sentencepiece_equals_the_original_with_merges_from_scores(tmp_path: Path) -> None:
    facts = facts_of("llama2")
    rank: dict[str, int] = {}
    for merge in facts.pop("merges"):
        rank.setdefault(merge.replace(" ", ""), len(rank))
    facts["scores"] = [-float(rank.get(token, 0)) for token in facts["tokens"]]
    facts |= {"model": "llama", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    built, original = load_tokenizer(write_gguf(tmp_path / "t.gguf", facts)), pair_of("llama2").ours
    assert_equal_encoding(built, original)
    assert built.encode("a", True) == original.encode("a", True)
    assert (built.bos_token, built.eos_token_ids) == ("<s>", (2,))


# --- the real small model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


def test_smollm2_equals_the_reference(smollm2: Tokenizer, smollm2_path: Path) -> None:
    reference = gguf_reference(smollm2_path)
    for text in TRICKY:
        ids = reference.encode(text, add_special_tokens=False)
        assert smollm2.encode(text, False) == ids, text
        for skip in (False, True):
            expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert smollm2.decode(ids, skip) == expected


def test_smollm2_facts(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token, smollm2.bos_token_id) == ("<|im_start|>", 1)
    assert (smollm2.eos_token, smollm2.eos_token_ids) == ("<|im_end|>", (2,))
    assert smollm2.special_ids == set(range(17))
    assert smollm2.encode("2024", True) == [smollm2.encode(digit, False)[0] for digit in "2024"]
    assert smollm2.chat_template is not None
    assert "You are a helpful AI assistant named SmolLM" in smollm2.chat_template


# --- files made by hand -----------------------------------------------------------------------------------------

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def small(**changes: Any) -> dict[str, Any]:
    """Letters, "Ġ" for a space, "ab", and some special tokens."""
    tokens = ["<s>", "</s>", "<|im_end|>", "<think>", "Ġ", *LETTERS, "ab"]
    types = [CONTROL, CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * 28
    facts = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types, "merges": ["a b"]}
    facts |= {"bos_token_id": 0, "eos_token_id": 1, **changes}
    return {name: value for name, value in facts.items() if value is not None}


def build(tmp_path: Path, **changes: Any) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path / "small.gguf", small(**changes)))


def test_control_and_user_defined_tokens_are_found_in_text(tmp_path: Path) -> None:
    tokenizer = build(tmp_path)
    assert tokenizer.encode("ab<think></s>", False) == [31, 3, 1]
    assert tokenizer.decode([31, 3, 1], skip_special_tokens=True) == "ab<think>"


@pytest.mark.parametrize(("flag", "expected"), [(None, [31]), (False, [31]), (True, [0, 31])])
def test_begin_of_sequence_as_the_file_says(tmp_path: Path, flag: bool | None, expected: list[int]) -> None:
    assert build(tmp_path, add_bos_token=flag).encode("ab", True) == expected


def test_llama3_files_that_do_not_say_begin_with_bos(tmp_path: Path) -> None:
    assert build(tmp_path, pre="llama-bpe").encode("ab", True) == [0, 31]
    assert build(tmp_path, pre="llama-bpe", add_bos_token=False).encode("ab", True) == [31]


def test_end_ids_hold_the_end_of_turn(tmp_path: Path) -> None:
    assert build(tmp_path).eos_token_ids == (1, 2)  # known by its spelling
    assert build(tmp_path, eot_token_id=5).eos_token_ids == (1, 5)


def test_byte_fallback(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "a▁"]
    scores = [0.0] * 259 + [-10.0, -9.0, -1.0, -2.0]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 4
    facts = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "bos_token_id": 1}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", facts))
    assert tokenizer.encode("a a", True) == [1, 261, 261]
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.encode("é", False) == [259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode([259, 3 + 0xC3, 3 + 0xA9], False) == "é"
    plain = load_tokenizer(write_gguf(tmp_path / "u.gguf", {**facts, "add_space_prefix": False}))
    assert plain.encode("a a", False) == [260, 261]
    assert plain.decode([261, 261], False) == " a a"


def test_every_pre_tokenizer_builds(tmp_path: Path) -> None:
    for name in PRE_TOKENIZERS:
        tokenizer = build(tmp_path, pre=name)
        assert tokenizer.decode(tokenizer.encode("ab c", False), False) == "ab c"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "no-such"}, "pre-tokenizer 'no-such' is not known; known: codeshell, command-r"),
        ({"model": "t5"}, "tokenizer model 't5' is not supported"),
        ({"tokens": None}, "holds no tokenizer"),
        ({"merges": ["a q q"]}, "merges do not fit its vocabulary"),
        ({"merges": ["ab"]}, r"small\.gguf"),
        ({"merges": None}, r"lacks tokenizer\.ggml\.merges"),
        ({"eos_token_id": 99}, r"small\.gguf"),
        ({"token_type": [1]}, r"small\.gguf"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **changes)


# --- the metadata reader ----------------------------------------------------------------------------------------


def test_metadata_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "x")
    numbers = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**31, "int32": -70000}
    numbers |= {"uint64": 2**63, "int64": -(2**60), "float32": 0.5, "float64": 0.1, "bool": True}
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(f"n.{kind}", value)
    writer.add_array("n.strings", ["a", "ü", ""])
    writer.add_array("n.floats", [0.5, -1.0])
    writer.add_array("n.bools", [True, False])
    writer.add_array("other", [1, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    expected = {f"n.{kind}": value for kind, value in numbers.items()}
    expected |= {"n.strings": ["a", "ü", ""], "n.floats": [0.5, -1.0], "n.bools": [True, False]}
    assert read_gguf_metadata(path, "n.") == expected
    assert read_gguf_metadata(path)["other"] == [1, 2]


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", small()).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is not a readable GGUF file"):
            read_gguf_metadata(path)


@pytest.mark.parametrize("position", range(8, 60))
def test_a_changed_byte_gives_metadata_or_a_value_error(tmp_path: Path, position: int) -> None:
    data = bytearray(write_gguf(tmp_path / "t.gguf", small()).read_bytes())
    path = tmp_path / "changed.gguf"
    for value in (0, 1, 9, 127, 255):
        data[position] = value
        path.write_bytes(data)
        try:
            assert isinstance(read_gguf_metadata(path), dict)
        except ValueError as error:
            assert "changed.gguf" in str(error)  # noqa: PT017 (both outcomes are right)


@pytest.mark.parametrize(("head", "message"), [(b"GGML", "letters GGUF"), (b"GGUF\x01\0\0\0", "version is 1")])
def test_other_files_are_refused(tmp_path: Path, head: bytes, message: str) -> None:
    path = tmp_path / "t.gguf"
    path.write_bytes(head + struct.pack("<QQQQ", 0, 0, 0, 0))
    with pytest.raises(ValueError, match=message):
        read_gguf_metadata(path)
