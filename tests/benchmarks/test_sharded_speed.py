"""sharded_speed.py on a CPU with a tiny model: real groups of processes over gloo, also such that fail or hang."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from recipes.benchmarks.common.groups import run_group
from recipes.benchmarks.common.report_parts import sharded_table
from tests.support.benchmark_runs import call, refused, start_server

pytestmark = [pytest.mark.long, pytest.mark.slow]
TINY = ["--device", "cpu", "--model", "tiny", "--layers", "2", "--sequence", "16", "--steps", "1", "--case-s", "200"]


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """What a case imports is imported once, for all of them."""
    start_server()


def test_engines_are_measured_by_groups_of_processes(tmp_path: Path) -> None:
    names = "fsdp2-foam,fsdp2-adamw,zero2-foam,fsdp2-int8-release"
    printed = call("speed.sharded_speed", *TINY, "--cases", names, "--gpus", "2", "--results", str(tmp_path))
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    rows = {(row["case"], row["gpus"]): row for row in content["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}, content["rows"]
    assert [name for name, _ in rows] == names.split(",")
    foam, adamw = rows["fsdp2-foam", 2], rows["fsdp2-adamw", 2]
    assert adamw["state_bytes_per_gpu"] == pytest.approx(2 * adamw["parameters"], rel=0.05)  # half of bf16 moments
    assert foam["state_bytes_per_gpu"] < adamw["state_bytes_per_gpu"] / 10
    assert foam["tokens_per_s"] == pytest.approx(2 * 4 * 16 * 1000 / foam["ms"])
    assert 0 < foam["optimizer_ms"] < foam["ms"] and rows["zero2-foam", 2]["optimizer_ms"] > 0
    assert rows["fsdp2-int8-release", 2]["optimizer_ms"] is None  # the backward pass has it
    assert f"| {foam['label']} | 2 | {foam['optimizer_ms']:.3f} |" in printed


def test_what_failed_is_below_the_table_and_scaling_is_that_of_the_same_case() -> None:
    key = {"model": "llama-7b", "layers": 8, "sequence": 2048, "batch": 4}
    numbers = {"ms": 10.0, "optimizer_ms": 1.0, "state_bytes_per_gpu": 10**9, "peak_bytes_per_gpu": 2 * 10**9}
    rows = [
        {
            **key,
            "case": "a",
            "gpus": 2,
            "label": "A",
            "status": "ok",
            "tokens_per_s": 30.0,
            "parameters": 1e9,
            **numbers,
        },
        {
            **key,
            "case": "a",
            "gpus": 1,
            "label": "A",
            "status": "ok",
            "tokens_per_s": 20.0,
            "parameters": 1e9,
            **numbers,
        },
        {**key, "case": "b", "gpus": 2, "label": "B", "status": "does not fit", "reason": "out of memory"},
    ]
    text = sharded_table(rows)
    assert "| A | 2 | 1.000 | 10.0 | 30 | 1.50 | 1.00 | 2.00 |" in text
    assert text.endswith("* B, 2 GPUs: does not fit. out of memory")


def test_a_process_that_fails_ends_its_group_and_tells_why() -> None:
    row = run_group(fail_on_the_second, world=2, device="cpu", timeout=60)
    assert row["status"] == "failed" and "the second process has no luck" in row["reason"]
    row = run_group(die_on_the_second, world=2, device="cpu", timeout=60)
    assert row["status"] == "failed" and "process 1 ended with code 3" in row["reason"]
    row = run_group(kill_the_second, world=2, device="cpu", timeout=60)
    assert row["status"] == "failed" and "process 1 ended with code -9" in row["reason"]
    row = run_group(fail_after_the_second, world=2, device="cpu", timeout=60)
    assert row["status"] == "missing" and "no such package" in row["reason"]


def test_a_group_that_hangs_is_ended() -> None:
    row = run_group(time.sleep, 600, world=2, device="cpu", timeout=1)
    assert row["status"] == "failed" and "took too long" in row["reason"]
    assert "unknown no-case; expected some of" in refused("speed.sharded_speed", "--cases", "no-case")
    for number in ("3", "0", "two", ""):
        assert f"no case for {number}; expected some of 1, 2, 4, 8" in refused("speed.sharded_speed", "--gpus", number)


def fail_on_the_second() -> dict:
    if os.environ["RANK"] == "1":
        raise RuntimeError("the second process has no luck")
    time.sleep(600)
    return {}


def die_on_the_second() -> dict:
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(600)
    return {}


def kill_the_second() -> dict:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    return {}


def fail_after_the_second() -> dict:
    """As over gloo, where the first process fails because the second one has."""
    if os.environ["RANK"] == "1":
        raise ImportError("no such package")
    time.sleep(1)
    raise RuntimeError("Connection closed by peer")
