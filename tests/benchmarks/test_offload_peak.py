"""offload_peak.py: a case on a CPU, and what the report makes of cases on a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recipes.benchmarks.memory import offload_report
from recipes.benchmarks.speed import report
from tests.support.benchmark_runs import call

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]


def test_the_report_judges_weights_in_host_memory(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--steps", "1", "--results", str(tmp_path), "--cases", "8gb-offload"]
    call("memory.offload_peak", *words)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    (row,) = content["rows"]
    assert row["status"] == "ok" and row["layers"] == 2 and 0 < row["host_bytes"] < row["host_peak_bytes"]
    assert not offload_report.targets(content)  # no peak on a CPU
    gib, bus = 2**30, {"to_device": 50.0, "to_host": 50.0, "each_of_both": 40.0}
    measured = {**row, "peak_bytes": 5 * gib, "peak_reserved_bytes": 6 * gib, "host_bytes": 8e9, "bus_GBps": bus}
    cases = {
        "8gb-offload": {},
        "offload": {"sequence": 2048, "tokens_per_s": 90, "ms": 1000},
        "resident": {"sequence": 2048, "tokens_per_s": 100, "ms": 900, "host_bytes": None, "bus_GBps": {}},
        "offload4": {"sequence": 2048, "batch": 4, "tokens_per_s": 85, "ms": 5000},
        "resident4": {
            "sequence": 2048,
            "batch": 4,
            "tokens_per_s": 100,
            "ms": 700,
            "host_bytes": None,
            "bus_GBps": {},
        },
    }
    rows = [{**measured, "case": name, **numbers} for name, numbers in cases.items()]
    text = report.section([{**content, "rows": rows}])
    assert "| tiny | 4 x 2048 | 7.30 | 5.00 | 6.00 | 8.00 |" in text and "| 50, 50, 40 |" in text
    assert text.splitlines()[-4:] == [
        "| 8 B on an 8 GB card: peak, loading included, GiB | <= 7.3 | 5.00 | yes |",
        "| the same: host memory of the weights, GB | <= 12 | 8.00 | yes |",
        "| 1 x 2048 tokens (the bus is hidden): tokens a second over the resident run's | >= 0.9 | 0.90 | yes |",
        "| 4 x 2048 tokens (the bus is not hidden in the forward pass): tokens a second over the resident run's "
        "|  | 0.85 |  |",
    ]


def test_the_pages_quote_what_was_measured() -> None:
    (path,) = (ROOT / "recipes" / "benchmarks" / "results").glob("offload_peak-*.json")
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    small, large = rows["6gb-offload"], rows["12gb-14b-offload"]
    ratios = [rows[case]["tokens_per_s"] / rows[other]["tokens_per_s"] for case, other in offload_report.PAIRS.items()]
    words = " ".join((ROOT / "docs" / "int8.md").read_text().split())
    quoted = re.search(
        r"all of them trained, took (\S+) GiB at the peak .* than (\S+) GiB could .* and (\S+) GB of host memory; "
        r".* shapes (\S+) GiB and (\S+) GB\. .* 8 B trained at (\S+) of the speed .* it is not, at (\S+)\. `foam",
        words,
    )
    sizes = [small["peak_bytes"] / 2**30, small["limit_bytes"] / 2**30, small["host_bytes"] / 1e9]
    sizes += [large["peak_bytes"] / 2**30, large["host_bytes"] / 1e9, ratios[1], ratios[0]]
    assert quoted and [*quoted.groups()] == [f"{size:.2f}" for size in sizes]
    assert f"of {sizes[0]:.2f} GiB with the weights in {sizes[2]:.2f} GB of host memory" in " ".join(
        (ROOT / "README.md").read_text().split()
    )
