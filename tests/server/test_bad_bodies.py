"""Every bad body gets a 4xx in OpenAI's shape that names the field, and the server goes on."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from server_rig import MAX_MODEL_LEN, VOCAB_SIZE, running

from octavo.config import ServerOptions
from octavo.server import Timeouts
from octavo.server.openai.schema import UNSUPPORTED, ChatBody, CompletionBody

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"model": "fake", "messages": [{"role": "user", "content": "hi"}]},
    PLAIN: {"model": "fake", "prompt": "hi"},
}
DROP = object()
CALL = "messages[0].tool_calls[0]"

# (path, fields changed, param, code or None for any)
FIELDS = [
    *[(path, {"model": DROP}, "model", "missing_required_parameter") for path in BASE],
    *[(path, {"model": value}, "model", "invalid_type") for path in BASE for value in (None, 5, ["fake"])],
    *[(path, {"n": value}, "n", "invalid_type") for path in BASE for value in ("5", True, 1.5, [1])],
    *[(path, {"n": value}, "n", None) for path in BASE for value in (0, -1, 129, 16384, 10**30)],
    *[(path, {"temperature": v}, "temperature", None) for path in BASE for v in (-0.1, 2.01, 1e308, "0.5", True)],
    (PLAIN, {"n": 2, "temperature": 0}, "n", None),
    (PLAIN, {"n": 17}, "n", None),  # more than the server ever takes at once
    *[(PLAIN, {"top_p": value}, "top_p", None) for value in (0, 1.1, -1)],
    *[(PLAIN, {"top_k": value}, "top_k", None) for value in (-2, 1.5, 2**63, "1")],
    *[(PLAIN, {"min_p": value}, "min_p", None) for value in (-0.1, 1.1)],
    *[(PLAIN, {"presence_penalty": value}, "presence_penalty", None) for value in (-2.01, 2.01)],
    *[(PLAIN, {"frequency_penalty": value}, "frequency_penalty", None) for value in (-2.01, 2.01)],
    *[(PLAIN, {"repetition_penalty": value}, "repetition_penalty", None) for value in (0, -1)],
    *[(PLAIN, {"seed": value}, "seed", None) for value in (2**63, -(2**63) - 1, "1", 1.5)],
    *[(PLAIN, {"stop": value}, "stop", None) for value in ("", [""], {}, ["x"] * 65, ["x" * 20000])],
    (PLAIN, {"stop": ["a", 5]}, "stop[1]", "invalid_type"),
    *[(PLAIN, {"stop_token_ids": v, "min_tokens": 1}, "stop_token_ids", None) for v in ([VOCAB_SIZE], [-1], [2**31])],
    (PLAIN, {"stop_token_ids": ["a"]}, "stop_token_ids[0]", "invalid_type"),
    *[(PLAIN, {"max_tokens": value}, "max_tokens", None) for value in (0, -1, 2**63, "10", 1.5, True)],
    *[(PLAIN, {"max_tokens": v}, "max_tokens", "context_length_exceeded") for v in (MAX_MODEL_LEN, 2**31, 10**9)],
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", None),
    (CHAT, {"max_completion_tokens": 600}, "max_completion_tokens", "context_length_exceeded"),
    *[(PLAIN, {"min_tokens": value}, "min_tokens", None) for value in (-1, 17, 2**70)],
    *[(PLAIN, {"logit_bias": v}, "logit_bias", None) for v in ({"abc": 1}, {"-1": 1}, {"257": 1}, {"5": 101}, {"": 1})],
    *[(PLAIN, {"logit_bias": v}, None, "invalid_type") for v in ({"5": None}, {"5": True}, {"5": "1"})],
    (PLAIN, {"logit_bias": [1]}, "logit_bias", "invalid_type"),
    *[(PLAIN, {"logprobs": value}, "logprobs", None) for value in (21, -1, -2, True, 2**31)],
    *[(CHAT, {"logprobs": True, "top_logprobs": v}, "top_logprobs", None) for v in (21, -1, 2**31, "1")],
    (CHAT, {"top_logprobs": 1}, "top_logprobs", None),
    (CHAT, {"logprobs": 1}, "logprobs", "invalid_type"),
    (PLAIN, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", None),
    (PLAIN, {"prompt_logprobs": 21}, "prompt_logprobs", None),
    (PLAIN, {"echo": True, "logprobs": 1, "stream": True}, "echo", None),
    *[(path, {"stream_options": {"include_usage": True}}, "stream_options", None) for path in BASE],
    (CHAT, {"stream": True, "stream_options": {"include_usage": "x"}}, "stream_options.include_usage", "invalid_type"),
    (CHAT, {"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo", "unknown_parameter"),
    (CHAT, {"stream": True, "stream_options": 5}, "stream_options", "invalid_type"),
    (CHAT, {"stream": "true"}, "stream", "invalid_type"),
    (PLAIN, {"priority": 1}, "priority", None),
    *[(PLAIN, {"cache_salt": value}, "cache_salt", None) for value in ("", 5, "x" * 600)],
    *[(PLAIN, {name: "x" * 10000}, name, None) for name in ("user", "safety_identifier", "prompt_cache_key")],
    (PLAIN, {"metadata": {"a": "x" * 10000}}, None, None),
    (PLAIN, {"metadata": "x"}, "metadata", "invalid_type"),
    # prompts
    *[(PLAIN, {"prompt": value}, "prompt", None) for value in ("", [], [[]], [""], ["a", ""], [1, "a"], [[1], 2])],
    (PLAIN, {"prompt": DROP}, "prompt", "missing_required_parameter"),
    *[(PLAIN, {"prompt": value}, "prompt", "invalid_type") for value in (None, 5, {})],
    *[(PLAIN, {"prompt": value}, None, "invalid_type") for value in ([True], [1.5], [[True]], [None], [["a"]])],
    *[(PLAIN, {"prompt": value}, "prompt", None) for value in ([VOCAB_SIZE], [-1], [2**40], [[1], [2**64]])],
    (PLAIN, {"prompt": ["a"] * 257}, "prompt", "array_above_max_length"),
    (PLAIN, {"prompt": "x" * MAX_MODEL_LEN}, "prompt", "context_length_exceeded"),
    (PLAIN, {"prompt": [5] * (MAX_MODEL_LEN + 1)}, "prompt", "context_length_exceeded"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * MAX_MODEL_LEN}]}, "messages", "context_length_exceeded"),
    # messages
    (CHAT, {"messages": []}, "messages", None),
    (CHAT, {"messages": "hi"}, "messages", "invalid_type"),
    (CHAT, {"messages": [None]}, "messages[0]", "invalid_type"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", None),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", None),
    *[(CHAT, {"messages": [{"role": "user", "content": c}]}, "messages[0].content", None) for c in (None, 5, [], {})],
    (CHAT, {"messages": [{"role": "user", "content": [None]}]}, "messages[0].content[0]", None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "foo"}]}]}, "messages[0].content[0].type", None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, None, "invalid_type"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "name": "a\nb"}]}, "messages[0].name", None),
    (CHAT, {"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo", "unknown_parameter"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id", None),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", None),
    *[
        (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]}, param, None)
        for calls, param in (
            (5, "messages[0].tool_calls"),
            ("abc", "messages[0].tool_calls"),
            ([], "messages[0].content"),
            ([None], CALL),
            ([{"function": {"name": "f", "arguments": "{}"}}], CALL + ".id"),
            ([{"id": "1", "function": {"name": "f", "arguments": None}}], CALL + ".function.arguments"),
            ([{"id": "1", "function": {"name": "f", "arguments": "x"}}], CALL + ".function.arguments"),
        )
    ],
    *[(CHAT, {"chat_template_kwargs": {k: 1}}, f"chat_template_kwargs.{k}", None) for k in ("tokenize", "self")],
    (CHAT, {"chat_template_kwargs": [1]}, "chat_template_kwargs", "invalid_type"),
    (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", None),
    # fields that are not ours
    (CHAT, {"temprature": 1}, "temprature", "unknown_parameter"),
    (CHAT, {"prompt": "x"}, "prompt", "unknown_parameter"),
    (PLAIN, {"messages": []}, "messages", "unknown_parameter"),
    *[(path, {"best_of": value}, "best_of", None) for path in BASE for value in (0, -1, 129, 10**6, True, "2")],
    (PLAIN, {"n": 3, "best_of": 2}, "best_of", None),
    (PLAIN, {"n": 2, "best_of": 17}, "best_of", None),  # more than the server ever takes at once
    (PLAIN, {"best_of": 2, "temperature": 0}, "best_of", None),
    (PLAIN, {"best_of": 3, "stream": True}, "best_of", None),
    *[(PLAIN, {"bad_words": v}, "bad_words", None) for v in ("x", [""], [" "], ["x" * 129], ["x"] * 129)],
    (PLAIN, {"bad_words": [5]}, "bad_words[0]", "invalid_type"),
    *[(PLAIN, {"allowed_token_ids": value}, "allowed_token_ids", None) for value in ([], [VOCAB_SIZE], [-1], "x")],
    (PLAIN, {"allowed_token_ids": [True]}, "allowed_token_ids[0]", "invalid_type"),
    *[(path, {"truncate_prompt_tokens": v}, "truncate_prompt_tokens", None) for path in BASE for v in (0, -2, 1.5)],
    (PLAIN, {"spaces_between_special_tokens": "no"}, "spaces_between_special_tokens", "invalid_type"),
    (PLAIN, {"use_beam_search": True, "stream": True}, "use_beam_search", None),
    (PLAIN, {"use_beam_search": True, "temperature": 0.5}, "temperature", None),
    (PLAIN, {"use_beam_search": True, "echo": True, "logprobs": 1}, "logprobs", None),
    (CHAT, {"use_beam_search": True, "logprobs": True}, "logprobs", None),
    (PLAIN, {"use_beam_search": True, "early_stopping": "often"}, "early_stopping", None),
    *[(PLAIN, {"use_beam_search": True, name: 0.5}, name, None) for name in ("top_p", "min_p", "presence_penalty")],
    *[(PLAIN, {"length_penalty": value}, "length_penalty", None) for value in (2.0, "x")],
    (PLAIN, {"early_stopping": True}, "early_stopping", None),
    (PLAIN, {"logits_processors": ["module.function"]}, "logits_processors", "unsupported_parameter"),
    (PLAIN, {"truncation_side": "right"}, "truncation_side", "unsupported_parameter"),
    (PLAIN, {"bad_words_token_ids": [[1]]}, "bad_words_token_ids", "unknown_parameter"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    (CHAT, {"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    (CHAT, {"store": True}, "store", "unsupported_parameter"),
    (PLAIN, {"suffix": "x"}, "suffix", "unsupported_parameter"),
]  # fmt: skip

# (body, param, code)
BYTES = [
    (b"", None, "invalid_json"),
    (b"{", None, "invalid_json"),
    (b"{} x", None, "invalid_json"),
    (b"\xef\xbb\xbf{}", None, "invalid_json"),
    *[(body, None, "invalid_type") for body in (b"[]", b'"x"', b"null", b"5")],
    (b"[" * 100_000, None, None),
    (b'{"a":' * 100_000, None, "invalid_json"),
    (b'{"model":"fake","prompt":' + b"[" * 100_000, None, "invalid_json"),
    (b'{"model":"fake","prompt":"a\x01"}', None, "invalid_json"),
    (b'{"model":"fake","prompt":"\xff"}', None, "invalid_json"),
    (b'{"model":"fake","prompt":"\\ud800"}', "prompt", "invalid_json"),
    (b'{"model":"fake","prompt":"x","stop":["a\\udc00"]}', "stop", "invalid_json"),
    (b'{"model":"\\ud83d x","prompt":"x"}', "model", "invalid_json"),
    (b'{"model":"fake","prompt":"x","\\ud800":1}', None, "invalid_json"),
    (b'{"model":"fake","prompt":"x","temperature":NaN}', None, "invalid_json"),
    (b'{"model":"fake","prompt":"x","temperature":1e400}', "temperature", None),
    (b'{"model":"fake","prompt":"x","logit_bias":{"5":NaN}}', None, "invalid_json"),
    (b'{"model":"fake","prompt":"x","n":1,"n":"2"}', "n", "invalid_type"),
    (b'{"model":"fake","prompt":"x","n":' + b"9" * 10_000 + b"}", "n", None),
]


def _changed(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**BASE[path], **fields}.items() if value is not DROP}


def _check_error(answer: Any, param: str | None, code: str | None, of: object) -> None:
    assert answer.status_code == 400, (of, answer.status_code, answer.text)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, of
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"] == param, (of, error)
    if code is not None:
        assert error["code"] == code, (of, error)


async def test_fields(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as rig:
        for path, fields, param, code in FIELDS:
            answer = await rig.http.post(path, json=_changed(path, fields))
            _check_error(answer, param, code, (path, str(fields)[:200]))
        assert rig.engine.requests == []
        await rig.healthy()
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_bytes(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as rig:
        for body, param, code in BYTES:
            answer = await rig.http.post(PLAIN, content=body, headers={"Content-Type": "application/json"})
            _check_error(answer, param, code, body[:80])
            await rig.healthy()
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_unknown_model_is_404_and_a_hint_names_the_nearest_field() -> None:
    async with running() as rig:
        answer = await rig.http.post(CHAT, json={**BASE[CHAT], "model": "gpt-4"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        answer = await rig.http.post(CHAT, json={**BASE[CHAT], "max_token": 5})
        assert "'max_tokens'" in answer.json()["error"]["message"]


async def test_harmless_values_are_accepted() -> None:
    async with running() as rig:
        for name, values in UNSUPPORTED.items():
            for value in (None, *values):
                answer = await rig.http.post(CHAT, json={**BASE[CHAT], name: value})
                assert answer.status_code == 200, (name, value, answer.text)
        nothing = dict.fromkeys(set(CompletionBody.__struct_fields__) - {"model", "prompt"})
        assert (await rig.http.post(PLAIN, json={**BASE[PLAIN], **nothing})).status_code == 200
        nothing = dict.fromkeys(set(ChatBody.__struct_fields__) - {"model", "messages"})
        assert (await rig.http.post(CHAT, json={**BASE[CHAT], **nothing})).status_code == 200
        echoed = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": None}
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        messages = [
            echoed,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "5", "tool_call_id": "1"},
            {"role": "user", "content": "x", "name": "me"},
        ]
        assert (await rig.http.post(CHAT, json={"model": "fake", "messages": messages})).status_code == 200


async def test_default_max_tokens_shrinks_to_the_context_but_a_given_one_does_not() -> None:
    async with running() as rig:
        body = {"model": "fake", "prompt": "x" * (MAX_MODEL_LEN - 15)}
        assert (await rig.http.post(PLAIN, json=body)).status_code == 200
        assert rig.engine.requests[0].max_tokens == 15
        assert (await rig.http.post(PLAIN, json={**body, "max_tokens": 16})).status_code == 400
        answer = await rig.http.post(PLAIN, json={**body, "min_tokens": 16})
        assert answer.json()["error"]["param"] == "min_tokens"


async def test_a_huge_prompt_is_refused_before_it_is_tokenized() -> None:
    async with running(options=ServerOptions(max_body_bytes=64 * 2**20), timeouts=Timeouts()) as rig:
        body = json.dumps({"model": "fake", "prompt": "a" * 50_000_000}).encode()
        answer = await rig.http.post(PLAIN, content=body, headers={"Content-Type": "application/json"})
        _check_error(answer, "prompt", "context_length_exceeded", "huge")
        assert "characters" in answer.json()["error"]["message"]
