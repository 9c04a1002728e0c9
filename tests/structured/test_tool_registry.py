"""Which parser a chat template calls for."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.config import ReasoningParserName, ServerOptions, ToolParserName
from octavo.structured.reasoning.registry import REASONING_PARSERS
from octavo.structured.tools.registry import TOOL_PARSERS, detect_tool_parser

# What real templates write around a call.
TEMPLATES = {
    "Qwen3": (
        r"""a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"""
        r"""{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}""",
        "hermes",
    ),
    "Qwen3-Coder": (
        r"""{{- '\n<tool_call>\n<function=' + tool_call.name + '>\n' }}{{- '<parameter=' + args_name + '>\n' }}""",
        "qwen3_coder",
    ),
    "Llama 3.2": (
        r"""{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{{- '{"name": "' + tool_call.name + '", ' }}"""
        r"""{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}""",
        "llama3_json",
    ),
    "Mistral Nemo": ("""{{- "[TOOL_CALLS][" }}{%- set out = tool_call.function|tojson %}""", "mistral"),
    "DeepSeek V3": (
        """{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>'}}""",
        "deepseek_v3",
    ),
    "gpt-oss": (
        """{{- "<|start|>assistant to=" }}{{- "functions." + tool_call.name + "<|channel|>commentary json" }}""",
        "openai",
    ),
    "LFM2": ("""{{- "<|tool_call_start|>[" }}""", "pythonic"),
    "GLM-4.5": (r"""{{ '\n<tool_call>' + tc.name }}<arg_key>{{ k }}</arg_key></tool_call> tc.arguments""", None),
    "Llama 3": ("""{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'}}""", None),
    "SmolLM2": ("""{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'}}""", None),
}


@pytest.mark.parametrize("model", TEMPLATES)
def test_detection(model: str) -> None:
    template, name = TEMPLATES[model]
    assert detect_tool_parser(template) == name


@given(st.text())
def test_nothing_is_detected_in_nothing(text: str) -> None:
    assert detect_tool_parser(text) is None or any(sign in text for sign in "<[")


def test_options_name_what_the_registries_have() -> None:
    assert set(get_args(ToolParserName)) == set(TOOL_PARSERS)
    assert set(get_args(ReasoningParserName)) == set(REASONING_PARSERS)
    assert ServerOptions().tool_call_parser is None
