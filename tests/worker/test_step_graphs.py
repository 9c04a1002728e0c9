"""When steps are recorded, with a stand-in for the recording itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from octavo.worker import cuda_graphs
from octavo.worker.cuda_graphs import StepGraphs
from octavo.worker.graph_sizes import GraphSize
from octavo.worker.step_buffers import StepShape

MIXED = GraphSize(256, 64)
MOST_PROMPTS = 32


class Graphs(StepGraphs):
    """As many prefill items as prompts. captured: what was recorded; num_free: how often there is memory for it."""

    def __init__(self) -> None:
        super().__init__(Mock(), Mock(), lambda rows, _: (rows, rows), (256, 1024), False)
        self.captured: list[StepShape] = []
        self.num_free = 2

    def _capture(self, shape: StepShape) -> Any:
        if len(self.captured) == self.num_free:
            raise torch.OutOfMemoryError
        self.captured.append(shape)
        nothing = torch.empty(0)
        return None, SimpleNamespace(last=nothing, hidden=None, logits=nothing, features=None)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(cuda_graphs, "borrowed", lambda tensor: tensor)
    return Graphs()


def test_a_step_that_a_graph_has_no_room_for_does_not_record_it(graphs: Graphs) -> None:
    size = graphs.size_of(200, 60)
    assert size == MIXED
    assert graphs.find(size, MOST_PROMPTS + 1) is None
    assert not graphs.captured
    graph = graphs.find(size, MOST_PROMPTS)
    assert graph is not None
    assert [(shape.num_tokens, shape.num_prefill_items) for shape in graphs.captured] == [(256, MOST_PROMPTS)]
    assert graphs.find(size, 1) is graph
    assert graphs.find(size, MOST_PROMPTS + 1) is None
    assert len(graphs.captured) == graphs.num_recorded == 1


def test_without_memory_for_graphs_steps_are_padded_only_to_those_there_are(graphs: Graphs) -> None:
    graphs.num_free = 1
    kept = graphs.find(MIXED, 1)
    assert kept is not None
    assert graphs.size_of(64, 64) == (64, 64, False)
    assert graphs.find(GraphSize(64, 64), 0) is None
    assert graphs.size_of(64, 64) is None
    assert graphs.find(MIXED, 1) is kept
    assert graphs.size_of(200, 60) == MIXED
    assert graphs.size_of(10_000, 60) is None
