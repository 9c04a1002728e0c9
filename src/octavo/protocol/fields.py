"""The fields of requests: one row says what a field means, may be, and costs, wherever it is found.

SamplingParams and the bodies of all routes are checked against these rows; `GET /openapi.json`, docs/api.md and the
fuzz tests are made from them. A field's type is that of the struct that has it; a test holds the two together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from octavo.protocol.ranges import (
    INT64_MAX,
    Biases,
    Flag,
    Integer,
    Items,
    OneOf,
    Range,
    Real,
    Shape,
    Text,
    TokenIds,
)

# Where a field's name and meaning come from; "vllm" and "octavo" are extensions of OpenAI's and Anthropic's APIs.
Source = Literal["openai", "anthropic", "cohere", "vllm", "octavo"]

# What a larger value, or the field at all, makes the server do more of. "completions", "output", "logprobs" and
# "prompt" are factors of what --max-request-cost bounds; "step": work for this sequence at every step; "host": work
# of the API process, once; "none": nothing that counts.
Cost = Literal["completions", "output", "logprobs", "prompt", "step", "host", "none"]

REQUIRED: Final = "required"


@dataclass(frozen=True, slots=True)
class Field:
    """One row.

    structs: names of the structs that have the field, with this one meaning.
    range: of values besides null, which stands for "not given" wherever the struct lets it.
    default: what holds where the field is not given, or REQUIRED. None: nothing that a value could say.
    new_name: of a field that goes by its old name here.
    """

    structs: tuple[str, ...]
    name: str
    range: Range
    default: Any
    source: Source
    cost: Cost
    meaning: str
    new_name: str = ""


_SAMPLING = ("SamplingParams",)
_CHAT = ("ChatBody",)
_PLAIN = ("CompletionBody",)
_RESPONSES = ("ResponsesBody",)
_MESSAGES = ("MessagesBody",)
_COUNT = ("CountBody",)
_TOKENIZE = ("TokenizeBody",)
_SCORE, _RERANK, _EMBED = ("ScoreBody",), ("RerankBody",), ("EmbeddingsBody",)
_LOAD_ADAPTER, _UNLOAD_ADAPTER = ("LoadAdapterBody",), ("UnloadAdapterBody",)
_OPENAI = _CHAT + _PLAIN
_DRAWN = _SAMPLING + _OPENAI
_ALSO_RESPONSES = _DRAWN + _RESPONSES
_EVERYWHERE = _ALSO_RESPONSES + _MESSAGES
_GENERATING = _OPENAI + _RESPONSES + _MESSAGES
_POOLING = _EMBED + _SCORE + _RERANK

MAX_INPUTS = 2048
COMPLETIONS = Integer(1, 128)
_LENGTH = Integer(1, within="the model's context")
ALTERNATIVES = Integer(0, 20)
_STRINGS = Items(Text(1, 16384), 0, 64, bare=True)
_LABEL = Text(0, 512)
_SALT = Text(1, 512)
_MESSAGES_LIST = Shape("one message or more")
_KWARGS = Shape("an object")
_TEXTS = Shape(f"a text, or 1..{MAX_INPUTS} of them")
_WISH = Shape("an object with one constraint")
_FUNCTIONS = Shape("up to 128 functions")

_DRAWING = (
    Field(_DRAWN, "n", COMPLETIONS, 1, "openai", "completions", "How many completions of each prompt."),
    Field(_DRAWN, "best_of", COMPLETIONS, None, "openai", "completions",
          "How many completions to make, n or more, of which the n of the highest log-probability are returned."),
    Field(_EVERYWHERE, "temperature", Real(0, 2), 1.0, "openai", "none",
          "Flattens the distribution; 0 is greedy, and (0, 0.01) counts as 0.01."),
    Field(_EVERYWHERE, "top_p", Real(0, 1, open_low=True), 1.0, "openai", "none",
          "Draw from the likeliest tokens that together have this probability."),
    Field(_EVERYWHERE, "top_k", Integer(-1), 0, "vllm", "none",
          "Draw from so many of the likeliest tokens; 0 or -1: from all."),
    Field(_EVERYWHERE, "min_p", Real(0, 1), 0.0, "vllm", "none",
          "Draw from tokens of at least this probability, relative to the likeliest one's."),
    Field(_ALSO_RESPONSES, "presence_penalty", Real(-2, 2), 0.0, "openai", "step",
          "Subtracted from the logits of tokens that the output has."),
    Field(_ALSO_RESPONSES, "frequency_penalty", Real(-2, 2), 0.0, "openai", "step",
          "Subtracted from the logits of tokens, for each time that the output has them."),
    Field(_EVERYWHERE, "repetition_penalty", Real(0, math.inf, open_low=True), 1.0, "vllm", "step",
          "Divides the logits of tokens that prompt or output have."),
    Field(_EVERYWHERE, "seed", Integer(-INT64_MAX - 1), None, "openai", "none",
          "The same seed draws the same tokens; -1 counts as not given."),
    Field(_DRAWN, "logit_bias", Biases(Real(-100, 100), 1024), None, "openai", "step",
          "Token ids and what is added to their logits."),
    Field(_DRAWN, "bad_words", Items(Text(1, 128, not_blank=True), 0, 128), None, "vllm", "step",
          "Strings that the output may not hold."),
    Field(_SAMPLING, "bad_words_token_ids", Items(TokenIds(1), 0, INT64_MAX), None, "vllm", "step",
          "The same as sequences of token ids."),
    Field(_DRAWN, "allowed_token_ids", TokenIds(1), None, "vllm", "step", "The only tokens that may be drawn."),
    Field(_SAMPLING, "logits_processors", Shape("callables"), None, "vllm", "step",
          "Functions of the logits, called before all else."),
    Field(_DRAWN, "use_beam_search", Flag(), False, "vllm", "step",
          "Search for the likeliest outputs, at temperature 0, instead of drawing."),
    Field(_DRAWN, "length_penalty", Real(-10, 10), 1.0, "vllm", "none",
          "Beams rank by log-probability / length ** this. Needs use_beam_search."),
    Field(_DRAWN, "early_stopping", OneOf((True, False, "never")), False, "vllm", "none",
          "When a search ends: once enough beams have (true), once no other can beat them (false), or at the latest "
          "(never). Needs use_beam_search."),
    Field(_DRAWN, "structured_outputs", _WISH, None, "vllm", "step",
          "What the text must be: json, regex, choice, grammar, json_object or structural_tag."),
    Field(_SAMPLING + _CHAT + _RESPONSES, "thinking_token_budget", Integer(-1), None, "vllm", "step",
          "The most tokens of reasoning: where it is then still open, its end is forced; -1: any number. Needs a "
          "reasoning parser."),
    Field(_SAMPLING, "guided_decoding", _WISH, None, "vllm", "step", "What the text must be.", "structured_outputs"),
)  # fmt: skip

_ENDING = (
    Field(_SAMPLING, "max_tokens", Integer(1, within="the model's context"), 16, "openai", "output",
          "The longest output, in tokens; null: what the context holds."),
    Field(_PLAIN, "max_tokens", Integer(0, within="the model's context"), 16, "openai", "output",
          "The longest output, in tokens. 0, which only scores the prompt, needs echo."),
    Field(_CHAT, "max_completion_tokens", _LENGTH, None, "openai", "output",
          "The longest output, in tokens. Not given: what the context holds."),
    Field(_CHAT, "max_tokens", _LENGTH, None, "openai", "output",
          "The longest output, in tokens. Beside the new name, the same number.", "max_completion_tokens"),
    Field(_RESPONSES, "max_output_tokens", _LENGTH, None, "openai", "output",
          "The longest output, in tokens. Not given: what the context holds."),
    Field(_MESSAGES, "max_tokens", _LENGTH, REQUIRED, "anthropic", "output", "The longest output, in tokens."),
    Field(_DRAWN, "min_tokens", Integer(0, within="max_tokens"), 0, "vllm", "output",
          "The shortest output, in tokens, as far as a grammar lets the text go on: what could end it before is "
          "barred."),
    Field(_ALSO_RESPONSES, "stop", _STRINGS, None, "openai", "host",
          "Strings that end the text and are not part of it."),
    Field(_MESSAGES, "stop_sequences", Items(Text(1, 16384), 0, 64), None, "anthropic", "host",
          "Strings that end the text and are not part of it."),
    Field(_DRAWN, "stop_token_ids", TokenIds(0, 128), None, "vllm", "none",
          "Tokens that end the output, besides the model's own."),
    Field(_DRAWN, "include_stop_str_in_output", Flag(), False, "vllm", "none",
          "Leave what ended the output in the text."),
    Field(_EVERYWHERE, "ignore_eos", Flag(), False, "vllm", "output",
          "Go on after the model's end of sequence, as far as a grammar lets the text go on."),
    Field(_DRAWN, "repetition_detection", Shape("an object"), None, "vllm", "step",
          "End the output once its last tokens are min_count copies of a pattern of min_pattern_size..max_pattern_size "
          "(0..256) tokens."),
)  # fmt: skip

_PROMPTS = (
    Field(_CHAT, "messages", _MESSAGES_LIST, REQUIRED, "openai", "prompt", "The conversation."),
    Field(_COUNT + _MESSAGES, "messages", _MESSAGES_LIST, REQUIRED, "anthropic", "prompt", "The conversation."),
    Field(_PLAIN, "prompt", Shape("a text, token ids, or 1..256 of either"), REQUIRED, "openai", "prompt",
          "What the output goes on from."),
    Field(_RESPONSES, "input", Shape("a text, or one item or more"), REQUIRED, "openai", "prompt",
          "What is said next in the conversation."),
    Field(_RESPONSES, "instructions", Shape("a text"), None, "openai", "prompt",
          "The system message of this response, which later ones do not inherit."),
    Field(_RESPONSES, "previous_response_id", _LABEL, None, "openai", "prompt",
          "The stored response whose conversation goes on."),
    Field(_COUNT + _MESSAGES, "system", Shape("a text, or text blocks"), None, "anthropic", "prompt",
          "The system message."),
    Field(_TOKENIZE, "prompt", Shape("a text"), None, "vllm", "prompt", "The text; either this or messages."),
    Field(_TOKENIZE, "messages", _MESSAGES_LIST, None, "vllm", "prompt", "The conversation; either this or prompt."),
    Field(("DetokenizeBody",), "tokens", TokenIds(0), REQUIRED, "vllm", "prompt", "The token ids."),
    Field(_CHAT, "tools", Shape("1..128 functions"), None, "openai", "prompt", "Functions that the model may call."),
    Field(_RESPONSES, "tools", _FUNCTIONS, None, "openai", "prompt", "Functions that the model may call."),
    Field(_COUNT + _MESSAGES, "tools", _FUNCTIONS, None, "anthropic", "prompt", "Functions that the model may call."),
    Field(_TOKENIZE, "tools", Shape("1..128 functions"), None, "vllm", "prompt",
          "Functions that the prompt shows. Needs messages."),
    Field(_CHAT + _RESPONSES, "tool_choice", Shape("none, auto, required, or a function"), None, "openai", "step",
          "Whether functions are called. Not given: auto where there are tools."),
    Field(_COUNT + _MESSAGES, "tool_choice", Shape("an object of type auto, any, tool or none"), None, "anthropic",
          "step", "Whether functions are called. Not given: auto where there are tools."),
    Field(_COUNT + _MESSAGES, "thinking", Shape("an object of type disabled, enabled or adaptive"), None, "anthropic",
          "prompt", "Whether the answer has the reasoning; budget_tokens of enabled: the most tokens of it."),
    Field(_COUNT + _MESSAGES, "output_config", Shape("an object"), None, "anthropic", "step",
          "format: what the text must be, a JSON schema."),
    Field(_CHAT + _RESPONSES, "parallel_tool_calls", Flag(), True, "openai", "none",
          "false keeps the first call of an answer only."),
    Field(_CHAT, "add_generation_prompt", Flag(), True, "vllm", "prompt",
          "End the prompt with what opens the assistant's turn."),
    Field(_TOKENIZE, "add_generation_prompt", Flag(), True, "vllm", "prompt",
          "End the prompt with what opens the assistant's turn. Needs messages."),
    Field(_CHAT, "continue_final_message", Flag(), False, "vllm", "prompt", "Leave the last message open."),
    Field(_TOKENIZE, "continue_final_message", Flag(), False, "vllm", "prompt",
          "Leave the last message open. Needs messages."),
    Field(_CHAT + _RESPONSES + _COUNT + _MESSAGES, "chat_template_kwargs", _KWARGS, None, "vllm", "prompt",
          "Variables of the chat template."),
    Field(_TOKENIZE, "chat_template_kwargs", _KWARGS, None, "vllm", "prompt",
          "Variables of the chat template. Needs messages."),
    Field(_CHAT, "add_special_tokens", Flag(), False, "vllm", "prompt",
          "Let the tokenizer add its special tokens to what the template wrote."),
    Field(_PLAIN + _POOLING, "add_special_tokens", Flag(), True, "vllm", "prompt",
          "Let the tokenizer add its special tokens."),
    Field(_TOKENIZE, "add_special_tokens", Flag(), None, "vllm", "prompt",
          "Let the tokenizer add its special tokens. Not given: true for a prompt, false for messages."),
    Field(_DRAWN, "truncate_prompt_tokens", Integer(-1, hole=0), None, "vllm", "prompt",
          "Keep only so many of the prompt's last tokens; -1: as many as the context holds beside the output."),
)  # fmt: skip

_ANSWERS = (
    Field(_GENERATING, "stream", Flag(), False, "openai", "none", "Answer with server-sent events."),
    Field(_OPENAI, "stream_options", Shape("an object"), None, "openai", "none",
          "include_usage: a last event has the usage; continuous_usage_stats: all events have. Needs stream."),
    Field(_CHAT, "logprobs", Flag(), False, "openai", "logprobs", "Answer with the log-probability of each token."),
    Field(_CHAT, "top_logprobs", ALTERNATIVES, 0, "openai", "logprobs",
          "And with those of so many alternatives. Needs logprobs."),
    Field(_SAMPLING + _PLAIN, "logprobs", ALTERNATIVES, None, "openai", "logprobs",
          "Answer with the log-probability of each token and of so many alternatives."),
    Field(_DRAWN, "prompt_logprobs", ALTERNATIVES, None, "vllm", "logprobs",
          "The same for the tokens of the prompt. Not with stream."),
    Field(_SAMPLING, "logprob_token_ids", TokenIds(1, 128), None, "vllm", "logprobs",
          "Give the log-probabilities of exactly these tokens, beside that of each token."),
    Field(_SAMPLING, "skip_reading_prefix_cache", Flag(), None, "vllm", "prompt",
          "Compute the whole prompt, whatever the prefix cache holds of it."),
    Field(_PLAIN, "echo", Flag(), False, "openai", "none",
          "Put the prompt in front of the output. With stream, not beside logprobs."),
    Field(_OPENAI, "return_token_ids", Flag(), False, "vllm", "none",
          "Answer with token ids too; those of the prompt are in a stream's first chunk."),
    Field(_SAMPLING, "detokenize", Flag(), True, "vllm", "host", "Make text of the tokens."),
    Field(_DRAWN, "skip_special_tokens", Flag(), True, "vllm", "none", "Leave special tokens out of the text."),
    Field(_DRAWN, "spaces_between_special_tokens", Flag(), True, "vllm", "none",
          "Keep the space that begins a special token right after another."),
    Field(_CHAT, "include_reasoning", Flag(), True, "vllm", "none",
          "Answer with the reasoning too. false needs a server with --reasoning-parser."),
    Field(_OPENAI, "response_format", Shape("an object with a type"), None, "openai", "step",
          "What the text must be: text, json_object, json_schema or structural_tag."),
    Field(_RESPONSES, "text", Shape("an object"), None, "openai", "step",
          "format: what the text must be, a JSON schema, any JSON object, or free."),
    Field(_OPENAI, "guided_json", Shape("a JSON schema"), None, "vllm", "step", "The text follows this JSON schema.",
          "structured_outputs.json"),
    Field(_OPENAI, "guided_regex", Shape("a regex"), None, "vllm", "step", "The text matches this regex.",
          "structured_outputs.regex"),
    Field(_OPENAI, "guided_choice", Shape("strings"), None, "vllm", "step", "The text is one of these.",
          "structured_outputs.choice"),
    Field(_OPENAI, "guided_grammar", Shape("a grammar"), None, "vllm", "step", "The text follows this grammar.",
          "structured_outputs.grammar"),
    Field(_OPENAI, "guided_json_object", Flag(), False, "vllm", "step", "The text is some JSON object.",
          "structured_outputs.json_object"),
    Field(_OPENAI, "guided_whitespace_pattern", Shape("a regex"), None, "vllm", "step",
          "What may stand between the parts of the JSON that another field asks for.",
          "structured_outputs.whitespace_pattern"),
    Field(_OPENAI, "guided_decoding_backend", OneOf(("auto", "guidance", "llguidance")), "auto", "vllm", "none",
          "What reads grammars: all values name the same."),
    Field(_RESPONSES, "store", Flag(), None, "openai", "none",
          "Keep the response to go on from. Not given: true, except with several API processes, where it is false."),
)  # fmt: skip

_EMBEDDING = (
    Field(_EMBED, "input", Shape(f"a text, token ids, or 1..{MAX_INPUTS} of either"), REQUIRED, "openai", "prompt",
          "What is embedded."),
    Field(_EMBED, "encoding_format", OneOf(("float", "base64")), "float", "openai", "none",
          "How a vector is written: as numbers, or as little-endian float32 in base64."),
    Field(_EMBED, "dimensions", Integer(1, within="the model's dimensions"), None, "openai", "none",
          "Only so many of an embedding's first numbers, of a model whose config says that it may be cut."),
    Field(_EMBED, "normalize", Flag(), None, "vllm", "none",
          "Scale an embedding to length 1. Not given: as the model's files say, which is true where they say nothing."),
    Field(_POOLING, "pooling", OneOf(("last", "mean")), None, "octavo", "none",
          "What is embedded: the last hidden state, or the mean of all. Not given: as the model's files say, or last."),
    Field(_SCORE + _RERANK, "use_activation", Flag(), None, "vllm", "none",
          "false: the numbers whose sigmoids are the probabilities, of a model that scores."),
    Field(_SCORE, "text_1", _TEXTS, None, "vllm", "prompt", "The first side: one text, or as many as the second has."),
    Field(_SCORE, "text_2", _TEXTS, None, "vllm", "prompt", "The second side."),
    Field(_SCORE, "queries", _TEXTS, None, "vllm", "prompt", "text_1 by another name."),
    Field(_SCORE, "documents", _TEXTS, None, "vllm", "prompt", "text_2 by another name."),
    Field(_SCORE, "data_1", _TEXTS, None, "vllm", "prompt", "text_1 by another name."),
    Field(_SCORE, "data_2", _TEXTS, None, "vllm", "prompt", "text_2 by another name."),
    Field(_RERANK, "query", Shape("a text"), REQUIRED, "cohere", "prompt", "What the documents are compared with."),
    Field(_RERANK, "documents", Shape(f"1..{MAX_INPUTS - 1} texts"), REQUIRED, "cohere", "prompt",
          "Texts, or objects with a text."),
    Field(_RERANK, "top_n", Integer(0), None, "cohere", "none", "How many of the best to answer with; 0: all."),
    Field(_RERANK, "return_documents", Flag(), True, "cohere", "none", "Answer with the documents too."),
    Field(_TOKENIZE, "return_token_strs", Flag(), False, "vllm", "none", "Answer with each token's text too."),
)  # fmt: skip

_ADAPTERS = (
    Field(_LOAD_ADAPTER, "lora_name", Shape("1..128 of A-Z a-z 0-9 . _ -"), REQUIRED, "vllm", "none",
          "What requests will name as their model. Not a name of the model itself."),
    Field(_LOAD_ADAPTER, "lora_path", Shape("a folder in --lora-dir"), REQUIRED, "vllm", "none",
          "Where the adapter lies, as PEFT saves it, relative to --lora-dir. It and its files lie in there once all "
          "symlinks are resolved."),
    Field(_LOAD_ADAPTER, "load_inplace", Flag(), False, "vllm", "none",
          "Put the adapter in the place of the one of this name. Requests that run keep the old one."),
    Field(_UNLOAD_ADAPTER, "lora_name", Shape("the name of an adapter"), REQUIRED, "vllm", "none",
          "The adapter that new requests can no longer name. Requests that run keep it; memory is freed once another "
          "adapter needs it."),
    Field(_UNLOAD_ADAPTER, "lora_int_id", Integer(1), None, "vllm", "none",
          "The adapter's number, to be sure: another one is refused."),
)  # fmt: skip

_COMMON = (
    Field(_GENERATING + _COUNT + _POOLING, "model", Shape("a name that the server answers to"), REQUIRED, "openai",
          "none", "The model, or a LoRA adapter."),
    Field((*_TOKENIZE, "DetokenizeBody"), "model", Shape("a name that the server answers to"), None, "vllm", "none",
          "The model, or a LoRA adapter."),
    Field(_GENERATING + _POOLING, "priority", Integer(-(2**31), 2**31 - 1), 0, "vllm", "none",
          "Lower runs first. Needs a server with --scheduling-policy priority."),
    Field(_GENERATING + _POOLING, "cache_salt", _SALT, None, "vllm", "none",
          "Only requests of the same salt share cached prefixes."),
    Field(_OPENAI + _RESPONSES + _POOLING, "user", _LABEL, None, "openai", "none",
          "A label for the operator's own use; it changes nothing."),
    Field(_OPENAI + _RESPONSES, "safety_identifier", _LABEL, None, "openai", "none",
          "A label for the operator's own use; it changes nothing."),
    Field(_OPENAI + _RESPONSES, "prompt_cache_key", _LABEL, None, "openai", "none",
          "A label for the operator's own use; it changes nothing."),
    Field(_OPENAI + _RESPONSES, "metadata", Shape("up to 16 strings by name"), None, "openai", "none",
          "Labels for the operator's own use; they change nothing."),
    Field(_MESSAGES, "metadata", Shape("an object"), None, "anthropic", "none",
          "user_id: a label for the operator's own use; it changes nothing."),
    Field(_COUNT + _MESSAGES, "cache_control", Shape("an object"), None, "anthropic", "none",
          "Asks to cache the prompt, which is done for every prompt."),
)  # fmt: skip

FIELDS: tuple[Field, ...] = _PROMPTS + _DRAWING + _ENDING + _ANSWERS + _EMBEDDING + _ADAPTERS + _COMMON


@functools.cache
def fields_of(struct: str) -> Mapping[str, Field]:
    """The rows of one struct by their names, in the order of the table."""
    return {row.name: row for row in FIELDS if struct in row.structs}
