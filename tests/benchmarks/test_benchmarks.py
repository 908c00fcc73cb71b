"""recipes/benchmarks on a CPU, with tiny shapes: real processes, real optimizers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from foam_hf.memory import state_bytes
from recipes.benchmarks.common.cases import CASES, SHAPES, make_weights
from recipes.benchmarks.common.harness import run_alone
from recipes.benchmarks.speed import report
from recipes.benchmarks.speed.step_speed import floor_bytes, move_gradients, refresh_ms
from tests.support.benchmark_runs import BENCHMARKS, call, refused, run, start_server

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """What a case imports is imported once, for all of them."""
    start_server()


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> tuple[Path, dict, str]:
    """A real run of step_speed.py: its JSON file, what it holds, what was printed."""
    folder = tmp_path_factory.mktemp("results")
    names = "foam,foam-nearest,adamw-foreach,flash"
    words = [
        "--device",
        "cpu",
        "--shapes",
        "tiny",
        "--dtypes",
        "bf16",
        "--optimizers",
        names,
        "--results",
        str(folder),
    ]
    printed = call("speed.step_speed", *words)
    (path,) = folder.iterdir()
    assert path.name.startswith("step_speed-")
    return path, json.loads(path.read_text()), printed


def test_step_speed_measures_every_optimizer_or_says_why_not(steps) -> None:
    _, content, printed = steps
    rows = {row["optimizer"]: row for row in content["rows"]}
    assert list(rows) == ["foam", "foam-nearest", "adamw-foreach", "flash"]
    for name in ("foam", "foam-nearest", "adamw-foreach"):
        row = rows[name]
        assert row["status"] == "ok" and row["ms"] > 0 and row["ms_moved_gradients"] > 0 and row["host_ms"] > 0
        assert row["floor_ratio"] == pytest.approx(
            row["ms"] * content["machine"]["copy_GBps"] * 1e6 / row["floor_bytes"]
        )
        assert f"| {row['label']} | {row['ms']:.3f} |" in printed
    assert rows["adamw-foreach"]["state_bytes_per_param"] == pytest.approx(4, rel=0.01)  # two moments in bf16
    assert rows["flash"]["status"] in ("missing", "failed")  # not installed, or no CUDA device
    assert f"{rows['flash']['label']}: {rows['flash']['status']}. {rows['flash']['reason']}" in printed


def test_a_run_goes_on_where_it_was_cut_off(steps, tmp_path: Path) -> None:
    path, content, _ = steps
    partial = tmp_path / path.name
    kept = [row for row in content["rows"] if row["optimizer"] != "foam"]
    partial.write_text(json.dumps({**content, "rows": kept}))
    words = ["--device", "cpu", "--shapes", "tiny", "--dtypes", "bf16", "--optimizers", "foam,adamw-foreach"]
    said = call("speed.step_speed", *words, "--results", str(tmp_path), "--resume", "--budget-s", "-1")
    assert "1 of 1 cases were not run" in said
    assert json.loads(partial.read_text())["rows"] == kept
    call("speed.step_speed", *words, "--results", str(tmp_path), "--resume")
    *rest, last = json.loads(partial.read_text())["rows"]
    assert rest == kept and (last["optimizer"], last["status"]) == ("foam", "ok")


def test_unknown_names_are_errors_that_list_the_known() -> None:
    for script, option, known in [
        ("speed.step_speed", "shapes", "llama-7b"),
        ("speed.training_speed", "models", "llama-7b"),
        ("memory.memory_peak", "cases", "8b-int8-release"),
    ]:
        message = refused(script, f"--{option}", "llama-8b")
        assert "unknown llama-8b" in message and known in message


def out_of_memory() -> dict:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_package() -> dict:
    import no_such_package

    return {"is": no_such_package}


def crash() -> dict:
    print("the last words", flush=True)
    os._exit(3)


def wrong() -> dict:
    raise ValueError("all wrong")


def forever() -> dict:
    time.sleep(100)
    return {}


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        (out_of_memory, "does not fit", "CUDA out of memory"),
        (no_package, "missing", "no_such_package"),
        (crash, "failed", "code 3 the last words"),
        (wrong, "failed", "all wrong"),
        (forever, "failed", "more than"),
    ],
)
def test_what_goes_wrong_in_a_case_becomes_its_row(function, status: str, reason: str) -> None:
    row = run_alone(function, timeout=60 if function is not forever else 2)
    assert row["status"] == status and reason in row["reason"]


INSTALLED = [name for name in CASES if name not in ("flash", "flash-24", "torchao", "adam-mini", "gefen-x")]


@pytest.mark.parametrize("name", INSTALLED)
def test_every_optimizer_steps_every_weight(name: str) -> None:
    weights = make_weights("tiny", torch.float32, "cpu")
    before = {key: p.detach().clone() for key, p in weights.named.items()}
    optimizers = CASES[name].build(weights)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
    assert [key for key, p in weights.named.items() if torch.equal(p, before[key])] == []


@pytest.mark.parametrize(
    ("name", "dtype", "bytes_per_parameter"),
    [
        ("foam", torch.bfloat16, 6 + 16 / 256),
        ("foam-2", torch.bfloat16, 6 + 16 / 4),
        ("foam-row", torch.float32, 12 + 16 / 768),
        ("foam-0", torch.bfloat16, 6 + 16),
        ("foam-factored", torch.float32, 12 + 8 / 256 + 8 / 768 + 8 / 768),
        ("adamw-foreach", torch.bfloat16, 14),
        ("adamw-foreach", torch.float32, 28),
    ],
)
def test_the_floor_counts_each_byte_that_must_move_once(name: str, dtype: torch.dtype, bytes_per_parameter) -> None:
    weights = make_weights("tiny", dtype, "cpu")
    p = torch.nn.Parameter(torch.ones(768, 768, dtype=dtype))
    p.grad = torch.ones_like(p)
    weights.named = {"matrix": p}
    (optimizer,) = CASES[name].build(weights)
    optimizer.step()
    assert floor_bytes(weights, state_bytes(optimizer)) / p.numel() == pytest.approx(bytes_per_parameter, abs=1e-4)


@pytest.mark.parametrize(
    ("shapes", "matrices", "parameters"),
    [
        ("llama-7b", 56, 1.619e9),
        ("roberta-base", 72, 85.1e6),
        ("roberta-base-full", 72, 124.1e6),
        ("qwen2.5-0.5b", 168, 494.0e6),
    ],
)
def test_the_shapes_are_those_of_the_models(shapes: str, matrices: int, parameters: float) -> None:
    weights = make_weights(shapes, torch.bfloat16, "meta")
    assert len(weights.matrices) == matrices
    assert sum(p.numel() for p in weights.named.values()) == pytest.approx(parameters, rel=1e-3)
    assert len(weights.matrices) + len(weights.rest) == len(weights.named)
    assert set(SHAPES) >= {shapes}


def test_moved_gradients_are_the_same_set_at_other_weights() -> None:
    weights = make_weights("tiny", torch.float32, "cpu")
    before = {name: p.grad.data_ptr() for name, p in weights.named.items()}
    move_gradients(weights)
    after = {name: p.grad.data_ptr() for name, p in weights.named.items()}
    assert set(after.values()) == set(before.values())
    assert [name for name in before if before[name] == after[name]] == ["embed_tokens.weight"]  # one of its shape
    assert all(p.grad.shape == p.shape for p in weights.named.values())


def test_the_refresh_of_a_projection_is_measured() -> None:
    weights = make_weights("tiny", torch.float32, "cpu")
    assert refresh_ms("galore", weights, "cpu") > 0


def test_optimizers_take_turns_on_a_cpu(tmp_path: Path) -> None:
    words = ["--shapes", "tiny", "--optimizers", "foam,adamw-foreach", "--rounds", "3", "--threads", "1"]
    printed = run("speed.cpu_step", *words, "--results", str(tmp_path)).stdout  # as a user's command
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    rows = {row["optimizer"]: row for row in content["rows"]}
    assert content["machine"]["name"].endswith("1 threads") and list(rows) == ["foam", "adamw-foreach"]
    assert all(0 < row["ms_least"] <= row["ms"] and row["rounds"] == 3 for row in rows.values())
    assert all(row["label"] in printed and row["label"] in report.section([content]) for row in rows.values())
    assert "expected at least 1" in refused("speed.cpu_step", "--rounds", "0")


def test_the_hosts_part_of_a_step_is_measured_with_gradients_that_stay_and_that_move(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--cases", "5", "--optimizers", "foam,adamw-fused", "--repeats", "2", "--label", "a"]
    printed = call("speed.host_speed", *words, "--results", str(tmp_path))
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["optimizer"], row["moved_gradients"]) for row in rows] == [
        (name, moved) for name in ("foam", "adamw-fused") for moved in (False, True)
    ]
    assert all(row["status"] == "ok" and row["label"] == "a" and row["parameters"] == 5 for row in rows), printed
    assert all(0 < row["host_ms_least"] <= row["host_ms"] and row["wall_ms"] > 0 for row in rows)
    for wrong in (["--cases", "bert"], ["--cases", "1"], ["--optimizers", "sgd"], ["--repeats", "0"]):
        assert "expected" in refused("speed.host_speed", *wrong)


def test_training_speed_runs_a_trainer(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--models", "tiny", "--sequences", "16", "--steps", "2", "--results", str(tmp_path)]
    printed = call("speed.training_speed", *words, "--optimizers", "foam,adamw-fused")
    (path,) = tmp_path.iterdir()
    foam, adamw = json.loads(path.read_text())["rows"]
    assert (foam["optimizer"], foam["status"], adamw["status"]) == ("foam", "ok", "ok"), foam.get("reason")
    assert adamw["state_bytes"] == pytest.approx(4 * adamw["parameters"], rel=0.01)  # bf16 weights, bf16 moments
    assert foam["tokens_per_s"] == pytest.approx(4 * 16 * 1000 / foam["ms"])
    assert 0 < foam["optimizer_share"] < 1
    assert f"| {foam['label']} | {foam['tokens_per_s']:.0f} |" in printed


def test_memory_peak_runs_a_trainer_for_every_kind_of_case(tmp_path: Path) -> None:
    cases = "ladder-adamw-mixed,ladder-release,8b-int8-loaded,glue-release"
    words = ["--device", "cpu", "--tiny", "--steps", "1", "--results", str(tmp_path), "--cases", cases]
    printed = call("memory.memory_peak", *words)
    (path,) = tmp_path.iterdir()
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == cases.split(",") and {row["status"] for row in rows.values()} == {"ok"}, printed
    for name, weights, gradients, state in [
        ("ladder-adamw-mixed", 4, 4, 8),
        ("ladder-release", 2, 0, 16 / 64),  # its widest block has 64 columns here
        ("8b-int8-loaded", 1.1, 0, 16 / 64),  # its embedding and LM head are in bf16
        ("glue-release", 4, 0, 16 / 64),
    ]:
        row = rows[name]
        held = [row[f"{part}_bytes"] / row["parameters"] for part in ("weights", "gradients", "state")]
        assert held == pytest.approx([weights, gradients, state], rel=0.05, abs=0.35), name
        assert f"| {row['label']} | {held[0]:.2f} | {held[1]:.2f} | {held[2]:.2f} | {sum(held):.2f} |" in printed
        assert row["peak_bytes"] is None and row["tokens_per_s"] > 0


def test_the_report_judges_peaks_and_draws_them(tmp_path: Path) -> None:
    gib = 2**30

    def row(case: str, model: str, peak: float, speed: float = 100.0, **sizes: float) -> dict:
        held = {f"{part}_bytes": int(sizes.get(part, 1) * gib) for part in ("weights", "gradients", "state")}
        peaks = {f"{kind}_bytes": int(peak * gib) for kind in ("loading_peak", "peak", "peak_reserved")}
        key = {"case": case, "model": model, "sequence": 512, "batch": 1, "label": case, "status": "ok"}
        return {**key, **held, **peaks, "limit_bytes": 12 * gib, "parameters": gib, "tokens_per_s": speed}

    failed = {"case": "8b-int8-release-liger", "model": "llama-3.1-8b", "sequence": 512, "batch": 1, "label": "Liger"}
    content = {
        "benchmark": "memory_peak",
        "machine": {"name": "Abacus", "date": "today"},
        "rows": [
            row("8b-int8-release", "llama-3.1-8b", 10.5),
            {**failed, "status": "missing", "reason": "no liger_kernel"},
            row("7b-bf16-release", "llama-7b", 15.5, weights=13),
            row("speed-adamw", "llama-3.1-8b", 70),
            row("speed-int8-release", "llama-3.1-8b", 11, speed=80),
            {**row("speed4-adamw", "llama-3.1-8b", 72), "batch": 4},
            {**row("speed4-int8-release", "llama-3.1-8b", 13, speed=90), "batch": 4},
            row("ladder-release", "llama-1.1b", 3.5, gradients=0),
            row("ladder-adamw", "llama-1.1b", 9.5, state=4),
        ],
    }
    text = report.section([content])
    assert "results/memory_peak.png" in text and "Liger: missing. no liger_kernel" in text
    assert text.splitlines()[-5:] == [
        "| --- | ---: | ---: | ---: |",
        "| llama-3.1-8b, 8b-int8-release: peak, loading included, GiB; no more could be allocated "
        "| <= 12.00 | 10.50 | yes |",
        "| llama-7b, 7b-bf16-release: peak above the weights, GiB | <= 2 | 2.50 | no |",
        "| llama-3.1-8b, speed-int8-release: tokens a second / those of speed-adamw | >= 0.85 | 0.80 | no |",
        "| llama-3.1-8b, speed4-int8-release: tokens a second / those of speed4-adamw, 4 sequences a step "
        "| >= 0.85 | 0.90 | yes |",
    ]
    assert "| ladder-adamw | 1.00 | 1.00 | 4.00 | 6.00 | 9.50 | 9.50 | 9.50 | 100 |" in text
    assert report.memory_picture([content], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not report.memory_picture([{**content, "rows": content["rows"][:3]}], tmp_path / "none.png")


def test_report_writes_the_tables_between_its_markers(steps, tmp_path: Path) -> None:
    path, content, _ = steps
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    words = ["--results", str(path.parent), "--readme", str(readme)]
    refused("speed.report", *words, "--check")
    call("speed.report", *words)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert all(row["label"] in text for row in content["rows"])
    call("speed.report", *words, "--check")


def test_report_judges_the_budget_and_draws(tmp_path: Path) -> None:
    def row(shapes: str, dtype: str, name: str, ms: float, ratio: float) -> dict:
        numbers = {"ms": ms, "floor_ratio": ratio, "state_bytes_per_param": 0.03}
        return {"shapes": shapes, "dtype": dtype, "optimizer": name, "label": name, "status": "ok", **numbers}

    content = {
        "benchmark": "step_speed",
        "machine": {"name": "Abacus"},
        "rows": [
            row("llama-7b", "bf16", "foam-nearest", 3.3, 1.02),
            row("llama-7b", "bf16", "foam", 3.6, 1.11),
            row("roberta-base", "fp32", "foam", 0.4, 1.14),
            row("roberta-base", "fp32", "adamw-fused", 1.6, 1.3),
        ],
    }
    assert report.budget(content).splitlines()[2:] == [
        "| llama-7b bf16, foam-nearest: ms / its floor | 1.05 | 1.020 | yes |",
        "| llama-7b bf16, foam: ms / ms of foam-nearest | 1.05 | 1.091 | no |",
        "| roberta-base fp32, foam: ms / its floor | 1.15 | 1.140 | yes |",
        "| roberta-base fp32, foam: ms / ms of adamw-fused | 0.286 | 0.250 | yes |",
    ]
    assert report.picture([content], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_holds_what_the_committed_results_say() -> None:
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert report.renewed(readme, report.section(report.read(BENCHMARKS / "results"))) == readme
