"""Saves checkpoints with a manifest under `optim="foam"`, so that an incomplete or damaged one is recognized.

A checkpoint gets its first manifest before any file: it says which process is writing. When all files are on the disk,
a second manifest with the size and the CRC-32 of every file replaces it. It is written again if callbacks change files
in `on_save`. So resuming recognizes a save that a kill, a power failure or a full disk interrupted, and a file that
changed later. Old checkpoints are deleted only after the new one is complete. Incomplete ones are deleted only if no
process can be writing them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from foam_hf.folders import MANIFEST
from foam_hf.optimizer.names import named
from foam_hf.trainer.manifest import (
    begin,
    checkpoints_in,
    complete_manifest,
    file_stamps,
    files_of,
    mark_as_written_here,
    name_complete_checkpoint,
    unfinished_manifest,
    writer_is_gone,
)
from foam_hf.trainer.names import foam_of, uses_foam
from foam_hf.trainer.private import checkpoint_folder
from foam_hf.trainer.weights import warn_unreadable

logger = logging.getLogger("foam_hf")

_running: ContextVar[_Save | None] = ContextVar("foam_hf_save", default=None)


def wrap_save_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Trainer._save_checkpoint`: it adds a manifest, and the weights' names to the optimizer's state."""

    @functools.wraps(original)
    def _save_checkpoint(trainer: Any, model: Any, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not uses_foam(trainer.args):
            return original(trainer, model, trial, *args, **kwargs)
        optimizer = foam_of(trainer)
        if optimizer is not None:
            optimizer.check_gradients()
        save = _Save(trainer, checkpoint_folder(trainer, trial))
        token = _running.set(save)
        try:
            with mark_as_written_here(save.folder), named(optimizer, trainer.model):
                save.begin()
                result = original(trainer, model, trial, *args, **kwargs)
                save.finish()
        except Exception as error:
            if _is_write_error(error) and not save.is_complete:  # later errors are of an upload or of a deletion
                raise OSError(save.failure_message(error)) from error
            raise
        finally:
            _running.reset(token)
        trainer.callback_handler._foam_hf_save = save
        return result

    return _save_checkpoint


def wrap_after_last_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that Trainer calls when all files are written (upload, deletion of old checkpoints).

    The manifest is completed before it runs.
    """

    @functools.wraps(original)
    def after_last_file(*args: Any, **kwargs: Any) -> Any:
        save = _running.get()
        if save is not None:
            save.finish()
            if original.__name__.endswith("rotate_checkpoints") and save.rotate_with_unfinished():
                return None
        return original(*args, **kwargs)

    return after_last_file


def wrap_on_save(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `CallbackHandler.on_save`: if callbacks changed files of the checkpoint, its manifest is written again."""

    @functools.wraps(original)
    def on_save(handler: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(handler, *args, **kwargs)
        save = handler.__dict__.pop("_foam_hf_save", None)
        if save is not None:
            save.renew_manifest()
        return result

    return on_save


class _Save:
    """One checkpoint while it is being written, and the checksums of its files."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self._finished = self.is_complete = False
        self._stamps: dict[Path, Any] = {}
        self._sums: dict[Path, dict[str, Any]] = {}

    def begin(self) -> None:
        if self.trainer.args.should_save and begin(self.folder):
            logger.warning(
                f"{self.folder} is being saved here while another save of it has not finished: two runs in one "
                "output_dir overwrite each other's checkpoints; expected a folder for each"
            )

    def finish(self) -> None:
        """Complete the manifest. Every process must call it after its last file: it waits for all of them."""
        if self._finished:
            return
        self._finished = True
        self._wait()
        if self.trainer.args.should_save:
            self._complete_manifest()
            warn_unreadable(self.trainer, self.folder)
        self.is_complete = True

    def renew_manifest(self) -> None:
        """Write the manifest again if callbacks changed files; a failure is a warning and does not stop training."""
        self._wait()
        if not self._stamps or not (self.folder / MANIFEST).is_file():  # a callback moved or deleted it
            return
        try:
            if file_stamps(files_of(self.folder)) != self._stamps:
                self._complete_manifest()
        except OSError as error:
            logger.warning(
                f"callbacks changed files of {self.folder} in on_save, and its manifest could not be renewed: "
                f"{error}. Before resuming from it, delete {self.folder / MANIFEST}"
            )

    def _complete_manifest(self, tries: int = 3) -> None:
        try:
            found = file_stamps(files_of(self.folder))
            kept = {path: sums for path, sums in self._sums.items() if found.get(path) == self._stamps.get(path)}
            self._sums = complete_manifest(self.folder, kept)
        except FileNotFoundError:  # uploaders and file systems make temporary files, which may vanish meanwhile
            if tries < 2:
                raise
            self._complete_manifest(tries - 1)
            return
        self._stamps = {path: found[path] for path in self._sums if path in found}

    def _wait(self) -> None:
        if self.trainer.args.world_size > 1:
            self.trainer.accelerator.wait_for_everyone()

    def rotate_with_unfinished(self) -> bool:
        """Delete old checkpoints in Trainer's place if some saves never finished; return whether it did.

        Trainer does not know which are unfinished: it would delete a complete checkpoint rather than an older
        unfinished one, or one that another process is writing.
        """
        limit = self.trainer.args.save_total_limit
        folders = [each for each in checkpoints_in(self.folder.parent) if each != self.folder]
        unfinished = [each for each in folders if unfinished_manifest(each) is not None]
        if limit is None or limit <= 0 or not unfinished:
            return False
        dead = [each for each in reversed(unfinished) if writer_is_gone(each)]
        best = self.trainer.state.best_model_checkpoint
        kept = {self.folder} if best is None else {self.folder, Path(best)}
        complete = _oldest_first([self.folder, *(each for each in folders if each not in unfinished)])
        for each in [*dead, *(each for each in complete if each not in kept)]:
            if len(dead) + len(complete) <= max(limit, len(kept)):
                break
            if each in dead:
                logger.warning(f"{each} is deleted: its save did not finish, and nothing is writing it any more")
            (dead if each in dead else complete).remove(each)
            shutil.rmtree(each, ignore_errors=True)
        return True

    def failure_message(self, error: Exception) -> str:
        free = shutil.disk_usage(self.folder.parent if self.folder.parent.exists() else ".").free
        return (
            f"{self.folder} could not be saved: {error}. {free} bytes are free there. What is there is incomplete, "
            f"and resume_from_checkpoint=True passes it by{name_complete_checkpoint(self.folder)}"
        )


def _oldest_first(folders: list[Path]) -> list[Path]:
    """Sort checkpoints as Trainer does: by time, or by step on a file system that keeps no times."""
    times = {folder: _time_of_change(folder) for folder in folders}
    if max(times.values()) - min(times.values()) < 1:
        return sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))
    return sorted(folders, key=times.__getitem__)


def _time_of_change(folder: Path) -> float:
    with contextlib.suppress(OSError):  # another run may have deleted it
        return folder.stat().st_mtime
    return 0.0


def _is_write_error(error: Exception) -> bool:
    """Whether Python, safetensors or torch raised `error` because writing a file failed."""
    message = str(error)
    writer = "inline_container" in message or "PytorchStreamWriter" in message
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or writer
