"""What people use in front of an OpenAI-compatible server: the official clients' tools, `instructor`, LangChain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import instructor
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr
from server_process import ServerProcess


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome"]
    days: int


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION: Any = {"name": "weather", "description": "The weather in a city", "parameters": SCHEMA}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
MESSAGES: Any = [{"role": "user", "content": "What is the weather in Rome in 2 days?"}]
GREEDY: Any = {"model": "smollm2", "temperature": 0}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_openai_chats_with_calls(client: openai.OpenAI, choice: Any) -> None:
    fields = {**GREEDY, "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "max_tokens": 60}
    fields["parallel_tool_calls"] = False  # a small model would go on and on
    message = client.chat.completions.create(**fields).choices[0].message
    assert message.tool_calls
    for call in message.tool_calls:
        Weather.model_validate_json(call.function.arguments)
    with client.chat.completions.stream(**fields) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert streamed.tool_calls
    assert [call.function.arguments for call in streamed.tool_calls] == [
        call.function.arguments for call in message.tool_calls
    ]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "Sunny"} for call in message.tool_calls]
    history: Any = [*MESSAGES, message, *results]
    answer = client.chat.completions.create(**GREEDY, messages=history, tools=TOOLS, max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 4


def test_openai_parses_strict_functions(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    answer = client.chat.completions.parse(
        **GREEDY, messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=80
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    # Where the model chooses, its text is free, and no call that breaks the schema can come of it.
    free = client.chat.completions.create(**GREEDY, messages=MESSAGES, tools=[tool], max_tokens=24)
    message = free.choices[0].message
    assert message.content or message.tool_calls


def test_openai_responses_with_calls(client: openai.OpenAI) -> None:
    fields: Any = {**GREEDY, "input": MESSAGES, "max_output_tokens": 80}
    fields |= {"tools": [{"type": "function", "strict": True, **FUNCTION}]}
    fields |= {"tool_choice": {"type": "function", "name": "weather"}}
    first = client.responses.create(**fields)
    [call] = [item for item in first.output if item.type == "function_call"]
    Weather.model_validate_json(call.arguments)
    with client.responses.stream(**fields) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == call.arguments
    assert [item.arguments for item in final.output if item.type == "function_call"] == [call.arguments]
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}]
    second = client.responses.create(**GREEDY, input=result, previous_response_id=first.id, max_output_tokens=6)
    assert second.output_text
    assert client.responses.retrieve(second.id).output_text == second.output_text
    assert [item.type for item in client.responses.input_items.list(second.id)] == ["function_call_output"]
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    parsed = client.responses.parse(**GREEDY, input=MESSAGES, text_format=Weather, max_output_tokens=80)
    assert isinstance(parsed.output_parsed, Weather)


def test_anthropic_with_calls(server: ServerProcess) -> None:
    tools: Any = [{"name": "weather", "description": "The weather in a city", "input_schema": SCHEMA}]
    fields: Any = {"model": "smollm2", "max_tokens": 80, "messages": MESSAGES, "tools": tools}
    fields |= {"tool_choice": {"type": "tool", "name": "weather"}, "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(base_url=server.base_url, api_key="none", max_retries=0) as client:
        message = client.messages.create(**fields)
        [use] = message.content
        assert (use.type, use.name, message.stop_reason) == ("tool_use", "weather", "tool_use")
        Weather.model_validate(use.input)
        with client.messages.stream(**fields) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            [streamed] = stream.get_final_message().content
        assert json.loads("".join(pieces)) == streamed.input == use.input
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny"}
        history: Any = [*MESSAGES, {"role": "assistant", "content": message.content}]
        history += [{"role": "user", "content": [result]}]
        answer = client.messages.create(model="smollm2", max_tokens=4, messages=history, tools=tools)
        assert answer.usage.output_tokens <= 4
        count = client.messages.count_tokens
        with_tools = count(model="smollm2", messages=MESSAGES, tools=tools).input_tokens
        assert with_tools > count(model="smollm2", messages=MESSAGES).input_tokens + 50


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_instructor(client: openai.OpenAI, mode: instructor.Mode) -> None:
    wrapped = instructor.from_openai(client, mode=mode)
    example: Any = [{"role": "user", "content": 'Repeat this: {"city": "Rome", "days": 2}'}]
    answer = wrapped.chat.completions.create(
        **GREEDY, messages=example, response_model=Weather, max_tokens=60, max_retries=0
    )
    assert isinstance(answer, Weather)


def test_langchain(server: ServerProcess) -> None:
    fields: Any = {"model": "smollm2", "base_url": f"{server.base_url}/v1", "api_key": SecretStr("none")}
    model = ChatOpenAI(**fields, temperature=0, max_tokens=60, max_retries=0)
    question = [HumanMessage("What is the capital of France? Answer in one word.")]
    whole = model.invoke(question)
    assert "Paris" in str(whole.content)
    assert whole.usage_metadata is not None
    assert "".join(str(chunk.content) for chunk in model.stream(question)) == whole.content
    for method in ("function_calling", "json_schema"):
        found = model.with_structured_output(Weather, method=method).invoke(MESSAGES)
        assert isinstance(found, Weather)
    bound = model.bind_tools([Weather], tool_choice="Weather")
    answer = bound.invoke(MESSAGES)
    assert isinstance(answer, AIMessage)
    [call] = answer.tool_calls
    Weather.model_validate(call["args"])
    result = ToolMessage("Sunny", tool_call_id=call["id"])
    more = model.bind_tools([Weather]).bind(max_tokens=4).invoke([HumanMessage("Weather?"), answer, result])
    assert more.usage_metadata is not None
