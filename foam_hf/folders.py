"""Writes a folder completely or not at all, and names the manifest of a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "foam_checkpoint.json"  # in a checkpoint: the sizes and checksums of its files


def check_destination(folder: Path) -> None:
    """Raise ValueError if a new folder cannot be renamed to `folder`: it is not empty, a link, or the current one."""
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is left as it is; expected a new or an empty folder")
    if folder.resolve() == Path.cwd():
        raise ValueError(f"{folder} is the folder you are in, which cannot be replaced; expected a new one")


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, which is renamed to `destination` at the end; an exception deletes it.

    Raises:
        ValueError: `destination` is not empty, or is the current folder.
        OSError: the folder cannot be written.
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
