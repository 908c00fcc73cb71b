"""Plans for ZeRO, compared with what two processes of DeepSpeed hold."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.support.zero_plan_worker as worker
from foam_hf.planner.zero import zero_settings
from foam_hf.planner.zero_bytes import count_zero

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """What two processes of DeepSpeed held, by case and optimizer."""
    folder = tmp_path_factory.mktemp("zero")
    done = subprocess.run(
        [sys.executable, worker.__file__, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return torch.load(folder / "zero.pt")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", worker.OPTIMIZERS)
@pytest.mark.parametrize("case", worker.CASES)
def test_what_deepspeed_holds_is_planned_to_the_byte(measured: Any, case: str, name: str) -> None:
    zero = zero_settings(worker.config(case), worker.WORLD, False, None)
    options = f"level={worker.LEVEL}" if name == "foam" else None
    plan = count_zero(worker.model_of(case), zero, name, options)
    found = [each[f"{case}, {name}"] for each in measured]
    most = {kind: max(each[kind] for each in found) for kind in found[0]}
    assert most["weights"] == plan.weights
    if not zero.offload:
        assert (most["masters"], most["state"]) == (plan.masters, plan.state)
        return
    assert (plan.masters, plan.state) == (0, 0), "they are in host memory"
    on_gpu = count_zero(worker.model_of(case), replace(zero, offload=False), name, options)
    assert most["state"] == on_gpu.state
    assert plan.host >= most["masters"] + most["state"]
