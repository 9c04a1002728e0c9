"""The offline API on the real small model: shapes of what comes back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from octavo import LLM, SamplingParams
from octavo.protocol.repetition import RepetitionDetectionParams
from octavo.protocol.request import Request


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return LLM(str(smollm2_path), dtype="float32", max_model_len=256, max_num_seqs=16, kv_cache_memory="64MiB")


def test_text_of_several_prompts_in_their_order(llm: LLM) -> None:
    prompts = ["The capital of France is", "1, 2, 3, 4,"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert [o.prompt for o in outputs] == prompts
    assert "Paris" in outputs[0].outputs[0].text
    assert "5, 6" in outputs[1].outputs[0].text
    for output in outputs:
        assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt or "", add_special_tokens=True)
        assert output.outputs[0].finish_reason == "length"
        assert len(output.outputs[0].token_ids) == 8


def test_chat_goes_through_the_template(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    one = llm.chat(question, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    two = llm.chat([question, question], SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    assert "Paris" in one[0].outputs[0].text
    assert one[0].outputs[0].finish_reason == "stop"  # <|im_end|>
    assert "<|im_start|>user\nWhat is" in (one[0].prompt or "")
    assert [o.outputs[0].text for o in two] == [one[0].outputs[0].text] * 2
    tools = [{"type": "function", "function": {"name": "capital_of"}}]
    told = llm.chat(question, SamplingParams(max_tokens=1), use_tqdm=False, tools=tools, lora_request=None)
    assert '{"name": "capital_of"}' in (told[0].prompt or "")
    with pytest.raises(TypeError, match="no argument 'tool'; did you mean 'tools'"):
        llm.chat(question, use_tqdm=False, tool=tools)  # type: ignore[call-arg]


def test_a_seed_decides_alone_and_in_any_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, seed=7, max_tokens=12)
    alone = llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0]
    crowd = [params if i == 5 else SamplingParams(seed=i, max_tokens=5 + i, min_p=0.02 * i) for i in range(12)]
    among = llm.generate(["Once upon a time"] * 12, crowd, use_tqdm=False)
    assert among[5].outputs[0].text == alone.text
    assert len({o.outputs[0].text[:12] for o in among}) > 6


def test_n_completions_differ_and_are_reproduced_by_their_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=3, max_tokens=10)
    first = llm.generate("My favourite animal is", params, use_tqdm=False)[0]
    again = llm.generate("My favourite animal is", params, use_tqdm=False)[0]
    assert [c.index for c in first.outputs] == [0, 1, 2, 3]
    assert len({c.text for c in first.outputs}) > 1
    assert [c.text for c in first.outputs] == [c.text for c in again.outputs]
    assert again.num_cached_tokens == 0  # shorter than a block


def test_stop_string_ends_text_and_work(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, stop=["7"])
    output = llm.generate("1, 2, 3, 4,", params, use_tqdm=False)[0].outputs[0]
    assert output.text == " 5, 6, "
    assert (output.finish_reason, output.stop_reason) == ("stop", "7")
    kept = llm.generate("1, 2, 3, 4,", params.replace(include_stop_str_in_output=True), use_tqdm=False)[0].outputs[0]
    assert kept.text == " 5, 6, 7"


def test_stop_token_id_is_kept_in_ids_and_named(llm: LLM) -> None:
    comma = llm.get_tokenizer().encode(",", add_special_tokens=False)[0]
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[comma])
    output = llm.generate("1, 2, 3, 4,", params, use_tqdm=False)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", comma)
    assert output.token_ids[-1] == comma
    held = llm.generate("1, 2, 3, 4,", params.replace(min_tokens=6), use_tqdm=False)[0].outputs[0]
    assert comma not in held.token_ids[:6]


def test_known_lengths_are_those_that_come(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the context ends before min_tokens are there."""
    added: list[Request] = []
    add = llm._engine.add
    monkeypatch.setattr(llm._engine, "add", lambda request: (added.append(request), add(request)))
    counting = llm.get_tokenizer().encode("1, 2, 3, 4,", add_special_tokens=False)
    detection = RepetitionDetectionParams(max_pattern_size=1, min_count=2)
    params = SamplingParams(temperature=0, max_tokens=9, min_tokens=9, stop=[",", " "], stop_token_ids=counting[-1:])
    prompts = [counting, [5] * 250, [5] * 250]
    own = [params, params.replace(repetition_detection=detection), params.replace(min_tokens=0)]
    outputs = llm.generate(prompts, own, use_tqdm=False)
    assert [request.patient for request in added] == [True, True, False]
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths[:2] == [request.max_tokens for request in added[:2]] == [9, 6]


def test_logprobs_and_prompt_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2)
    output = llm.generate("The capital of France is", params, use_tqdm=False)[0]
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 5
    for token_id, candidates in zip(completion.token_ids, completion.logprobs):
        assert len(candidates) == 3
        assert candidates[token_id].rank == 1  # greedy
        assert [c.rank for c in candidates.values()] == [1, 2, 3]
        assert all(c.logprob <= 0 for c in candidates.values())
    total = sum(c[t].logprob for t, c in zip(completion.token_ids, completion.logprobs))
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    for token_id, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:]):
        assert entry is not None
        assert token_id in entry


