"""The curve beside measured speed-ups, and the picture, from made-up rows."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "speculation"
GPU: dict[str, Any] = {"batch": 1, "draft": None, "fixed": True, "tokens": 5, "ms_a_token": 4.0}
KIND: dict[str, Any] = {"benchmark": "by_kind", "kind": "chat", "plain_tokens_s": 20.0, "drafts": 4}


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("plot")


def test_the_expected_speed_up(plot: Any) -> None:
    """Leviathan et al. (2023), table 1: 5 guesses at 0.8 are 3.69 tokens a step."""
    assert plot.expected(0.8, 5, 0, 0) == pytest.approx((1 - 0.8**6) / 0.2)
    assert plot.expected(0.8, 5, 0.1, 0.5) == pytest.approx((1 - 0.8**6) / 0.2 / 2)
    assert plot.expected(0, 5, 0.1, 0.5) == pytest.approx(1 / 2)
    assert plot.expected_of_best(0, 5, 0.1, 0.5) == 1  # none
    assert plot.expected_of_best(0.5, 5, 0.2, 0.0) == pytest.approx(1.5 / 1.2)  # two: 1.75 / 1.4, the same
    assert plot.costs_of([GPU | {"draft_cost": 0.2, "verify_cost": 0.3}], ["8:0.1:0.4"]) == {
        1: (0.2, 0.3),
        8: (0.1, 0.4),
    }


def test_the_picture(plot: Any, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    gpu = [GPU | {"acceptance": "none"}, GPU | {"acceptance": "0.8", "ms_a_token": 2.5, "draft": "small"}]
    kinds = [KIND | {"method": method, "tokens_a_step": 1.5, "tokens_s": 25.0} for method in ("ngram", "eagle")]
    plot.draw([*gpu, *kinds], ["1:0.2:0.1"], out)
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="batch 1 has no row of acceptance none"):
        plot.draw(gpu[1:], [], out)
    with pytest.raises(ValueError, match="no rows"):
        plot.draw([], [], out)
