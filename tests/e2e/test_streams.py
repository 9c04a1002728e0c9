"""Many streams at once through the `openai` client; some of them cut. benchmarks/streams.py takes 200."""

from __future__ import annotations

from server_process import ServerProcess
from streams import measure


async def test_all_complete_with_the_text_of_the_sequential_run(server: ServerProcess) -> None:
    row = await measure(server, num_streams=64, num_tokens=6, num_cut=16)
    assert row["completed"] == 64
    assert row["text_different"] == 0, row
    assert row["text_equal"] + row["text_tie"] == 112
    assert row["text_equal"] >= 110, row
    assert row["cut"] == 16
    assert row["kv_usage_after"] == row["kv_usage_before"]
    assert row["seconds_until_free"] < 1.0
