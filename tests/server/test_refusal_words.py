"""What a refusal says: the field, the value, and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from request_bodies import BASE, ROUTES
from server_rig import Rig, running

USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "a", "reasoning": "b"}
# (struct, fields changed, param, what the message holds)
Case = tuple[str, dict[str, Any], str, tuple[str, ...]]


async def refusal(rig: Rig, struct: str, fields: dict[str, Any]) -> tuple[str, str]:
    """The param and the message of a 400."""
    answer = await rig.http.post(ROUTES[struct].path, json={**BASE[struct], **fields}, timeout=60)
    assert answer.status_code == 400, (fields, answer.text)
    error = answer.json()["error"]
    return error["param"], error["message"]


# Two names of one field that differ.
TWO_NAMES: list[Case] = [
    ("ChatBody", {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens",
     ("max_tokens=5", "max_completion_tokens=6", "allowed: one of them, or equal values")),
    ("ChatBody", {"max_tokens": 5, "max_completion_tokens": 6, "stream": True}, "max_tokens", ("=5", "=6")),
    ("ChatBody", {"messages": [{**SAID, "reasoning_content": "c"}, USER]},
     "messages[0].reasoning_content", ("messages[0].reasoning,", "allowed: one of them")),
]  # fmt: skip

# What msgspec finds, of a struct's own types.
SHAPES: list[Case] = [
    ("ChatBody", {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role",
     ("'wizard'", "allowed: assistant, developer, system, tool, user")),
    ("ChatBody", {"messages": [{"role": 5, "content": "x"}]}, "messages[0].role", ("got `int`; allowed: assistant,",)),
    ("ChatBody", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type",
     ("'image_url'; allowed: text",)),
    ("ChatBody", {"tool_choice": "some"}, "tool_choice", ("'some'; allowed: auto, none, required, an object",)),
    ("ChatBody", {"tool_choice": {"type": "tool"}}, "tool_choice.type", ("'tool'; allowed: function",)),
    ("ChatBody", {"response_format": {"type": "xml"}}, "response_format.type",
     ("'xml'; allowed: text, json_object, json_schema, structural_tag",)),
    ("ChatBody", {"response_format": {}}, "response_format.type", ("missing", "; allowed: text, json_object,")),
    ("EmbeddingsBody", {"encoding_format": "hex"}, "encoding_format", ("'hex'; allowed: base64, float",)),
    *[(struct, {"pooling": "cls"}, "pooling", ("'cls'; allowed: last, mean",))
      for struct in ("EmbeddingsBody", "ScoreBody", "RerankBody")],
    ("ResponsesBody", {"text": {"verbosity": "high"}}, "text.verbosity", ("'high'; allowed: medium",)),
    ("ResponsesBody", {"text": {"format": {"type": "xml"}}}, "text.format.type",
     ("'xml'; allowed: text, json_object, json_schema",)),
    ("ResponsesBody", {"input": [{"type": "image"}]}, "input[0].type",
     ("'image'; allowed: function_call, function_call_output, message, reasoning",)),
    ("ResponsesBody", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type",
     ("'input_image'; allowed: input_text, output_text, reasoning_text, summary_text",)),
    ("ResponsesBody", {"tools": [{"type": "web_search"}]}, "tools[0].type",
     ("'web_search'; allowed: function (the server has no tools of its own)",)),
    ("MessagesBody", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type",
     ("'image'; allowed: text, tool_use, tool_result, thinking",)),
    ("MessagesBody", {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
     "messages[0].content[0].type", ("'thinking'", "the role user; allowed: text, tool_result")),
    ("MessagesBody", {"tools": [{"type": "bash", "name": "f", "input_schema": {}}]}, "tools[0].type",
     ("'bash'; allowed: custom (the server has no tools of its own)",)),
    ("MessagesBody", {"tools": [{"name": "f", "input_schema": {}, "eager_input_streaming": False}]},
     "tools[0].eager_input_streaming", ("allowed: true",)),
    ("CompletionBody", {"metadata": {"good": "x", "k\n": 5}}, r"metadata['k\n']", (r"['k\n']: expected", "got `int`")),
    ("CompletionBody", {"metadata": {"good": "x", "k": "x" * 600}}, "metadata['k']", ("of length <= 512",)),
    ("CompletionBody", {"metadata": {"good": "x", "k" * 70: "x"}}, f"metadata['{'k' * 64}']", ("of length <= 64",)),
    ("ResponsesBody", {"metadata": {"good": "x", "k": None}}, "metadata['k']", ("expected `str`, got `null`",)),
    ("CompletionBody", {"logit_bias": {"5": 1, "6": "2"}}, "logit_bias['6']", ("expected `float`, got `str`",)),
    ("CompletionBody", {"repetition_detection": {"max_pattern_size": 300}}, "repetition_detection.max_pattern_size",
     ("repetition_detection.max_pattern_size=300 is out of range; allowed: 0..256",)),
    ("CompletionBody", {"suffix": "x" * 99}, "suffix", (f'suffix="{"x" * 63}… is not', 'allowed: null, ""')),
    ("ChatBody", {"modalities": ["text", "audio"]}, "modalities", ('=["text","audio"]', 'allowed: null, ["text"]')),
]  # fmt: skip

# What the table of fields finds, and what depends on several of them.
RANGES: list[Case] = [
    ("CompletionBody", {"top_p": 1.0000001}, "top_p", ("top_p=1.0000001 is out of range; allowed: (0, 1]",)),
    ("CompletionBody", {"temperature": 2.000000001}, "temperature", ("temperature=2.000000001 is",)),
    ("CompletionBody", {"use_beam_search": True, "temperature": 1e-7}, "temperature", ("=1e-07 is refused",)),
    *[("CompletionBody", {name: [5, value]}, name, (f"={value} is out of range; allowed: 0..256",))
      for name in ("stop_token_ids", "allowed_token_ids") for value in (-1, 257, 2**31, 2**70)],
    *[("DetokenizeBody", {"tokens": [5, value]}, "tokens", (f"={value} is out of range; allowed: 0..256",))
      for value in (-1, 257)],
    ("CompletionBody", {"logit_bias": {"257": 1}}, "logit_bias", ("=257 is out of range; allowed: 0..256",)),
    ("CompletionBody", {"logit_bias": {"5": 101}}, "logit_bias", ("logit_bias[5]=101 is", "allowed: [-100, 100]")),
    *[("CompletionBody", {"truncate_prompt_tokens": value}, "truncate_prompt_tokens",
       (f"={value} is out of range; allowed: -1..9223372036854775807 except 0",)) for value in (-2, 0, 2**63)],
    ("CompletionBody", {"max_tokens": -1}, "max_tokens", ("=-1 is", "within the model's context")),
    ("CompletionBody", {"max_tokens": 0, "echo": True, "stream": True}, "max_tokens", ("without stream; allowed: 1",)),
    ("CompletionBody", {"max_tokens": 0}, "max_tokens", ("max_tokens=0", "needs echo", "allowed: 1 or more")),
    ("ChatBody", {"use_beam_search": True, "logprobs": True}, "logprobs", ("logprobs=true is refused with use_beam",)),
]  # fmt: skip
WORDS = TWO_NAMES + SHAPES + RANGES


@pytest.mark.parametrize(("struct", "fields", "param", "words"), WORDS, ids=[str(case[1])[:60] for case in WORDS])
async def test_what_is_allowed_there_is_said(
    struct: str, fields: dict[str, Any], param: str, words: tuple[str, ...]
) -> None:
    async with running() as rig:
        found, message = await refusal(rig, struct, fields)
        assert found == param
        assert all(word in message for word in words), message
        assert not message.startswith("repetition_detection: ")  # which is in the path that follows
        assert rig.engine.requests == []


async def test_a_key_that_cannot_be_found_again_is_left_open() -> None:
    async with running() as rig:
        headers = {"Content-Type": "application/json"}
        many = ", ".join(f'"{n}": ""' for n in range(1024))
        for pairs in ('"k": 5, "k": "x"', '"k": 1e999', f'{many}, "k": 5'):
            body = f'{{"model": "fake", "prompt": "a", "metadata": {{{pairs}}}}}'
            answer = await rig.http.post("/v1/completions", content=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata[...]"), answer.text


async def test_two_names_of_one_field_may_be_equal() -> None:
    async with running() as rig:
        messages = [{**SAID, "reasoning_content": "b"}, USER]
        body = {"model": "fake", "messages": messages, "max_tokens": 5, "max_completion_tokens": 5}
        assert (await rig.http.post("/v1/chat/completions", json=body)).status_code == 200
        assert rig.engine.requests[0].max_tokens == 5


@pytest.mark.parametrize("key", ["01", "00", "1 ", "1\n", "+1", "१"])
async def test_a_token_id_has_one_spelling(key: str) -> None:
    async with running() as rig:
        for logit_bias in ({key: 1, "1": 2}, {key: 1}):
            param, message = await refusal(rig, "CompletionBody", {"logit_bias": logit_bias})
            assert param == "logit_bias"
            assert f"{key!r}, which is not a token id; allowed: digits, without leading zeros" in message
        body = {**BASE["CompletionBody"], "logit_bias": {"0": 1, "10": 2}}
        assert (await rig.http.post("/v1/completions", json=body)).status_code == 200
        assert rig.engine.requests[0].sampling.logit_bias == {0: 1, 10: 2}
