"""Folders that appear whole or not at all, and the name of the file that says whether a checkpoint is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "foam_checkpoint.json"  # in a checkpoint: which of its files are whole


def check_destination(folder: Path) -> None:
    """Raise ValueError for a folder that cannot be written whole or not at all, by a rename into its place."""
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is left as it is; expected a new or an empty folder")
    if folder.resolve() == Path.cwd():
        raise ValueError(f"{folder} is the folder you are in, which cannot be replaced; expected a new one")


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `destination` in the end, or vanishes with an exception.

    Raises:
        ValueError: `destination` holds something, or is the current folder.
        OSError: it cannot be written.
    """
    check_destination(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".foam-hf-", dir=destination.parent) as workspace:
        folder = Path(workspace) / "folder"
        folder.mkdir()
        yield folder
        if destination.is_dir():
            destination.rmdir()
        folder.rename(destination)
