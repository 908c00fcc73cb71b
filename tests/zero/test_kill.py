"""Runs under ZeRO that are killed at random moments and resumed end with the bits of a run that nobody killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.zero_runs import run_worker

pytestmark = [pytest.mark.long, pytest.mark.slow]


def test_killed_runs_end_as_others_or_say_why_not(tmp_path: Path) -> None:
    """Twice for each stage; `python -m tests.support.zero_kill FOLDER 20` does it twenty times."""
    said = run_worker("zero_kill", tmp_path, "2")
    assert "ZeRO 2: 2 kills" in said and "ZeRO 3: 2 kills" in said
