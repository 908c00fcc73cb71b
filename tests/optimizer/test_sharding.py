"""DDP and FSDP2 in real processes over gloo: the weights of one process, step by step, and checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch import Tensor

import tests.support.sharding_trainer_worker as worker
from tests.support.tolerances import TOLERANCES, assert_within

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the runs of 2, then 1, then 4 processes found; each continues a checkpoint of the one before."""
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, worker.__file__, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "USE_TF": "0"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return {world: torch.load(folder / f"results{world}.pt") for world in (2, 1, 4)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, list[Tensor]]:
    folder = tmp_path_factory.mktemp("alone")
    return {dtype: worker.run(folder, dtype=dtype, max_steps=worker.STEPS)[1] for dtype in DTYPES}


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    assert [i for i, pair in enumerate(zip(actual, expected, strict=True)) if not torch.equal(*pair)] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", ["2 ddp", "2 fsdp", "4 fsdp"])
def test_every_step_has_the_bits_of_one_process(runs: Any, alone: Any, run: str, dtype: torch.dtype) -> None:
    """With equal batches the means of gradients are exact, so nothing else may differ, random bits included."""
    world, kind = run.split()
    found = runs[int(world)][f"{kind} {dtype}"]
    assert len(found) == worker.steps_of(kind, dtype, int(world))
    assert_same_bits(found, alone[dtype][: len(found)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_muons_matrices_have_the_bits_of_one_process(runs: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    """Embedding and head are plain; after a checkpoint of 2, then 1, then 4 processes too."""
    expected = worker.run(tmp_path, dtype=dtype, max_steps=worker.MUON_STEPS, **worker.MUON)[1]
    assert_same_bits(runs[2][f"muon {dtype}"], expected)
    assert_same_bits(runs[4][f"muon {dtype}"], expected[: worker.SHORT])
    if dtype == torch.float32:
        assert_same_bits(runs[4]["resumed muon"], expected[8:12])


@pytest.mark.parametrize("name", ["sharded", "full"])
def test_checkpoints_go_on_exactly_in_2_then_1_then_4_processes(runs: Any, alone: Any, name: str) -> None:
    assert_same_bits(runs[4][f"resumed {name}"], alone[torch.float32][8:12])


def test_a_default_run_goes_on_in_2_then_1_then_4_processes_within_rounding(runs: Any, tmp_path: Path) -> None:
    expected = worker.run(tmp_path, max_steps=12, optim_args=worker.DEFAULT)[1][8:]
    for mine, theirs in zip(runs[4]["resumed default"], expected, strict=True):
        assert_within(mine, theirs, "factored embeddings under FSDP2 against one process, 12 steps")


@pytest.mark.parametrize("name", worker.FEATURES)
def test_features_follow_one_process(runs: Any, tmp_path: Path, name: str) -> None:
    expected = worker.feature(tmp_path, name)
    factored = name.startswith("default")  # embedding and head, as with Muon
    if name in ("clipping", "factored", "muon") or factored:  # sums in another order
        case = "factored embeddings under FSDP2 against one process, 3 steps"
        for mine, theirs in zip(runs[2][name], expected, strict=True):
            assert_within(mine, theirs, case if factored else "FSDP2 against one process, sums over ranks")
    else:
        assert_same_bits(runs[2][name], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_batches_on_each_rank_follow_the_whole_batch(
    runs: Any, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "BATCH", 2 * worker.BATCH)
    expected = worker.run(tmp_path, dtype=dtype, max_steps=worker.OTHER)[1]
    for mine, theirs in zip(runs[2][f"other data {dtype}"], expected, strict=True):
        assert_within(mine, theirs, f"FSDP2 against one process, 20 steps, {dtype}")


def test_mixed_precision_keeps_float32_weights_and_half_of_the_state(runs: Any) -> None:
    found = runs[2]["mixed"]
    steps = found["steps"]
    assert steps[0].dtype == torch.float32 and all(step.isfinite().all() for step in steps)
    assert not torch.equal(steps[0], steps[-1])
    assert found["measured"] == found["expected"] == found["whole"] // 2


def test_factored_means_over_ranks_are_within_rounding(runs: Any) -> None:
    for world in (2, 4):
        for kind, error in runs[world]["worst"].items():
            assert kind.startswith("factored")  # the block rule is compared by bits, by every rank
            bfloat16 = kind.endswith("bfloat16")
            case = f"factored over ranks, 3 steps, {'bfloat16' if bfloat16 else 'float32'} state"
            assert error <= TOLERANCES[case].allowed, (world, kind, error)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), *((f"zero{stage}", "DEEPSPEED") for stage in (1, 2, 3))],
)
def test_accelerate_knows_every_key_of_the_configs(name: str, kind: str) -> None:
    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # raises for unknown keys
    assert config.distributed_type == kind
    options = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= options
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2 and config.fsdp_config["fsdp_offload_params"] is False
