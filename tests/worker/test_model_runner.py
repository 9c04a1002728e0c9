"""The CPU's runner, given plans that the scheduler makes seldom."""

from __future__ import annotations

import torch
from test_device_runner import CPU, LIMITS, VOCAB, exact, model, prompts  # noqa: F401 (a fixture)

from octavo.attention.cpu import CpuAttention
from octavo.models.base import CausalLM
from octavo.protocol.plan import NewSequence, PlanRow, StepPlan
from octavo.protocol.sampling import SamplingParams
from octavo.worker.model_runner import ModelRunner
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots


def test_a_piece_of_a_prompt_stands_before_rows_that_sample(model: CausalLM) -> None:  # noqa: F811
    """Nothing is drawn of it, and the others' tokens are theirs."""
    attention = CpuAttention(2, 8, LIMITS.block_size, 1, 16, torch.float32)
    slots = Slots(LIMITS.max_num_seqs, LIMITS.max_model_len, LIMITS.block_size, CPU)
    runner = ModelRunner(model, attention, Sampler(LIMITS.max_num_seqs, VOCAB, CPU), slots)
    greedy = SamplingParams(temperature=0, seed=0)
    long, short = prompts()[4][:20], prompts()[2][:6]
    new = [
        NewSequence(0, long, len(long), [1, 2], greedy, ()),
        NewSequence(1, short, len(short), [3], greedy, ()),
    ]
    rows = [PlanRow(0, 0, 12, [], False), PlanRow(1, 0, len(short), [], True)]
    begun, drawn = runner.execute(StepPlan(0, new, rows)).rows
    assert (begun.token_ids, drawn.token_ids) == ([], exact(model, short)[:1])
    rows = [PlanRow(0, 12, 8, [], True), PlanRow(1, len(short), 1, [], True)]
    found = [row.token_ids for row in runner.execute(StepPlan(1, [], rows)).rows]
    assert found == [exact(model, long)[:1], exact(model, short)[1:2]]
