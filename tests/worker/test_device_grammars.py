"""Grammars over the GPU's runner, two steps in flight, its kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("triton")

from test_device_runner import VOCAB, Rig, model, prompts

from octavo.models.base import CausalLM
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.protocol.structured import StructuredOutputsParams

__all__ = ["model"]  # the fixture
WISH = StructuredOutputsParams(regex="a")
EOS = 96


class Counter:
    """Lets token number n of the output be 10 n .. 10 n + 2, and its end come after the fourth."""

    def __init__(self) -> None:
        self.num_accepted = 0
        self.last = 0

    def masks(self, draft_ids: Sequence[int]) -> list[bytes | None]:  # noqa: ARG002
        """The next token depends on the last: it has the same last digit, or the one after."""
        low = 10 * self.num_accepted + (self.last % 10 if self.num_accepted else 0)
        allowed = {low, low + 1} if self.num_accepted < 4 else {EOS}
        return [bytes(sum(1 << i for i in range(8) if 8 * at + i in allowed) for at in range(-(-VOCAB // 8)))]

    error: str | None = None
    num_free = 0

    def accept(self, token_ids: Iterable[int]) -> None:
        for token in token_ids:
            self.num_accepted, self.last = self.num_accepted + 1, token


class Cut:
    """Lets two tokens come as they like, then 7, then any again."""

    error: str | None = None

    def __init__(self) -> None:
        self.num_accepted = 0

    @property
    def num_free(self) -> int:
        return 2 - self.num_accepted if self.num_accepted < 3 else 100

    def masks(self, draft_ids: Sequence[int]) -> list[bytes | None]:  # noqa: ARG002
        return [bytes(1 << 7 if at == 0 else 0 for at in range(-(-VOCAB // 8))) if self.num_accepted == 2 else None]

    def accept(self, token_ids: Iterable[int]) -> None:
        self.num_accepted += len(list(token_ids))


def run(rig: Rig, wishes: list[dict[str, Any]]) -> list[list[TokenOutput]]:
    told: dict[str, list[TokenOutput]] = {str(i): [] for i in range(len(wishes))}
    for index, (prompt, wish) in enumerate(zip(prompts(), wishes)):
        bound = wish.pop("bound", True)
        sampling = SamplingParams(seed=index, max_tokens=7, structured_outputs=WISH if bound else None, **wish)
        request = Request(
            request_id=str(index), prompt_token_ids=prompt, sampling=sampling, max_tokens=7, eos_token_ids=(EOS,)
        )
        rig.engine._scheduler.add(request, Counter() if bound else None)
    while rig.engine.has_work:
        for output in rig.engine.step():
            told[output.request_id].append(output)
    rig.engine.audit()
    return list(told.values())


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


@pytest.mark.parametrize("num_blocks", [20, 5])
def test_each_token_is_drawn_under_the_mask_of_those_before_it(model: CausalLM, num_blocks: int) -> None:
    rig = Rig(model, attention="torch", depth=2, num_blocks=num_blocks)
    told = run(rig, [{}, {"bound": False, "ignore_eos": True}, {"temperature": 0.0, "logprobs": 2}])
    assert [len(tokens(own)) for own in told] == [5, 7, 5]
    for own in (told[0], told[2]):
        found = tokens(own)
        assert found[4:] == [EOS]
        assert [token // 10 for token in found[:4]] == [0, 1, 2, 3]
        digits = [token % 10 for token in found[:4]]
        assert all(after - before in (0, 1) for before, after in pairwise(digits))
        assert (own[-1].finish_reason, own[-1].stop_reason) == ("stop", None)


@pytest.mark.parametrize("num_blocks", [20, 5])
def test_one_forced_token_amid_free_ones(model: CausalLM, num_blocks: int) -> None:
    rig = Rig(model, attention="torch", depth=2, num_blocks=num_blocks)
    told: dict[str, list[int]] = {"free": [], "cut": [], "other": []}
    for name, prompt in zip(told, (prompts()[0], prompts()[0], prompts()[1])):
        sampling = SamplingParams(seed=0, max_tokens=7, thinking_token_budget=2, ignore_eos=True)
        request = Request(
            request_id=name, prompt_token_ids=prompt, sampling=sampling, max_tokens=7, eos_token_ids=(EOS,)
        )
        rig.engine._scheduler.add(request, None if name == "free" else Cut())
    while rig.engine.has_work:
        for output in rig.engine.step():
            told[output.request_id] += output.new_token_ids
    rig.engine.audit()
    assert all(len(tokens) == 7 for tokens in told.values())
    assert told["cut"][:2] == told["free"][:2]
    assert (told["cut"][2], told["other"][2]) == (7, 7)
    assert told["free"][2] != 7
    assert told["cut"][3:] != [7] * 4
