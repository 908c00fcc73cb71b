"""Runs a worker of the tests of DeepSpeed's ZeRO in a process of its own, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_worker(name: str, *words: object) -> str:
    """What `tests.support.NAME` prints with these words, after it has ended well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.support.{name}", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "USE_TF": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout
