"""Saving checkpoints that cannot be lost under `optim="foam"`: a manifest says which are whole.

While a checkpoint is being written its manifest says so, and by whom; the last thing written, after everything is on
the disk, is one with the size and the CRC-32 of every file, renewed for what callbacks changed in `on_save`. So a
save that was killed, cut off by a power failure or stopped by a full disk is known for what it is, and so is every
file that changed afterwards. Old checkpoints are deleted only when the new one is whole, and unfinished ones only when
nobody can be writing them.
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
    files_of,
    instead,
    seal,
    stamps,
    surely_dead,
    unfinished,
    writing,
)
from foam_hf.trainer.names import foam_of, is_ours
from foam_hf.trainer.patches import checkpoint_folder
from foam_hf.trainer.weights import warn_unreadable

logger = logging.getLogger("foam_hf")

_running: ContextVar[_Save | None] = ContextVar("foam_hf_save", default=None)


def wrap_save_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer._save_checkpoint`, with a manifest and the names of the weights that the optimizer holds state of."""

    @functools.wraps(original)
    def _save_checkpoint(trainer: Any, model: Any, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(trainer.args):
            return original(trainer, model, trial, *args, **kwargs)
        optimizer = foam_of(trainer)
        if optimizer is not None:
            optimizer.check_gradients()
        save = _Save(trainer, checkpoint_folder(trainer, trial))
        token = _running.set(save)
        try:
            with writing(save.folder), named(optimizer, trainer.model):
                save.begin()
                result = original(trainer, model, trial, *args, **kwargs)
                save.finish()
        except Exception as error:
            if _is_of_the_disk(error) and not save.is_whole:  # else it is of an upload, or an old one's deletion
                raise OSError(save.failure(error)) from error
            raise
        finally:
            _running.reset(token)
        trainer.callback_handler._foam_hf_save = save
        return result

    return _save_checkpoint


def wrap_after_last_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """What Trainer does with a checkpoint that it takes for finished: upload it, delete older ones."""

    @functools.wraps(original)
    def after_the_last_file(*args: Any, **kwargs: Any) -> Any:
        save = _running.get()
        if save is not None:
            save.finish()
            if original.__name__.endswith("rotate_checkpoints") and save.has_rotated():
                return None
        return original(*args, **kwargs)

    return after_the_last_file


def wrap_on_save(original: Callable[..., Any]) -> Callable[..., Any]:
    """`CallbackHandler.on_save`, where callbacks convert, annotate or remove files of the checkpoint just saved."""

    @functools.wraps(original)
    def on_save(handler: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(handler, *args, **kwargs)
        save = handler.__dict__.pop("_foam_hf_save", None)
        if save is not None:
            save.seal_again()
        return result

    return on_save


class _Save:
    """One checkpoint while it is being written."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self._finished = self.is_whole = False
        self._stamps: dict[Path, Any] = {}
        self._sums: dict[Path, dict[str, Any]] = {}

    def begin(self) -> None:
        if self.trainer.args.should_save and begin(self.folder):
            logger.warning(
                f"{self.folder} is being saved here while another save of it has not finished: two runs in one "
                "output_dir overwrite each other's checkpoints; expected a folder for each"
            )

    def finish(self) -> None:
        """Every process must come here once its files are written."""
        if self._finished:
            return
        self._finished = True
        self._wait()
        if self.trainer.args.should_save:
            self._seal()
            warn_unreadable(self.trainer, self.folder)
        self.is_whole = True

    def seal_again(self) -> None:
        """Take what callbacks made of the checkpoint for what was saved; it never stops a training."""
        self._wait()
        if not self._stamps or not (self.folder / MANIFEST).is_file():  # moved away, or meant to have no manifest
            return
        try:
            if stamps(files_of(self.folder)) != self._stamps:
                self._seal()
        except OSError as error:
            logger.warning(
                f"callbacks changed files of {self.folder} in on_save, and its manifest could not be renewed: "
                f"{error}. Before resuming from it, delete {self.folder / MANIFEST}"
            )

    def _seal(self, tries: int = 3) -> None:
        try:
            found = stamps(files_of(self.folder))
            kept = {path: sums for path, sums in self._sums.items() if found.get(path) == self._stamps.get(path)}
            self._sums = seal(self.folder, kept)
        except FileNotFoundError:  # an uploader's, or a file system's, that came and went
            if tries < 2:
                raise
            self._seal(tries - 1)
            return
        self._stamps = {path: found[path] for path in self._sums if path in found}

    def _wait(self) -> None:
        if self.trainer.args.world_size > 1:
            self.trainer.accelerator.wait_for_everyone()

    def has_rotated(self) -> bool:
        """Delete old checkpoints in Trainer's place where some never finished: it would keep one, and delete a whole
        one for it, or delete one that another process is writing. False where there are none."""
        limit = self.trainer.args.save_total_limit
        folders = [each for each in checkpoints_in(self.folder.parent) if each != self.folder]
        open_ones = [each for each in folders if unfinished(each) is not None]
        if limit is None or limit <= 0 or not open_ones:
            return False
        dead = [each for each in reversed(open_ones) if surely_dead(each)]
        best = self.trainer.state.best_model_checkpoint
        kept = {self.folder} if best is None else {self.folder, Path(best)}
        whole = _oldest_first([self.folder, *(each for each in folders if each not in open_ones)])
        for each in [*dead, *(each for each in whole if each not in kept)]:
            if len(dead) + len(whole) <= max(limit, len(kept)):
                break
            if each in dead:
                logger.warning(f"{each} is deleted: its save did not finish, and nothing is writing it any more")
            (dead if each in dead else whole).remove(each)
            shutil.rmtree(each, ignore_errors=True)
        return True

    def failure(self, error: Exception) -> str:
        free = shutil.disk_usage(self.folder.parent if self.folder.parent.exists() else ".").free
        return (
            f"{self.folder} could not be saved: {error}. {free} bytes are free there. What is there is incomplete, "
            f"and resume_from_checkpoint=True passes it by{instead(self.folder)}"
        )


def _oldest_first(folders: list[Path]) -> list[Path]:
    """As Trainer sorts them: by time, or by step on a file system that keeps no times."""
    times = {folder: _changed(folder) for folder in folders}
    if max(times.values()) - min(times.values()) < 1:
        return sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))
    return sorted(folders, key=times.__getitem__)


def _changed(folder: Path) -> float:
    with contextlib.suppress(OSError):  # another run has just deleted it
        return folder.stat().st_mtime
    return 0.0


def _is_of_the_disk(error: Exception) -> bool:
    """Whether writing failed, in the words of Python, safetensors or torch."""
    message = str(error)
    writer = "inline_container" in message or "PytorchStreamWriter" in message
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or writer
