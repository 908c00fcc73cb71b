"""Checkpoints that are about to be read, for resuming or as the best model: which, and are they what was saved.

What is read is checked, and nothing else: see `checkpoint_files`. A checkpoint without a manifest is from another
tool, or an older version: what can be checked there is. Each refusal names the step that accepts a change made on
purpose.

What this file relies on, in transformers 4.57 to 5.x, wrapped by `trainer_plugin`: `Trainer._load_best_model` reads
`state.best_model_checkpoint` after the last step; where that is set and `save_total_limit=1`, Trainer then deletes all
others.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foam_hf.folders import MANIFEST
from foam_hf.trainer.file_checks import (
    Damaged,
    Unfinished,
    check_file,
    check_without_manifest,
    is_read,
    is_weights,
    step_for_missing,
)
from foam_hf.trainer.manifest import SENTINEL, checksums, read_manifest
from foam_hf.trainer.weights import loads, problem_of

logger = logging.getLogger("foam_hf")


def checked_arguments(trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of `Trainer.train`, with a checkpoint to resume from that is whole.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or `True` was given and none is whole.
    """
    asked = args[0] if args else kwargs.get("resume_from_checkpoint")
    if asked is None or asked is False:
        return args, kwargs
    chosen = _agreed(trainer, lambda: _choose(Path(trainer.args.output_dir)) if asked is True else _whole(Path(asked)))
    _say_fresh_state(trainer, chosen)
    if chosen is None:
        return args, kwargs
    return ((chosen, *args[1:]), kwargs) if args else (args, {**kwargs, "resume_from_checkpoint": chosen})


def loading_best(original: Callable[..., Any], is_ours: Callable[[Any], bool]) -> Callable[..., Any]:
    """`Trainer._load_best_model`, after the last step: where the weights cannot be read, the trained model stays."""

    @functools.wraps(original)
    def _load_best_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint if is_ours(self.args) else None
        if not best:
            return original(self, *args, **kwargs)
        try:
            _agreed(self, lambda: _weights_are_whole(self, Path(best)))
            if not loads(self, Path(best)):
                return original(self, *args, **kwargs)
        except Exception as error:  # whatever it is, a finished training is not lost for it
            self.state.best_model_checkpoint = None  # else Trainer deletes all others under save_total_limit=1
            logger.warning(
                f"the best model, {best}, is not loaded: {error}. The training is finished, and the model in memory "
                "is that of its last step: Trainer.save_model() saves it"
            )
        return None

    return _load_best_model


def _weights_are_whole(trainer: Any, folder: Path) -> None:
    if folder.is_dir():  # otherwise Trainer says what is missing
        try:
            _check(folder, is_weights)
        except (Unfinished, Damaged) as problem:
            raise ValueError(f"{problem}{instead(folder)}") from None
        if unreadable := problem_of(trainer, folder):
            raise ValueError(unreadable)


def _say_fresh_state(trainer: Any, chosen: str | None) -> None:
    """Trainer says nothing where a checkpoint has weights and no state of the optimizer."""
    folder = Path(chosen or "")
    if chosen is None or not trainer.args.should_log or not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    if not {"optimizer.pt", "scheduler.pt"} <= names and not any(
        "optimizer" in name for name in names - {"optimizer.pt"}
    ):
        logger.warning(f"{folder} has no state of the optimizer: moments and schedule start anew from its weights")


def _agreed(trainer: Any, decide: Callable[[], Any]) -> Any:
    """What `decide` says in the main process, in all of them; also its ValueError."""
    outcome: list[Any] = [None, None]
    if trainer.args.process_index == 0:
        try:
            outcome[0] = decide()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    if trainer.args.world_size > 1:
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def _choose(output: Path) -> str | None:
    """The newest complete checkpoint in `output`, or None where there is none at all, which Trainer says."""
    folders = checkpoints_in(output)
    passed = []
    for folder in folders:
        try:
            _check(folder)
        except Unfinished as problem:
            passed.append(f"{folder.name} ({problem})")
            continue
        except Damaged as problem:
            raise ValueError(_refusal(folder, problem)) from None
        if passed:
            logger.warning(f"training resumes from {folder}, as newer checkpoints are incomplete: {', '.join(passed)}")
        return str(folder)
    if passed:
        raise ValueError(
            f"no checkpoint in {output} is complete: {', '.join(passed)}; expected one whose save finished, or "
            "training from the start, without resume_from_checkpoint"
        )
    return None


def _whole(folder: Path) -> str:
    if folder.is_dir():  # otherwise Trainer says what is missing
        try:
            _check(folder)
        except (Unfinished, Damaged) as problem:
            raise ValueError(_refusal(folder, problem)) from None
    return str(folder)


def _refusal(folder: Path, problem: Exception) -> str:
    return f"{folder} cannot be resumed from: {problem}{instead(folder)}"


def instead(folder: Path) -> str:
    """Which other checkpoint is whole, as the end of a sentence."""
    for other in checkpoints_in(folder.parent):
        if other != folder:
            try:
                _check(other)
            except (Unfinished, Damaged):
                continue
            return f"; the newest complete checkpoint beside it is {other}"
    return "; no other checkpoint there is complete"


def checkpoints_in(output: Path) -> list[Path]:
    """The folders of checkpoints in `output`, the newest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output.glob("checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in found if match is not None and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def _check(folder: Path, wanted: Callable[[str], bool] = is_read) -> None:
    """Raise Unfinished or Damaged if what is `wanted` of a checkpoint is not what was saved."""
    manifest = read_manifest(folder)
    if manifest is None:
        check_without_manifest(folder, wanted)
        return
    if manifest["complete"] is False:
        raise Unfinished("its save did not finish")
    told = {name: sums for name, sums in manifest["files"].items() if name != SENTINEL and wanted(name)}
    for name, sums in told.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing{step_for_missing(name)}")
        if path.stat().st_size != sums["bytes"]:
            _changed(path, name, f"has {path.stat().st_size} bytes, it was saved with {sums['bytes']}")
    found = checksums([folder / name for name in told], manifest["piece"])
    for name, sums in told.items():
        if found[folder / name] != sums:
            _changed(folder / name, name, "has other contents than were saved")


def _changed(path: Path, name: str, how: str) -> None:
    try:
        check_file(path)
    except Damaged as problem:
        raise Damaged(f"{name} {how}, and cannot be read: {problem}") from None
    raise Damaged(f"{name} {how}; if that is meant, delete {MANIFEST}, and it is taken as it is")


def foam_of(trainer: Any) -> Any:
    """The trainer's FOAM, or None."""
    module = sys.modules.get("foam_hf.optimizer.foam")  # never imported, there is none
    optimizer = getattr(trainer, "optimizer", None)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return optimizer if module is not None and isinstance(optimizer, module.FOAM) else None
