"""Gradient release in several real processes, over gloo: the bits of training without release."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import tests.support.release_accumulation_worker as accumulation_worker
import tests.support.release_ddp_worker as ddp_worker
import tests.support.release_worker as worker

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.long, pytest.mark.slow]


def test_release_under_fsdp2_has_the_bits_of_fsdp2_without_it(tmp_path: Path) -> None:
    """In two processes and in four.

    Every rank compares, see the worker; it also counts gradients, resumes, clips, and provokes what is refused.
    """
    _run(worker, tmp_path, 2, 4)


def test_release_that_averages_has_the_bits_of_ddp(tmp_path: Path) -> None:
    """In two processes and in three, with DDP's wrapper and without it.

    The worker also counts gradients, and provokes what is refused.
    """
    _run(ddp_worker, tmp_path, 2, 3)


def test_micro_batches_of_several_processes_have_the_bits_of_one(tmp_path: Path) -> None:
    """Under DDP, with a process group and under FSDP2, in two processes and in four.

    The worker also counts gradients, clips, resumes, lets processes use other layers, and provokes what is refused.
    """
    _run(accumulation_worker, tmp_path, 2, 4)


def _run(module: types.ModuleType, tmp_path: Path, *processes: int) -> None:
    done = subprocess.run(
        [sys.executable, str(module.__file__), str(tmp_path), *map(str, processes)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "USE_TF": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    for count in processes:
        assert len([*tmp_path.glob(f"done {count} *")]) == count
