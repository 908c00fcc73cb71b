"""The benchmarks of INT8 weights on a CPU, at tiny sizes; and what the committed drift says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.benchmark_runs import BENCHMARKS, call, refused

pytestmark = pytest.mark.long


def test_int8_speed_measures_every_kind_of_case(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--shapes", "tiny", "--results", str(tmp_path), "--cases", "dequantize,linear"]
    printed = call("speed.int8_speed", *words)
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert {row["status"] for row in rows} == {"ok"} and all(row["ms"] > 0 for row in rows)
    assert {row["what"] for row in rows} == {"dequantize", "dequantize, no kernel", "linear, 4 tokens"}
    for row in rows:
        if row["what"].startswith("dequantize"):
            assert row["floor_bytes"] == row["parameters"] * (1 + 2 + 4 / 8)  # codes, bf16, a scale for eight
        assert f"| {row['what']} | {row['case']} | {row['ms']:.3f} |" in printed
    assert "unknown linears" in refused("speed.int8_speed", "--cases", "linears")


def test_int8_speed_times_the_update(tmp_path: Path) -> None:
    from recipes.benchmarks.speed.int8_speed import measure_update

    row, plain = (measure_update(case, "tiny", "cpu", None) for case in ("int8", "bf16"))
    assert row["parameters"] == plain["parameters"] and row["ms"] > 0 and 0 <= row["codes_changed_by_a_step"] < 1
    assert plain["floor_bytes"] - row["floor_bytes"] == pytest.approx(row["parameters"] * (2 - 4 / 8))


def test_int8_drift_compares_every_variant_with_fp32(tmp_path: Path) -> None:
    words = ["--steps", "40", "--first-steps", "20", "--results", str(tmp_path)]
    printed = call("robustness.int8_drift", *words)
    content = json.loads((tmp_path / "int8_drift.json").read_text())
    variants = {row["variant"]: row for row in content["summary"]}
    assert variants["fp32"]["loss_above_fp32"] == 0 and variants["fp32"]["slopes"] == 1
    assert abs(variants["int8"]["norm_ratios"] - 1) < 0.01
    assert all(row["variant"] in printed for row in content["rows"])


def test_ten_thousand_further_steps_do_not_drift() -> None:
    content = json.loads((BENCHMARKS / "results" / "int8_drift.json").read_text())
    assert content["settings"]["steps"] == 10_000
    variants = {row["variant"]: row for row in content["summary"]}
    int8, nearest = variants["int8"], variants["int8, rounded to nearest"]
    assert abs(int8["slopes"] - 1) < 0.01 and abs(int8["norm_ratios"] - 1) < 0.02
    assert int8["loss_above_fp32"] < 0.02 < nearest["loss_above_fp32"]
    from recipes.benchmarks.robustness.int8_drift import table

    assert table(content["summary"]) in (BENCHMARKS / "README.md").read_text(encoding="utf-8")
