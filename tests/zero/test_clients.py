"""ZeRO as users start it: the configs of recipes/accelerate, and TRL with the configs that it ships."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tests.support.zero_client_worker as worker
from tests.support.tiny_models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clients")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", worker.__file__, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return path


@pytest.mark.parametrize("name", ["recipe 1", "recipe 2", "recipe 3", "trl 2", "trl 3"])
def test_a_config_trains_by_foam_and_the_model_is_whole(folder: Path, name: str) -> None:
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())[name]
    assert found["optimizer"] == "FOAM" and found["stage"] == int(name[-1])
    assert found["dtype"] == "torch.bfloat16"
    assert len(found["losses"]) == worker.STEPS and all(map(math.isfinite, found["losses"]))
    saved, before = load_file(folder / name / "model.safetensors"), tiny_llama().state_dict()
    assert saved.keys() == before.keys()
    for key, weight in before.items():
        assert saved[key].shape == weight.shape and bool(saved[key].isfinite().all())
    assert not torch.equal(saved["lm_head.weight"].float(), before["lm_head.weight"])


def test_stages_agree(folder: Path) -> None:
    """They add up the same gradients; only the order of a norm's sum differs."""
    found = json.loads((folder / "found.json").read_text())
    for other in ("recipe 2", "recipe 3"):
        assert found["recipe 1"]["losses"] == pytest.approx(found[other]["losses"], abs=0.01)
    assert found["trl 2"]["losses"] == pytest.approx(found["trl 3"]["losses"], abs=0.01)
