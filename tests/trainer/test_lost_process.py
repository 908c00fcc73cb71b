"""A run of two processes of which one is killed: what the other says and does, and the checkpoint before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tests.support.killed_rank_worker as worker
from foam_hf.trainer.lost_process import newest_finished
from foam_hf.trainer.manifest import check

LIMIT_S = 200  # on a busy machine

pytestmark = [pytest.mark.long, pytest.mark.slow]


def test_the_survivor_names_the_step_and_the_checkpoint_which_goes_on_exactly(tmp_path: Path) -> None:
    survivor, killed = worker.two_processes(tmp_path, "cpu", LIMIT_S)
    assert killed.returncode == -9
    assert survivor.returncode not in (0, -9), survivor.stdout[-3000:]
    (line,) = [line for line in survivor.stdout.splitlines() if "a collective failed" in line]
    saved = tmp_path / f"checkpoint-{worker.SAVED}"
    assert line.startswith(f"process 0 of 2 stops after step {worker.KILLED}: a collective failed, as another")
    assert line.endswith(f"finished is {saved}, from which resume_from_checkpoint=True goes on")
    check(saved, lambda name: True)
    expected = worker.train(tmp_path / "alone", 1, save_strategy="no")
    resumed = worker.train(tmp_path / "resumed", 1, resume=saved)
    assert all(map(torch.equal, resumed, expected[worker.SAVED :])) and len(resumed) == worker.STEPS - worker.SAVED


def test_a_checkpoint_whose_save_did_not_finish_is_not_named(tmp_path: Path) -> None:
    assert newest_finished(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()
    assert newest_finished(tmp_path) is None
