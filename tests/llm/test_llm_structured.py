"""Structured output of the real small model: schemas at temperature 1, and what else a request may ask for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from json_schemas import SCHEMAS

from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.protocol import sampling as sampling_module
from octavo.sampling_params import GuidedDecodingParams

S = StructuredOutputsParams
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return LLM(str(smollm2_path), dtype="float32", max_model_len=256, max_num_seqs=64, kv_cache_memory="192MiB")


def generate(llm: LLM, wish: StructuredOutputsParams, **wishes: Any) -> Any:
    params = SamplingParams(structured_outputs=wish, **{"max_tokens": 24, "seed": 1, **wishes})
    return llm.generate("The answer is: ", params, use_tqdm=False)[0]


def test_outputs_are_valid_under_their_schema(llm: LLM) -> None:
    """Every fifth; benchmarks/structured_outputs.py takes all."""
    schemas = list(SCHEMAS.values())[::5]
    params = [
        SamplingParams(
            temperature=1.0, seed=i, max_tokens=64, structured_outputs=S(json=schema, disable_any_whitespace=i % 8 > 0)
        )
        for i, schema in enumerate(schemas)
    ]
    outputs = llm.generate(["JSON: "] * len(params), params, use_tqdm=False)
    ended = 0
    for schema, output in zip(schemas, outputs):
        completion = output.outputs[0]
        assert completion.finish_reason in ("stop", "length")
        if completion.finish_reason == "stop":
            ended += 1
            value = json.loads(completion.text)
            jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(value)
    assert ended >= len(schemas) - 3  # white space, or a list that goes on, may take all 64 tokens


def test_a_choice_regex_and_grammar(llm: LLM) -> None:
    assert generate(llm, S(choice=["Paris", "Rome"])).outputs[0].text in ("Paris", "Rome")
    assert generate(llm, S(regex="[0-9]{3}!")).outputs[0].text[3:] == "!"
    assert generate(llm, S(grammar='root ::= "x" ("y" | "z")')).outputs[0].text in ("xy", "xz")


def test_the_end_of_the_grammar_is_a_stop_by_end_of_sequence(llm: LLM) -> None:
    completion = generate(llm, S(regex="(ab){3}"), ignore_eos=True, min_tokens=20).outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("ababab", "stop", None)
    assert completion.token_ids[-1] in llm.get_tokenizer().eos_token_ids


def test_ignore_eos_and_min_tokens_count_while_the_text_may_go_on(llm: LLM) -> None:
    assert generate(llm, S(regex="a*"), ignore_eos=True, max_tokens=6).outputs[0].finish_reason == "length"
    completion = generate(llm, S(regex="[0-9]*"), min_tokens=5, max_tokens=7).outputs[0]
    assert len(completion.token_ids) >= 5


def test_n_completions_each_have_their_own_state(llm: LLM) -> None:
    completions = generate(llm, S(regex="[a-z]{3}-[0-9]{2}"), n=4).outputs
    assert len({c.text for c in completions}) > 1
    assert all(len(c.text) == 6 and c.text[3] == "-" for c in completions)


def test_with_logprobs_penalties_bias_and_truncation(llm: LLM) -> None:
    wishes = {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "top_p": 0.9, "top_k": 40, "logprobs": 1}
    completion = generate(llm, S(regex="[0-9]{4}"), logit_bias={5: 100.0}, **wishes).outputs[0]
    assert len(completion.text) == 4
    assert completion.text.isdigit()
    assert len(completion.logprobs) == len(completion.token_ids)
    for token_id, candidates in zip(completion.token_ids, completion.logprobs):
        assert candidates[token_id].logprob <= 0  # of the raw distribution, in which others may come first
    assert any(c[t].rank > 1 for t, c in zip(completion.token_ids, completion.logprobs))


def test_a_stop_string_inside_the_grammar_ends_it_early(llm: LLM) -> None:
    completion = generate(llm, S(regex="aaabbb"), stop=["b"]).outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("aaa", "stop", "b")


def test_the_same_seed_gives_the_same_text_beside_others(llm: LLM) -> None:
    wish = SamplingParams(structured_outputs=S(json_object=True), seed=5, max_tokens=12)
    alone = llm.generate("JSON: ", wish, use_tqdm=False)[0].outputs[0].token_ids
    others = [SamplingParams(max_tokens=6, seed=i) for i in range(3)]
    among = llm.generate(["JSON: "] * 4, [others[0], wish, *others[1:]], use_tqdm=False)
    assert among[1].outputs[0].token_ids == alone
    assert all(o.outputs[0].text for o in among)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (S(json={"type": "array", "uniqueItems": True}), "structured_outputs.json cannot be used: .*uniqueItems"),
        (S(regex="("), "structured_outputs.regex cannot be used: .*unclosed group"),
        (S(grammar="?"), "structured_outputs.grammar cannot be used: .*GBNF"),
        (S(structural_tag="{}"), "structured_outputs.structural_tag cannot be used: .*structures"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_runs(llm: LLM, wish: S, words: str) -> None:
    before = llm.stats().generation_tokens_total
    params = [SamplingParams(max_tokens=2), SamplingParams(structured_outputs=wish)]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        llm.generate(["a", "b"], params, use_tqdm=False)
    assert llm.stats().generation_tokens_total == before


def test_guided_decoding_is_the_old_name(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    sampling_module._warn_of_old_name.cache_clear()
    schema = {
        "type": "object",
        "properties": {"price": {"type": "integer", "minimum": 1, "maximum": 999}},
        "required": ["price"],
        "additionalProperties": False,
    }
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            params = SamplingParams(temperature=0.1, max_tokens=60, guided_decoding=GuidedDecodingParams(json=schema))
    assert [r.message for r in caplog.records if "structured_outputs" in r.message] == [caplog.records[-1].message]
    assert params.structured_outputs == S(json=schema)
    assert params.guided_decoding is None
    text = llm.generate("The shoe costs $150. As JSON: ", params, use_tqdm=False)[0].outputs[0].text
    assert 1 <= json.loads(text)["price"] <= 999
