"""FOAM under DeepSpeed's ZeRO in real processes over gloo, without the Trainer; the worker has what they check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.long, pytest.mark.slow]


def test_every_process_agrees_with_one_process(tmp_path: Path) -> None:
    """Bits over 50 steps, bfloat16, offload, bytes of state, checkpoints and refusals, with 2 and with 4 processes."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.zero_worker", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
