"""/tokenize and /detokenize: both forms, every field, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from server_rig import EOS, MAX_MODEL_LEN, running

from octavo.config import ServerOptions

USER = [{"role": "user", "content": "hi"}]


async def test_a_prompt_and_back() -> None:
    async with running() as rig:
        answer = await rig.http.post(
            "/tokenize", json={"model": "fake", "prompt": "hé<eos>", "return_token_strs": True}
        )
        assert answer.json() == {
            "count": 4,
            "max_model_len": MAX_MODEL_LEN,
            "tokens": [104, 0xC3, 0xA9, EOS],
            "token_strs": ["h", "�", "�", "<eos>"],
        }
        answer = await rig.http.post("/detokenize", json={"model": "fake", "tokens": [104, 0xC3, 0xA9, EOS]})
        assert answer.json() == {"prompt": "hé<eos>"}
        empty = await rig.http.post("/tokenize", json={"prompt": ""})
        assert (empty.json()["count"], empty.json()["tokens"], empty.json()["token_strs"]) == (0, [], None)
        assert (await rig.http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_messages_are_what_a_chat_would_send() -> None:
    async with running() as rig:
        await rig.openai.chat.completions.create(model="fake", messages=USER)
        tokens = (await rig.http.post("/tokenize", json={"messages": USER})).json()["tokens"]
        assert tokens == rig.engine.requests[0].prompt_token_ids

        async def text(**fields: Any) -> str:
            answer = await rig.http.post("/tokenize", json={"messages": USER, **fields})
            return bytes(answer.json()["tokens"]).decode()

        assert await text(add_generation_prompt=False) == "<user>hi\n"
        assert await text(chat_template_kwargs={"suffix": "!"}) == "<user>hi\n<assistant>!"
        assert await text(continue_final_message=True) == "<user>hi"


TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (TOKENIZE, {}, "prompt", "invalid_value"),
        (TOKENIZE, {"prompt": "a", "messages": USER}, "prompt", "invalid_value"),
        (TOKENIZE, {"prompt": 5}, "prompt", "invalid_type"),
        (TOKENIZE, {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "invalid_value"),
        (TOKENIZE, {"prompt": "x" * (MAX_MODEL_LEN * 5 + 1)}, "prompt", "context_length_exceeded"),
        (TOKENIZE, {"messages": []}, "messages", "invalid_value"),
        (TOKENIZE, {"messages": [{"role": "user"}]}, "messages[0].content", "invalid_type"),
        (TOKENIZE, {"messages": USER, "chat_template": "x"}, "chat_template", "unsupported_parameter"),
        (TOKENIZE, {"prompt": "a", "promt": "b"}, "promt", "unknown_parameter"),
        (TOKENIZE, {"prompt": "a", "store": False}, "store", "unknown_parameter"),
        (DETOKENIZE, {}, "tokens", "missing_required_parameter"),
        (DETOKENIZE, {"tokens": "a"}, "tokens", "invalid_type"),
        (DETOKENIZE, {"tokens": [1, EOS + 1]}, "tokens", "invalid_value"),
        (DETOKENIZE, {"tokens": [-1]}, "tokens", "invalid_value"),
    ],
)
async def test_refusals_name_the_field(path: str, body: dict[str, Any], param: str, code: str) -> None:
    async with running() as rig:
        answer = await rig.http.post(path, json=body)
        assert answer.status_code == 400, answer.text
        assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


async def test_keys_models_and_limits_apply() -> None:
    options = ServerOptions(api_key=("secret",), max_body_bytes=100)
    async with running(options=options) as rig:
        key = {"Authorization": "Bearer secret"}
        for path, body in ((TOKENIZE, {"prompt": "a"}), (DETOKENIZE, {"tokens": [97]})):
            assert (await rig.http.post(path, json=body)).status_code == 401
            assert (await rig.http.post(path, json=body, headers=key)).status_code == 200
            assert (await rig.http.post(path, json={**body, "model": "other"}, headers=key)).status_code == 404
        assert (await rig.http.post(TOKENIZE, json={"prompt": "a" * 200}, headers=key)).status_code == 413
        assert (await rig.http.get(TOKENIZE, headers=key)).status_code == 405


async def test_a_full_server_is_busy() -> None:
    async with running() as rig:
        rig.engine.running = {str(n) for n in range(16)}
        answer = await rig.http.post(TOKENIZE, json={"prompt": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


async def test_without_a_tokenizer() -> None:
    async with running(tokenizer=None, chat_template=None) as rig:
        for path, body in ((TOKENIZE, {"prompt": "a"}), (DETOKENIZE, {"tokens": [97]})):
            answer = await rig.http.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_tokenizer")
