"""Beam search on the real model in float32: the outputs, their order and their scores are transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_gguf_models import reference_of
from transformers import PreTrainedModel

from octavo import LLM, BeamSearchParams, SamplingParams

CHAT = "<|im_start|>user\nIs the sky blue? Answer yes or no.<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = ["The capital of France is", CHAT]


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 16, "kv_cache_memory": "64MiB", "threads": 1}
    return LLM(str(smollm2_path), **options)


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> PreTrainedModel:
    return reference_of(smollm2_path)


def searched(
    reference: PreTrainedModel, llm: LLM, prompt: list[int], params: BeamSearchParams
) -> tuple[list[list[int]], list[float]]:
    """The outputs of transformers' search, the best first, without padding, and their scores."""
    eos = llm.get_tokenizer().eos_token_ids
    inputs = torch.tensor([prompt])
    found = reference.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        do_sample=False,
        eos_token_id=None if params.ignore_eos else list(eos),
        pad_token_id=0,
        bos_token_id=1,
        return_dict_in_generate=True,
        output_scores=True,
    )
    outputs = []
    for row in found.sequences[:, len(prompt) :].tolist():
        ends = [] if params.ignore_eos else [index for index, token in enumerate(row) if token in eos]
        outputs.append(row[: ends[0] + 1] if ends else row)
    return outputs, found.sequences_scores.tolist()


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"early_stopping": True, "length_penalty": 0.0},
        {"early_stopping": "never", "length_penalty": 2.0},
        {"ignore_eos": True, "beam_width": 4, "max_tokens": 3, "length_penalty": -1.0},
    ],
    ids=str,
)
@torch.inference_mode()
def test_outputs_and_scores_are_transformers(llm: LLM, reference: PreTrainedModel, wish: dict[str, object]) -> None:
    params = BeamSearchParams(**{"beam_width": 3, "max_tokens": 6, "include_stop_str_in_output": True, **wish})
    found = llm.beam_search(PROMPTS, params)
    for prompt, output in zip(PROMPTS, found):
        ids = llm.get_tokenizer().encode(prompt, add_special_tokens=True)
        expected, scores = searched(reference, llm, ids, params)
        assert [sequence.tokens for sequence in output.sequences] == [ids + own for own in expected]
        assert [sequence.score for sequence in output.sequences] == pytest.approx(scores, abs=1e-3)
    llm.audit()
    assert llm.stats().num_running == 0


def test_an_end_of_sequence_ends_an_output_and_is_not_part_of_it(llm: LLM) -> None:
    [output] = llm.beam_search(CHAT, BeamSearchParams(beam_width=3, max_tokens=8, early_stopping=True))
    best = output.sequences[0]
    eos = llm.get_tokenizer().eos_token_ids
    prompt = llm.get_tokenizer().encode(CHAT, add_special_tokens=True)
    assert best.finish_reason == "stop"
    assert best.stop_reason in eos
    assert best.tokens[-1] not in eos
    assert len(best.logprobs) == len(best.tokens) - len(prompt) + 1
    assert best.text == llm.get_tokenizer().decode(best.tokens, skip_special_tokens=False)
    assert best.cum_logprob == pytest.approx(sum(next(iter(entry.values())).logprob for entry in best.logprobs))


def test_generate_searches_where_sampling_params_say_so(llm: LLM) -> None:
    """The n best of best_of beams, beside a request that samples, and with the text of a completion."""
    beams = SamplingParams(use_beam_search=True, temperature=0, n=2, best_of=3, max_tokens=4, early_stopping=True)
    plain = SamplingParams(temperature=0, max_tokens=4)
    searched, sampled = llm.generate([PROMPTS[0], PROMPTS[0]], [beams, plain], use_tqdm=False)
    [wanted] = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=4, early_stopping=True))
    prompt = searched.prompt_token_ids
    assert [o.token_ids for o in searched.outputs] == [s.tokens[len(prompt) :] for s in wanted.sequences[:2]]
    assert [o.cumulative_logprob for o in searched.outputs] == [s.cum_logprob for s in wanted.sequences[:2]]
    assert [PROMPTS[0] + o.text for o in searched.outputs] == [s.text for s in wanted.sequences[:2]]
    assert [(o.index, o.finish_reason) for o in searched.outputs] == [(0, "length"), (1, "length")]
    assert len(sampled.outputs) == 1
    assert sampled.outputs[0].token_ids == llm.generate(PROMPTS[0], plain, use_tqdm=False)[0].outputs[0].token_ids


def test_a_prompt_without_room_is_refused_before_anything_runs(llm: LLM) -> None:
    before = llm.stats().num_steps_total
    with pytest.raises(ValueError, match="allowed: at most 127"):
        llm.beam_search([PROMPTS[0], [1] * 128], BeamSearchParams(beam_width=2, max_tokens=4))
    assert llm.stats().num_steps_total == before
