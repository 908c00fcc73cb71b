"""Runs under ZeRO that are killed at random moments and resumed end with the bits of a run that nobody killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.long, pytest.mark.slow]


def test_killed_runs_end_as_others_or_say_why_not(tmp_path: Path) -> None:
    """Twice for each stage; `python -m tests.support.zero_kill FOLDER 20` does it twenty times."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.zero_kill", str(tmp_path), "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "USE_TF": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "ZeRO 2: 2 kills" in done.stdout and "ZeRO 3: 2 kills" in done.stdout
