"""The GPU harness on made-up rows: ratios the right way round, missing rows named, nothing invented."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
FACTS = {"gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "commit": "abc", "command": "x", "date": "2026-12-01"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of benchmarks/gpu as a module."""
    monkeypatch.syspath_prepend(str(GPU))

    def load_script(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load_script


def bar() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GPU / "bar.json").read_text())
    return found


def rows(better_by: float, stamp: str = "2026-12-01T10:00:00+00:00") -> list[dict[str, Any]]:
    """A row for each workload of the bar, `better_by` times as good as the peer, or 1 where there is none."""
    made: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in bar()["rows"]:
        key = (entry["section"], entry["workload"])
        row = made.setdefault(key, {"section": key[0], "workload": key[1], "stamp": stamp, **FACTS})
        peer = entry["vllm"] or 1.0
        row[entry["metric"]] = peer * better_by if entry["better"] == "higher" else peer / better_by
    return list(made.values())


def write(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def sections() -> list[str]:
    return list(dict.fromkeys(entry["section"] for entry in bar()["rows"]))


def test_the_bar_is_well_formed() -> None:
    entries = bar()["rows"]
    keys = [(entry["section"], entry["workload"], entry["metric"]) for entry in entries]
    assert len(set(keys)) == len(keys)
    for entry in entries:
        assert entry["better"] in ("lower", "higher")
        peer, limit, goal = entry["vllm"], entry["limit"], entry["goal"]
        ordered = [value for value in (limit, goal, peer) if value is not None]
        assert ordered == sorted(ordered, reverse=entry["better"] == "higher"), entry


def test_a_ratio_above_one_is_better_for_times_and_for_rates(load: Any) -> None:
    compared = load("report").compare(bar(), rows(1.5), sections())
    assert {c.better for c in compared if c.vllm} == {"lower", "higher"}
    assert [c.ratio for c in compared if c.vllm] == pytest.approx([1.5] * sum(c.vllm is not None for c in compared))
    assert all(c.ratio is None for c in compared if c.vllm is None)
    compared = load("report").compare(bar(), rows(0.5), sections())
    assert all(c.ratio == pytest.approx(0.5) for c in compared if c.vllm)
    assert not any(c.reached for c in compared if c.goal and c.vllm)


def test_the_share_of_the_limit_and_the_goal(load: Any) -> None:
    values = rows(1.0)
    next(row for row in values if row["section"] == "long")["seconds"] = 22.0
    (long,) = load("report").compare(bar(), values, ["long"])
    assert long.over(long.limit) == pytest.approx(1.0)
    assert long.reached


def test_the_latest_invocation_counts_and_the_median_of_its_repeats(load: Any) -> None:
    new = [{**row, "seconds": value} for row in rows(1) if row["section"] == "long" for value in (20, 21, 28)]
    old = [{**row, "seconds": 1, "stamp": "2026-11-30T10:00:00+00:00"} for row in new]
    (long,) = load("report").compare(bar(), new + old, ["long"])
    assert long.values == [20, 21, 28]
    assert long.value == 21


def test_every_missing_row_is_named(load: Any) -> None:
    report = load("report")
    values = [row for row in rows(1) if row["workload"] != "prefix"]
    next(row for row in values if row["workload"] == "rate-30")["itl_p90_ms"] = None
    next(row for row in values if row["section"] == "fp8" and row["workload"] == "mixed")["seconds"] = float("nan")
    with pytest.raises(report.MissingRowsError) as missing:
        report.compare(bar(), values, sections())
    assert str(missing.value).splitlines()[1:] == [
        "  offline-8b / prefix / seconds",
        "  fp8 / mixed / seconds",
        "  served / rate-30 / itl_p90_ms",
    ]


def test_rows_of_two_cards_and_unknown_sections_are_refused(load: Any) -> None:
    values = rows(1)
    values[0]["gpu"] = "NVIDIA H100 80GB HBM3"
    with pytest.raises(ValueError, match="different GPUs"):
        load("report").compare(bar(), values, sections())
    with pytest.raises(ValueError, match="sections=nothing is unknown"):
        load("report").compare(bar(), values, ["nothing"])


def test_the_text_names_machine_source_and_what_is_left_out(load: Any) -> None:
    report = load("report")
    values = [{**row, "gpu": "NVIDIA H100 80GB HBM3"} for row in rows(2.0)]
    text = report.markdown(bar(), report.compare(bar(), values, ["offline-8b"]), ["served"], "graph.png")
    assert bar()["source"] in text
    assert "not like for like" in text
    assert "Not measured here: served." in text
    assert "| s | 9.6 | 19.2 | 2.00 | 12.5 | 130% | 14.8 | yes |" in text


def test_nothing_is_written_where_a_row_is_missing(load: Any, tmp_path: Path, capsys: Any) -> None:
    report = load("report")
    path = write(tmp_path / "rows.jsonl", rows(1)[1:])
    out = tmp_path / "out"
    assert report.main(["--rows", str(path), "--out", str(out)]) == 1
    assert "offline-8b / mixed / seconds" in capsys.readouterr().err
    assert not out.exists()


def test_table_and_graph_are_written(load: Any, tmp_path: Path) -> None:
    report = load("report")
    if report.pyplot is None:
        pytest.skip("needs matplotlib")
    path = write(tmp_path / "rows.jsonl", rows(1.3))
    assert report.main(["--rows", str(path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "h200-2026-12-01.md").read_text().count("| 1.30 |") > 20
    assert (tmp_path / "h200-2026-12-01.png").read_bytes().startswith(b"\x89PNG")


def test_recorded_rows_carry_where_they_come_from(load: Any, tmp_path: Path) -> None:
    recorder, out = load("rows"), tmp_path / "a" / "rows.jsonl"
    recorder.append(out, "long", "command", [{"workload": "long", "seconds": 1.0}])
    (row,) = recorder.read(out)
    assert {"stamp", "date", "gpu", "torch", "triton", "commit"} <= row.keys()
    assert (row["section"], row["seconds"]) == ("long", 1.0)
    with pytest.raises(ValueError, match="no rows"):
        recorder.append(out, "long", "command", [])


def test_percentiles_of_a_served_row_get_names(load: Any) -> None:
    row = load("served").flat({"rate": "10.0", "ttft_ms_p50_p90_p99": [1, 2, 3], "itl_ms_p50_p90_p99": None})
    assert row == {"workload": "rate-10", "rate": "10.0", "ttft_p50_ms": 1, "ttft_p90_ms": 2, "ttft_p99_ms": 3}
    assert load("served").flat({"rate": "inf"})["workload"] == "rate-inf"


def test_idle_time_is_what_no_kernel_covers(load: Any) -> None:
    traces = load("traces")
    times = {"a": (0, 10), "b": (5, 8), "c": (10.5, 20), "d": (30, 40)}
    kernels = [traces.Kernel(name, *span) for name, span in times.items()]
    assert traces.gaps(kernels) == [0.5, 10]
    assert traces.idle_of(kernels, 2) == (40, 10, 10)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_decode_kernel", "attention"),
        ("_rms_norm_kernel", "norm"),
        ("_embed_and_rotate_kernel", "inputs"),
        ("_qk_norm_rope_write_kv_kernel", "rope+KV"),
        ("_silu_and_mul_fp8_kernel", "activation"),
        ("_best_of_split_kernel", "sampling"),
        ("nvjet_tst_128x64", "GEMM"),
        ("_dot_kernel", "GEMM"),
        ("Memcpy HtoD", "copy"),
        ("elementwise", "other"),
    ],
)
def test_kernels_are_told_by_their_names(load: Any, name: str, kind: str) -> None:
    assert load("profile_step").kind_of(name) == kind


def test_the_bytes_of_a_step(load: Any) -> None:
    config = json.loads((GPU / "models" / "llama3-8b" / "config.json").read_text())
    model = load("profile_step").ModelBytes.of(config, False, False)
    assert model.weights == 2 * (32 * (4096 * 128 * 80 + 3 * 4096 * 14336) + 4096 * 128256)
    assert model.kv_per_token == 131072


def test_the_largest_sample_after_the_first_quarter_counts(load: Any) -> None:
    memory = [(0.1, [5.0, 9.0]), (0.2, [6.0, 8.0]), (0.5, [6.5, 9.0]), (1.0, [4.0, 3.0])]
    assert load("storm").growth(memory) == [0.5, 0.0]
    assert load("storm").growth(memory[:2]) == []


@pytest.mark.parametrize(
    "script", ["checks", "storm", "host_cost", "profile_step", "report", "rows", "served", "startup"]
)
def test_scripts_import_and_print_their_help(script: str) -> None:
    command = [sys.executable, str(GPU / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert script in done.stdout


def test_run_sh_refuses_an_unknown_section(tmp_path: Path) -> None:
    command = [str(GPU / "run.sh"), "nothing"]
    environment = {"PATH": "/usr/bin:/bin", "OUT_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert "unknown section nothing" in done.stderr


def test_a_kernel_that_waits_for_others_adds_what_it_takes_beyond_them(load: Any) -> None:
    traces = load("traces")
    kernels = [traces.Kernel("product", 10, 30), traces.Kernel("norm", 12, 33), traces.Kernel("copy", 15, 20)]
    assert traces.added([*kernels, traces.Kernel("next", 34, 40)]) == [20, 3, 0, 6]