def test_token_ids_in_and_prefix_cache_counts(llm: LLM) -> None:
    prompt = {"prompt_token_ids": list(range(1000, 1050))}
    params = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    first = llm.generate(prompt, params, use_tqdm=False)[0]
    again = llm.generate(prompt["prompt_token_ids"], params, use_tqdm=False)[0]
    other = llm.generate({**prompt, "cache_salt": "tenant"}, params, use_tqdm=False)[0]
    assert (first.num_cached_tokens, again.num_cached_tokens, other.num_cached_tokens) == (0, 48, 0)
    assert first.outputs[0].token_ids == again.outputs[0].token_ids == other.outputs[0].token_ids
    assert first.outputs[0].text == ""
    assert llm.reset_prefix_cache()
    assert llm.generate(prompt, params, use_tqdm=False)[0].num_cached_tokens == 0


def test_logit_bias_forces_and_penalties_change(llm: LLM) -> None:
    token = llm.get_tokenizer().encode(" banana", add_special_tokens=False)[0]
    params = SamplingParams(temperature=0, max_tokens=4, logit_bias={token: 100.0})
    assert llm.generate("I like", params, use_tqdm=False)[0].outputs[0].token_ids == [token] * 4
    punished = params.replace(frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=50.0)
    assert llm.generate("I like", punished, use_tqdm=False)[0].outputs[0].token_ids[0] == token
    assert len(set(llm.generate("I like", punished, use_tqdm=False)[0].outputs[0].token_ids)) > 1


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", SamplingParams(), "has no tokens"),
        ([5, 10**6], SamplingParams(), r"prompt_token_ids has 1000000; allowed: 0\.\.49151"),
        ([1] * 256, SamplingParams(), "256 tokens; allowed: at most 255"),
        ([1], SamplingParams(stop_token_ids=[49152]), r"stop_token_ids=49152 is out of range; allowed: 0\.\.49151"),
        ([1], SamplingParams(logit_bias={50000: 1.0}), r"logit_bias=50000 is out of range"),
        ({"text": "x"}, SamplingParams(), "allowed: cache_salt, prompt, prompt_token_ids"),
        (["a", "b"], [SamplingParams()], "sampling_params has 1 entries"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(
    llm: LLM, prompt: object, params: object, message: str
) -> None:
    before = llm.stats().num_steps_total
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, params, use_tqdm=False)  # type: ignore[arg-type]
    assert llm.stats().num_steps_total == before


def test_output_ends_where_the_context_does(llm: LLM) -> None:
    params = SamplingParams(max_tokens=100, ignore_eos=True, seed=1)
    output = llm.generate([[1] * 250], params, use_tqdm=False)[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (6, "length")


def test_outputs_of_known_lengths_start_the_longest_first(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come back in the order of their prompts. One that may end by itself leaves the order alone."""
    started: list[int] = []
    add = type(llm._engine).add
    monkeypatch.setattr(
        type(llm._engine), "add", lambda engine, request: (started.append(request.max_tokens), add(engine, request))
    )
    lengths = [3, 9, 1, 6]
    known = [SamplingParams(max_tokens=length, ignore_eos=True, temperature=0) for length in lengths]
    prompts = ["The capital of France is", "1, 2, 3, 4,", "One", "Two"]
    outputs = llm.generate(prompts, known, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert started == [9, 6, 3, 1]
    started.clear()
    llm.generate(prompts, [*known[:3], SamplingParams(max_tokens=6)], use_tqdm=False)
    assert started == lengths


def test_priority_needs_its_policy(llm: LLM) -> None:
    with pytest.raises(ValueError, match="scheduling_policy='fcfs'"):
        llm.generate(["a"], SamplingParams(), priority=[1])


def test_unknown_arguments_name_the_nearest() -> None:
    with pytest.raises(TypeError, match="did you mean 'max_model_len'"):
        LLM("smollm2", max_modle_len=5)


def test_embeddings(llm: LLM) -> None:
    texts = ["The cat sat on the mat.", "A cat is sitting on a mat.", "Interest rates rose by two percent."]
    for pooling in ("last", "mean"):
        cat, mat, rates = llm.embed(texts, use_tqdm=False, pooling=pooling)
        assert cat.prompt == texts[0]
        vectors = [np.array(output.outputs.embedding) for output in (cat, mat, rates)]
        assert [float(np.linalg.norm(vector)) for vector in vectors] == pytest.approx([1, 1, 1], abs=1e-5)
        assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
        alone = llm.embed(cat.prompt_token_ids, use_tqdm=False, pooling=pooling)[0]
        assert alone.outputs.embedding == pytest.approx(cat.outputs.embedding, abs=1e-4)
    with pytest.raises(ValueError, match="pooling='cls' is unknown; allowed: last, mean"):
        llm.embed("x", pooling="cls")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 255"):
        llm.embed([[5] * 256])
