"""The tool parsers by name, and which of them a chat template calls for."""

from __future__ import annotations

from collections.abc import Callable

from octavo.structured.harmony import HarmonyParser
from octavo.structured.tools.base import Functions, ToolParser
from octavo.structured.tools.constrained import StrictLlama3Parser
from octavo.structured.tools.deepseek_v3 import DeepSeekV3Parser
from octavo.structured.tools.hermes import HermesParser
from octavo.structured.tools.llama3_json import Llama3JsonParser
from octavo.structured.tools.mistral import MistralParser
from octavo.structured.tools.pythonic import PythonicParser
from octavo.structured.tools.qwen3_coder import Qwen3CoderParser

TOOL_PARSERS: dict[str, Callable[[Functions], ToolParser]] = {
    "deepseek_v3": DeepSeekV3Parser,
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "openai": HarmonyParser,
    "pythonic": PythonicParser,
    "qwen3_coder": Qwen3CoderParser,
    "qwen3_xml": Qwen3CoderParser,
}

# Those for outputs that were held to `strict.strict_calls_tag`.
STRICT_PARSERS: dict[str, Callable[[Functions], ToolParser]] = {**TOOL_PARSERS, "llama3_json": StrictLlama3Parser}

# What only templates of a format write; the first line of which all strings are there decides.
_SIGNS: tuple[tuple[str | None, tuple[str, ...]], ...] = (
    (None, ("<arg_key>",)),  # GLM-4.5, whose calls only begin like those of Hermes
    ("openai", ("<|start|>assistant", "<|channel|>")),
    ("deepseek_v3", ("<｜tool▁call▁begin｜>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("hermes", ("<tool_call>", "</tool_call>", "arguments")),
    ("pythonic", ("<|tool_call_start|>",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("[func_name1(params_name1=params_value1",)),
    ("llama3_json", ("<|start_header_id|>", '"parameters": ')),
)


def detect_tool_parser(chat_template: str) -> str | None:
    """The parser for what a model writes that was trained with this template; None where it shows no known format."""
    return next((name for name, signs in _SIGNS if all(sign in chat_template for sign in signs)), None)
