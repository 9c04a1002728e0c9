"""Drives the engine under an LLM step by step, as LLM itself does, so that single steps can be watched."""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Iterable
from typing import Any

import torch

from octavo import LLM, SamplingParams
from octavo.engine.engine import Engine
from octavo.protocol.request import Request


def engine_of(llm: LLM) -> Engine:
    return llm._engine


def open_llm(model: str, **options: Any) -> LLM:
    """An LLM of this model; the option "device" is left out where it is "auto"."""
    return LLM(model, **{name: value for name, value in options.items() if (name, value) != ("device", "auto")})


def warm_up(llm: LLM) -> None:
    """Prepare all that idle time would: on a GPU, record the graphs of every batch size."""
    while engine_of(llm).warm_up():
        pass


def close(llm: LLM) -> None:
    """End its workers. The caller drops its own reference and calls `reclaim`."""
    engine_of(llm).shutdown()


def reclaim() -> None:
    """Give the device what no object holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def parse_options(text: str) -> dict[str, Any]:
    """LLM's arguments from the JSON of a command line. Raises ValueError if it is no object."""
    options = json.loads(text)
    if not isinstance(options, dict):
        raise ValueError(f"kwargs={text} is not an object")
    return options


def start_decoding(llm: LLM, num_seqs: int, num_prompt_tokens: int, num_tokens: int, settle: int) -> list[str]:
    """Bring `num_seqs` fresh sequences to decoding, `settle` steps into it. Returns their ids.

    num_tokens: tokens that each may still generate once all of them decode, `settle` included. Raises RuntimeError if
    the pool cannot hold them all at once.
    """
    engine, rng = engine_of(llm), random.Random(num_seqs)
    sampling = SamplingParams(temperature=1.0, seed=1, ignore_eos=True, detokenize=False, max_tokens=None)
    # While the last prompts are computed, the first sequences already decode: they need more room.
    room = min(num_tokens + num_seqs + 64, llm._max_model_len - num_prompt_tokens)
    ids = [f"decode-{num_seqs}-{i}" for i in range(num_seqs)]
    for request_id in ids:
        engine.add(
            Request(
                request_id=request_id,
                prompt_token_ids=[rng.randrange(llm._vocab_size) for _ in range(num_prompt_tokens)],
                sampling=sampling,
                max_tokens=room,
                arrival_time=time.monotonic(),
            )
        )
    try:
        _settle(llm, num_seqs, settle)
    except RuntimeError:
        finish(llm, ids)
        raise
    return ids


def _settle(llm: LLM, num_seqs: int, settle: int) -> None:
    """Step until all have started, and `settle` times more."""
    engine = engine_of(llm)
    started: set[str] = set()
    while len(started) < num_seqs:
        outputs = engine.step()
        if any(output.finish_reason is not None for output in outputs):
            raise RuntimeError(f"of {num_seqs} sequences some ended before all of them decoded")
        started.update(output.request_id for output in outputs if output.new_token_ids)
    for _ in range(settle):
        engine.step()
    if (running := llm.stats().num_running) != num_seqs:
        raise RuntimeError(f"{running} of {num_seqs} sequences run: the KV pool or max_num_seqs is too small")


def finish(llm: LLM, request_ids: Iterable[str]) -> None:
    """Abort the sequences and empty the pipeline."""
    engine = engine_of(llm)
    engine.abort(request_ids)
    while engine.has_work:
        engine.step()
