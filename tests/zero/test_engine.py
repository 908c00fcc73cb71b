"""FOAM under DeepSpeed's ZeRO in real processes over gloo, without the Trainer; the worker has what they check."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.zero_runs import run_worker

pytestmark = [pytest.mark.long, pytest.mark.slow]


def test_every_process_agrees_with_one_process(tmp_path: Path) -> None:
    """Bits over 50 steps, bfloat16, offload, bytes of state, checkpoints and refusals, with 2 and with 4 processes."""
    run_worker("zero_worker", tmp_path)
