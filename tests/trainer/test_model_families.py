"""Every family of docs/models.md is trained, saved, resumed and read back; the page says what came of it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.support.family import Family
from tests.support.model_families import ADAPTED, COMMAND, FAMILIES, PAGE, cells_of, page, table_row

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """Nothing of other files' Trainers here, and nothing of these for them: each training froze what there was."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what was imported


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no test here ends in a power cut


@pytest.fixture(scope="module")
def rows() -> dict[str, str]:
    """Name of a family -> its row on the page."""
    found = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in found}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_does_what_its_row_says(family: Family, rows: dict[str, str], tmp_path: Path) -> None:
    found = table_row(family, cells_of(family, tmp_path))
    assert rows.get(family.name) == found, f"the page says otherwise; to write it anew: {COMMAND}"


def test_the_page_has_a_row_for_every_family_and_nothing_else(rows: dict[str, str]) -> None:
    assert page(lambda family: rows[family.name]) == PAGE.read_text(encoding="utf-8")
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) and {f.name for f in FAMILIES} >= ADAPTED.keys()
    limits = sum(bool(family.limit) for family in FAMILIES)
    readme = (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"tiny ones of {len(FAMILIES) - limits} families of transformers" in readme and f"; {limits} more" in readme
