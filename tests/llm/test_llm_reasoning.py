"""Reasoning of the real small model, which knows no marks for it: what it is held to shows in the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams, StructuredOutputsParams

OPENED = "Is 7 a prime?\n<think>\n"
CLOSED = OPENED + "\n</think>\n\n"
WISH = StructuredOutputsParams(regex=r'\{"prime": (true|false)\}')


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return LLM(str(smollm2_path), dtype="float32", reasoning_parser="qwen3", max_model_len=128, kv_cache_memory="64MiB")


def texts(llm: LLM, prompts: Any, **wishes: Any) -> list[str]:
    params = SamplingParams(**{"max_tokens": 24, "seed": 3, **wishes})
    return [one.text for output in llm.generate(prompts, params, use_tqdm=False) for one in output.outputs]


def test_reasoning_ends_at_its_budget_and_the_output_goes_on(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(OPENED, add_special_tokens=False)
    [free] = texts(llm, OPENED, temperature=0.0, max_tokens=4)
    cut = texts(llm, [OPENED, ids], temperature=0.0, thinking_token_budget=4, ignore_eos=True)
    assert cut[0].startswith(free + "</think>")
    assert len(cut[0]) > len(free + "</think>")
    assert cut[1] == cut[0]
    [none] = texts(llm, OPENED, temperature=0.0, thinking_token_budget=0, max_tokens=4)
    assert none.startswith("</think>")


def test_a_budget_that_is_not_reached_changes_nothing(llm: LLM) -> None:
    prompts = [OPENED, CLOSED, "7 is"]
    free = texts(llm, prompts, max_tokens=6)
    assert texts(llm, prompts, max_tokens=6, thinking_token_budget=6) == free
    # Outside reasoning there is nothing to bound.
    assert texts(llm, prompts[1:], max_tokens=6, thinking_token_budget=0) == free[1:]


def test_a_grammar_begins_where_the_reasoning_ends(llm: LLM) -> None:
    wishes = {"structured_outputs": WISH, "n": 2, "thinking_token_budget": 3}
    opened, undecided, closed = OPENED, "7 is", CLOSED
    found = texts(llm, [opened, undecided, closed], **wishes)
    assert len(found) == 6
    for text in found[:2]:
        reasoning, mark, answer = text.partition("</think>")
        assert mark
        assert reasoning
        assert set(json.loads(answer)) == {"prime"}
    for text in found[2:4]:  # the model may open its reasoning, or not
        assert text.startswith(("<think>", "{"))
        assert set(json.loads(text.rpartition("</think>")[2])) == {"prime"}
    for text in found[4:]:
        assert set(json.loads(text)) == {"prime"}


def test_what_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="reasoning_parser='nope' is unknown; allowed: deepseek_r1, "):
        LLM("any", reasoning_parser="nope")  # type: ignore[arg-type]
    for parser, words in (
        (None, "needs a reasoning parser"),
        ("openai_gptoss", "is not available with reasoning_parser="),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm, "_reasoning_parser", parser)
            with pytest.raises(ValueError, match=f"thinking_token_budget {words}"):
                texts(llm, OPENED, thinking_token_budget=3)
    for value in (-2, True, 1.0, "3"):
        with pytest.raises(ValueError, match="thinking_token_budget="):
            SamplingParams(thinking_token_budget=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="thinking_token_budget=3 is refused with allowed_token_ids"):
        SamplingParams(thinking_token_budget=3, allowed_token_ids=[1])
    with pytest.raises(ValueError, match="thinking_token_budget=3 is refused with use_beam_search"):
        SamplingParams(thinking_token_budget=3, use_beam_search=True, temperature=0)
    assert SamplingParams(thinking_token_budget=-1).thinking_token_budget is None


def test_a_continued_message_reasons_on_where_its_own_text_does(llm: LLM) -> None:
    """The last message's text tells, not the prompt's end; contents may be parts."""

    def continued(begun: str | list[dict[str, str]]) -> str:
        conversation = [{"role": "user", "content": "Is 7 a prime?"}, {"role": "assistant", "content": begun}]
        wishes = SamplingParams(max_tokens=24, seed=3, structured_outputs=WISH, thinking_token_budget=3)
        open_end: Any = {"add_generation_prompt": False, "continue_final_message": True}
        return llm.chat(conversation, wishes, use_tqdm=False, **open_end)[0].outputs[0].text

    for opened in ("<think>\nSeven is", [{"type": "text", "text": "<think>\nSeven"}, {"type": "text", "text": " is"}]):
        reasoning, mark, answer = continued(opened).partition("</think>")
        assert reasoning
        assert mark
        assert set(json.loads(answer)) == {"prime"}
    for closed in ("My answer: ", "<think>\nSeven is.\n</think>\n\n"):
        assert set(json.loads(continued(closed))) == {"prime"}
