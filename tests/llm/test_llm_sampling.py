"""SamplingParams on the real small model: best_of, token lists, processors, truncation, defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.sampling_params import RepetitionDetectionParams

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("defaults")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "max_new_tokens": 3}))
    return folder


@pytest.fixture(scope="module")
def llm(smollm2_path: Path, folder: Path) -> LLM:
    return LLM(
        str(smollm2_path),
        dtype="float32",
        max_model_len=64,
        max_num_seqs=16,
        kv_cache_memory="32MiB",
        threads=1,
        generation_config=str(folder),
    )


def test_best_of_returns_the_likeliest_best_first(llm: LLM) -> None:
    """They are the n likeliest of what as many completions with the same seeds are."""
    all_of_them = llm.generate(PROMPT, SamplingParams(n=6, seed=3, max_tokens=5, logprobs=0), use_tqdm=False)[0]
    params = SamplingParams(n=2, best_of=6, seed=3, max_tokens=5)
    best = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs
    ranked = sorted(all_of_them.outputs, key=lambda output: -(output.cumulative_logprob or 0.0))
    assert [output.token_ids for output in best] == [output.token_ids for output in ranked[:2]]
    assert [output.cumulative_logprob for output in best] == [output.cumulative_logprob for output in ranked[:2]]
    assert [(output.index, output.logprobs) for output in best] == [(0, None), (1, None)]
    assert ranked[0].cumulative_logprob > ranked[-1].cumulative_logprob


def test_bad_words_and_allowed_token_ids(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=6)
    assert "Paris" in llm.generate(PROMPT, greedy, use_tqdm=False)[0].outputs[0].text
    without = llm.generate(PROMPT, greedy.replace(bad_words=["Paris"]), use_tqdm=False)[0].outputs[0]
    assert "Paris" not in without.text
    assert len(without.token_ids) == 6
    digits = [llm.get_tokenizer().encode(digit, add_special_tokens=False)[0] for digit in "0123456789"]
    only = llm.generate(PROMPT, greedy.replace(allowed_token_ids=digits), use_tqdm=False)[0].outputs[0]
    assert only.text.isdecimal()


def test_a_word_of_several_tokens_may_begin(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    greedy = SamplingParams(temperature=0, max_tokens=8)
    plain = llm.generate(PROMPT, greedy, use_tqdm=False)[0].outputs[0].token_ids
    phrase = tokenizer.decode(plain[:3], skip_special_tokens=False)
    found = llm.generate(PROMPT, greedy.replace(bad_words=[phrase]), use_tqdm=False)[0].outputs[0].token_ids
    assert found[:2] == plain[:2]
    assert found[2] != plain[2]


def test_logits_processors_run_in_the_process_of_the_llm(llm: LLM) -> None:
    token = llm.get_tokenizer().encode(" banana", add_special_tokens=False)[0]
    lengths = []

    def fruit(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        lengths.append((len(prompt), len(output)))
        logits[token] = 1000.0
        return logits

    params = SamplingParams(temperature=0, max_tokens=3, logits_processors=[fruit])
    output = llm.generate(PROMPT, params, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == [token] * 3
    assert lengths == [(len(output.prompt_token_ids), count) for count in range(3)]


def test_logprobs_of_chosen_ids_are_those_of_the_whole_distribution(llm: LLM) -> None:
    """Also beside a request for the most likely ones; log-softmax of what a processor saw of the same steps."""
    seen: list[torch.Tensor] = []

    def look(output: list[int], logits: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        seen.append(logits.log_softmax(-1).clone())
        return logits

    ids = [11, 49151, 0, 17]
    chosen = SamplingParams(temperature=0, max_tokens=3, logprob_token_ids=ids, logits_processors=[look])
    likely = SamplingParams(temperature=0, max_tokens=3, logprobs=2)
    outputs = llm.generate([PROMPT, PROMPT], [chosen, likely], use_tqdm=False)
    own, others = (output.outputs[0] for output in outputs)
    assert own.token_ids == others.token_ids
    for token, mine, theirs, wanted in zip(own.token_ids, own.logprobs or [], others.logprobs or [], seen):
        assert list(mine) == [token, *ids]
        assert [each.rank for each in mine.values()] == [1] + [None] * 4
        assert mine[token].logprob == theirs[token].logprob
        assert len(theirs) == 2
        for token_id, entry in mine.items():
            assert entry.logprob == pytest.approx(float(wanted[token_id]), abs=1e-4)


def test_an_output_that_repeats_itself_ends(llm: LLM) -> None:
    detection = RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=2, min_count=3)
    a, b = (llm.get_tokenizer().encode(letter, add_special_tokens=False)[0] for letter in "xy")

    def in_turn(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[a if len(output) % 2 else b] = 1000.0
        return logits

    params = SamplingParams(temperature=0, max_tokens=20, repetition_detection=detection, logits_processors=[in_turn])
    output = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("yxyxyx", "repetition", None)


def test_a_request_may_leave_the_prefix_cache_alone(llm: LLM) -> None:
    ids = list(range(2000, 2040))
    greedy = SamplingParams(temperature=0, max_tokens=2)
    plain = [llm.generate(ids, greedy, use_tqdm=False)[0] for _ in range(2)]
    skipped = llm.generate(ids, greedy.replace(skip_reading_prefix_cache=True), use_tqdm=False)[0]
    assert [output.num_cached_tokens for output in plain] == [0, 32]
    assert skipped.num_cached_tokens == 0
    assert skipped.outputs[0].token_ids == plain[0].outputs[0].token_ids


def test_truncated_prompts_keep_their_end(llm: LLM) -> None:
    ids = list(range(1000, 1100))
    params = SamplingParams(temperature=0, max_tokens=4, truncate_prompt_tokens=7)
    assert llm.generate(ids, params, use_tqdm=False)[0].prompt_token_ids == ids[-7:]
    fits = llm.generate(ids, params.replace(truncate_prompt_tokens=-1), use_tqdm=False)[0]
    assert fits.prompt_token_ids == ids[-60:]
    assert len(fits.outputs[0].token_ids) == 4


def test_defaults_come_from_the_generation_config(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=3)
    assert len(llm.generate(PROMPT, use_tqdm=False)[0].outputs[0].token_ids) == 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(allowed_token_ids=[49152]), r"allowed_token_ids=49152 is out of range; allowed: 0\.\.49151"),
        (SamplingParams(bad_words_token_ids=[[5], [1, 50000]]), "bad_words_token_ids=50000 is out of range"),
        (SamplingParams(use_beam_search=True, temperature=0, n=17), r"n=17 is out of range; allowed: 1\.\.16 beams"),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_anything_runs(
    llm: LLM, params: SamplingParams, message: str
) -> None:
    before = llm.stats().num_steps_total
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPT, params, use_tqdm=False)
    assert llm.stats().num_steps_total == before
