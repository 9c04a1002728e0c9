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


TWO_NAMES: list[Case] = [
    ("ChatBody", {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens",
     ("max_tokens=5", "max_completion_tokens=6", "allowed: one of them, or equal values")),
    ("ChatBody", {"max_tokens": 5, "max_completion_tokens": 6, "stream": True}, "max_tokens", ("=5", "=6")),
    ("ChatBody", {"messages": [{**SAID, "reasoning_content": "c"}, USER]},
     "messages[0].reasoning_content", ("messages[0].reasoning,", "allowed: one of them")),
]  # fmt: skip


@pytest.mark.parametrize(("struct", "fields", "param", "words"), TWO_NAMES)
async def test_two_names_of_one_field_do_not_differ(
    struct: str, fields: dict[str, Any], param: str, words: tuple[str, ...]
) -> None:
    async with running() as rig:
        found, message = await refusal(rig, struct, fields)
        assert found == param
        assert all(word in message for word in words), message
        assert rig.engine.requests == []


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
