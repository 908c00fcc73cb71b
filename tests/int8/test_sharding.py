"""INT8 weights under FSDP2, in real processes over gloo: codes in the all-gather, the bits of one process, files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tests.support.int8_sharding_worker as worker
from tests.support.sharding_trainer_worker import run, stored
from tests.support.tiny_models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.usefixtures("forget_mixed_precision")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8_sharded")
    tiny_llama(vocab_size=worker.ROWS).save_pretrained(folder / "plain")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[int, dict[str, Any]]:
    """What the runs of 2, then 1, then 4 processes found; each continues a checkpoint of the one before."""
    done = subprocess.run(
        [sys.executable, worker.__file__, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "USE_TF": "0", "TRITON_INTERPRET": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return {world: torch.load(folder / f"results{world}.pt") for world in (2, 4)}


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Tensor]:
    return run(folder / "alone", model=worker.model(), max_steps=worker.STEPS)[1]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    assert [i for i, pair in enumerate(zip(actual, expected, strict=True)) if not torch.equal(*pair)] == []


@pytest.mark.parametrize("kind", worker.KINDS)
def test_runs_go_on_exactly_in_2_then_1_then_4_processes(runs: Any, alone: Any, kind: str) -> None:
    assert_same_bits(runs[4][f"resumed {kind}"], alone[8:])


@pytest.mark.parametrize("name", worker.FEATURES)
def test_features_have_the_bits_of_one_process(runs: Any, folder: Path, name: str) -> None:
    assert_same_bits(runs[2][name], worker.feature(folder, name))


@pytest.mark.parametrize("kind", worker.KINDS)
def test_adapters_on_frozen_int8_weights_resume_exactly(runs: Any, tmp_path: Path, kind: str) -> None:
    expected = run(tmp_path, model=worker.lora(), max_steps=worker.SHORT)[1]
    assert_same_bits(runs[2][f"lora {kind}"], expected[2:])


def test_mixed_precision_keeps_codes(runs: Any) -> None:
    """accelerate makes trained weights float32, which of INT8 weights is the outer dtype alone."""
    steps = runs[2]["mixed"]
    sizes = [part.numel() for p in worker.model().parameters() for part in stored(p)]
    assert steps[0].numel() == sum(sizes) and not torch.equal(steps[0], steps[-1])
    assert all(step.isfinite().all() for step in steps)


def test_codes_and_scales_alone_travel(runs: Any) -> None:
    """One byte an element and four for each block of 128: by hand, with all kinds of state dicts, in the workers."""
    for world in (2, 4):
        found, elements = runs[world]["bytes"], 256 * 64
        assert found == {"float32": 4 * elements, "bfloat16": 2 * elements, "INT8": elements + 4 * elements // 128}


def test_the_saved_model_is_that_of_the_last_step(runs: Any, folder: Path) -> None:
    saved = folder / f"four/FULL_STATE_DICT/checkpoint-{worker.STEPS}"
    model = AutoModelForCausalLM.from_pretrained(saved)
    found = torch.cat([part.flatten() for p in model.parameters() for part in stored(p)])
    assert torch.equal(found, runs[4]["resumed FULL_STATE_DICT"][-1])
