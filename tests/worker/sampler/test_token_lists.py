"""Token lists and logits processors: what is barred never comes, in both samplers, and a failure costs one row."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_reference import CPU, PROPERTY, Sequence, grid_logits, sample

pytest.importorskip("triton")

from octavo.protocol.plan import RowResult
from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.sampler.logits_processors import takes_prompt
from octavo.worker.sampler.sampler import Sampler, failed
from octavo.worker.sampler.token_lists import token_lists

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 24


def on_cpu(row: Sequence, logits: torch.Tensor, steps: int) -> list[int] | RowResult:
    """What the row draws in so many steps from the same logits, or the result that ends it."""
    sampler = Sampler(2, logits.shape[0], CPU)
    row.set_in(sampler, 1)
    drawn: list[int] = []
    for step in range(steps):
        [result] = sampler.to_rows(sampler.sample(logits[None], [1], [len(row.token_ids) + step]))
        if result.error:
            return result
        drawn += result.token_ids
    return drawn


def on_device(row: Sequence, logits: torch.Tensor, steps: int) -> list[int] | RowResult:
    """The same by the GPU's sampler; it is told no token that it has drawn."""
    sampler = DeviceSampler(2, logits.shape[0], DEVICE)
    record = sampler.set_slot(1, row.sampling, (2,), row.token_ids, row.num_prompt_tokens)
    params = torch.zeros(2, 16, dtype=torch.int32, device=DEVICE)
    params[1] = torch.from_numpy(record)
    table = torch.full((2, 64), 2**30, dtype=torch.int32, device=DEVICE)
    table[1, : len(row.token_ids)] = torch.tensor(row.token_ids, dtype=torch.int32)
    out = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    logits = logits[None].to(DEVICE)
    for position in range(len(row.token_ids), len(row.token_ids) + steps):
        slots, at = torch.tensor([[1], [position]], dtype=torch.int32, device=DEVICE)
        sampler.draw(logits, slots, at, params, torch.ones_like(slots), table, out)
        rows = sampler.needs_more([1], [position])
        more = sampler.draw_more(logits, rows, [1], [position], params, table, out) if rows else None
        [result] = sampler.rows_from_host(sampler.pack_more(out, more).cpu().numpy(), [True], more)
        if result.error:
            return result
    return table[1, len(row.token_ids) :][:steps].tolist()


BOTH = pytest.mark.parametrize("draw", [on_cpu, on_device])
Draw = Callable[[Sequence, torch.Tensor, int], list[int] | RowResult]


def row_of(token_ids: list[int], num_prompt_tokens: int, **wish: object) -> Sequence:
    return Sequence(SamplingParams(max_tokens=50, **{"seed": 5, **wish}), token_ids, num_prompt_tokens)


@BOTH
@settings(PROPERTY, max_examples=15)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=8),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(0, 1000),
)
def test_no_output_holds_a_bad_word_or_a_token_that_is_not_allowed(draw, allowed, words, seed):
    """Logits that favour few tokens, so that words would come; 7 alone makes no word, so it is always left."""
    logits = grid_logits(VOCAB, seed, 1.0)
    logits[:6] += 3
    row = row_of(
        [1, 2, 3], 2, seed=seed, temperature=1.5, allowed_token_ids=[*allowed, 0, 1, 2, 7], bad_words_token_ids=words
    )
    drawn = draw(row, logits, 12)
    assert isinstance(drawn, list)
    assert set(drawn) <= {*allowed, 0, 1, 2, 7}
    output = [3, *drawn]
    for word in words:
        places = [i for i in range(len(output)) if output[i : i + len(word)] == word]
        assert [i for i in places if i + len(word) > 1] == []


@BOTH
def test_a_word_that_began_in_the_prompt_may_end(draw: Draw) -> None:
    logits = torch.zeros(VOCAB)
    logits[9] = 5.0
    wish = {"temperature": 0.0, "bad_words_token_ids": [[8, 9]]}
    assert draw(row_of([8], 1, **wish), logits, 1) == [9]
    assert draw(row_of([1, 8], 1, **wish), logits, 1) != [9]


