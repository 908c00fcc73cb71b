"""DDP with every rule and feature: the bits of one process, and checkpoints that go on in one or two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.support.ddp_worker as worker
from tests.support.sharding_trainer_worker import SHORT, run

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ddp")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", worker.__file__, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "USE_TF": "0"},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", worker.CASES)
def test_two_processes_have_the_bits_of_one(found: Any, tmp_path: Path, name: str) -> None:
    expected = worker.case(tmp_path, name)
    assert len(found[name]) == len(expected) == SHORT
    assert all(map(torch.equal, found[name], expected))
    assert not torch.equal(expected[0], expected[-1])


def test_a_checkpoint_of_two_processes_goes_on_in_two_and_in_one(found: Any, folder: Path, tmp_path: Path) -> None:
    expected = run(tmp_path, max_steps=2 + SHORT)[1][2:]
    for steps in (found["resumed"], worker.resumed(folder, world=1)):
        assert len(steps) == SHORT and all(map(torch.equal, steps, expected))
