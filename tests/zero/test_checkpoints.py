"""Checkpoints of DeepSpeed's ZeRO under another config, other options or another model: gone on from, or refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import tests.support.zero_checkpoints_worker as worker
from tests.support.zero_runs import run_worker

pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each checkpoint, in two processes."""
    folder = tmp_path_factory.mktemp("zero_checkpoints")
    run_worker("zero_checkpoints_worker", folder)
    return torch.load(folder / "results.pt")


def assert_went_on(resumed: dict[str, Any]) -> None:
    assert resumed["error"] == ""
    assert torch.equal(resumed["weights"], resumed["expected"])


@pytest.mark.parametrize("name", ["ZeRO 1 under 2", "ZeRO 2 under 1", "old format"])
def test_it_goes_on_with_the_bits_of_the_run_that_wrote_it(found: Any, name: str) -> None:
    assert_went_on(found[name])


CUT = "cut otherwise than those of param group 0 here; expected the model and the DeepSpeed config that wrote it"
REFUSED: dict[str, str] = {
    "ZeRO 2 under 3": "ZeRO 1 or 2 wrote the checkpoint, and here ZeRO 3 holds the weights",
    "ZeRO 3 under 2": "ZeRO 3 wrote the checkpoint, and here ZeRO 1 or 2 holds the weights",
    "ZeRO 3 under 1, other options": "ZeRO 3 wrote the checkpoint",
    "sub_group_size": CUT,
    "round_robin_gradients": CUT,
    **{
        f"wider {stage}": r"gate_proj.weight as a weight of shape \(96, 32\), and here it has shape \(48, 32\)"
        for stage in (1, 2, 3)
    },
    "AdamW's": "the checkpoint is of another optimizer: its param groups have no 'level'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_options_continue_is_refused_without_advice(found: Any, name: str) -> None:
    error = found[name]["error"]
    assert error.startswith("ValueError: ") and re.search(REFUSED[name], error), error
    assert "To go on with this checkpoint" not in error, "these options are in use"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_options_are_refused_with_those_that_continue_it(found: Any, stage: int) -> None:
    named, again = found[f"options {stage}"]
    assert set(named) == set(worker.OTHERS)
    for others, advice in named.items():
        assert advice in again, f"{others} got {advice!r}"
    for resumed in again.values():
        assert_went_on(resumed)


def test_other_options_are_found_in_a_file_of_torchs_old_format(found: Any) -> None:
    error = found["old format, other options"]["error"]
    assert error.endswith("To go on with this checkpoint: optim='foam', optim_args='level=3,scale=0.25'.")