@BOTH
def test_drawing_without_a_token_left_is_an_error_of_the_row(draw: Draw) -> None:
    row = row_of([1], 1, allowed_token_ids=[3], bad_words_token_ids=[[3]])
    assert draw(row, torch.zeros(VOCAB), 1) == failed(2)


@BOTH
def test_processors_see_the_tokens_and_come_before_all_else(draw: Draw) -> None:
    seen = []

    def only(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((list(output), logits.dtype))
        favoured = torch.full_like(logits, -50.0)
        favoured[len(output) % 3] = 0.0
        return favoured

    def nudge(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[prompt[0] + len(output)] += 60.0
        return logits

    row = row_of([4, 5, 20], 2, temperature=0.0, logits_processors=[only])
    assert draw(row, torch.zeros(VOCAB), 3) == [1, 2, 0]
    assert seen == [([20], torch.float32), ([20, 1], torch.float32), ([20, 1, 2], torch.float32)]
    both = row_of([4, 5, 20], 2, temperature=0.0, logits_processors=[only, nudge], frequency_penalty=0.5)
    assert draw(both, torch.zeros(VOCAB), 3) == [5, 6, 7]
    biased = row_of([4], 1, temperature=0.0, logits_processors=[only], logit_bias={11: 60.0})
    assert draw(biased, torch.zeros(VOCAB), 2) == [11, 11]


def shorten(_: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits[:3]


def forget(_: list[int], logits: torch.Tensor) -> None:
    logits += 1


def fail(_: list[int], logits: torch.Tensor) -> float:
    return logits.numel() / 0


@BOTH
@pytest.mark.parametrize("wrong", [shorten, forget, fail])
def test_a_processor_that_fails_ends_its_row_and_says_why(
    draw: Draw, wrong: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), np.errstate(all="ignore"):
        result = draw(row_of([1], 1, logits_processors=[wrong]), torch.zeros(VOCAB), 1)
    assert result == failed(1)
    assert "logits_processors" in caplog.text


def test_one_rows_lists_do_not_touch_its_neighbours() -> None:
    logits = torch.stack([grid_logits(VOCAB, 3, 1.0)] * 3)
    rows = [row_of([1], 1, temperature=0.0, **wish) for wish in ({}, {"allowed_token_ids": [7]}, {})]
    drawn = sample(Sampler(3, VOCAB, CPU), logits, rows).token_ids.tolist()
    assert drawn == [int(logits[0].argmax()), 7, int(logits[0].argmax())]


def test_a_slot_forgets_the_lists_of_its_last_sequence() -> None:
    logits = torch.zeros(VOCAB)
    logits[9] = 1.0
    sampler, device = Sampler(1, VOCAB, CPU), DeviceSampler(1, VOCAB, DEVICE)
    for wish, token in (({"allowed_token_ids": [3]}, 3), ({}, 9), ({"allowed_token_ids": [4]}, 4)):
        row = row_of([1], 1, temperature=0.0, **wish)
        row.set_in(sampler, 0)
        assert sampler.sample(logits[None], [0], [1]).token_ids.tolist() == [token]
        device.set_slot(0, row.sampling, (2,), [1], 1)
        assert device.needs_more([0], [1]) == ([0] if wish else [])


def test_words_must_be_ids_and_those_outside_the_vocabulary_cannot_come() -> None:
    with pytest.raises(ValueError, match="bad_words cannot be sampled with"):
        token_lists(SamplingParams(bad_words=["x"]), VOCAB)
    assert token_lists(SamplingParams(bad_words_token_ids=[[1, VOCAB]]), VOCAB) is None
    lists = token_lists(SamplingParams(bad_words_token_ids=[[1, 2], [3]]), VOCAB)
    assert lists is not None
    assert lists.words == ((1, 2),)
    assert lists.barred is not None
    assert lists.barred.nonzero()[0].tolist() == [3]


def test_how_a_processor_is_called_is_read_from_its_signature() -> None:
    assert not takes_prompt(shorten)
    assert not takes_prompt(lambda output, logits, scale=2.0: logits * scale * len(output))
    assert takes_prompt(lambda prompt, output, logits: logits[prompt + output])
