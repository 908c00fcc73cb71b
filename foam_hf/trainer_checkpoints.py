"""Checkpoints of the Trainer that cannot be lost under `optim="foam"`: a manifest says which are whole.

While a checkpoint is being written its manifest says so; the last thing written, after everything is on the disk, is
one with the size and the CRC-32 of every file. So a save that was killed, cut off by a power failure or stopped by a
full disk is known for what it is, and so is every file that changed afterwards. Old checkpoints are deleted only when
the new one is whole. A checkpoint without a manifest is from another tool, or an older version: what can be checked
there is.

What this file relies on, in transformers 4.57 to 5.x, wrapped by `trainer_plugin`: `Trainer._save_checkpoint` writes
`checkpoint-STEP` into `Trainer._get_output_dir(trial)`, its last file is `trainer_state.json`, then come
`Trainer._push_from_checkpoint` and the deletion of old ones, by `Trainer._rotate_checkpoints` (4.x) or
`transformers.trainer.rotate_checkpoints` (5.x). `Trainer._load_best_model` reads `state.best_model_checkpoint`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from foam_hf.checkpoint_files import MANIFEST, Damaged, Unfinished, check_without_manifest

logger = logging.getLogger("foam_hf")

PIECE = 1 << 26  # bytes of a file under one checksum: the pieces are read in parallel
_READ = 1 << 20
_WRITING: dict[str, Any] = {"version": 1, "complete": False}
_SENTINEL = "checkpoint-is-incomplete.txt"  # of `enable_jit_checkpoint`, removed once the manifest is written

_running: ContextVar[_Save | None] = ContextVar("foam_hf_save", default=None)


# saving


def saving(original: Callable[..., Any], is_ours: Callable[[Any], bool]) -> Callable[..., Any]:
    """`Trainer._save_checkpoint`, with a manifest."""

    @functools.wraps(original)
    def _save_checkpoint(self: Any, model: Any, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(self.args):
            return original(self, model, trial, *args, **kwargs)
        optimizer = foam_of(self)
        if optimizer is not None:
            optimizer.check_gradients()
        save = _Save(self, Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")
        token = _running.set(save)
        try:
            save.begin()
            result = original(self, model, trial, *args, **kwargs)
            save.finish()
        except Exception as error:
            if _is_of_the_disk(error) and not save.is_whole:  # else it is of an upload, or an old one's deletion
                raise OSError(save.failure(error)) from error
            raise
        finally:
            _running.reset(token)
        return result

    return _save_checkpoint


def finishing(original: Callable[..., Any]) -> Callable[..., Any]:
    """What Trainer does with a checkpoint that it takes for finished: upload it, delete older ones."""

    @functools.wraps(original)
    def after_the_last_file(*args: Any, **kwargs: Any) -> Any:
        save = _running.get()
        if save is not None:
            save.finish()
            if original.__name__.endswith("rotate_checkpoints"):
                save.delete_unfinished()
        return original(*args, **kwargs)

    return after_the_last_file


class _Save:
    """One checkpoint while it is being written."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self._finished = self.is_whole = False

    def begin(self) -> None:
        if self.trainer.args.should_save:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_manifest(self.folder, _WRITING)

    def finish(self) -> None:
        """Every process must come here once its files are written."""
        if self._finished:
            return
        self._finished = True
        if self.trainer.args.world_size > 1:
            self.trainer.accelerator.wait_for_everyone()
        if self.trainer.args.should_save:
            files = sorted(_files(self.folder))
            for path in files:
                _to_disk(path)
            for folder in {path.parent for path in files}:
                _to_disk(folder)
            found = {path.relative_to(self.folder).as_posix(): sums for path, sums in _checksums(files).items()}
            _write_manifest(self.folder, {"version": 1, "complete": True, "piece": PIECE, "files": found})
            _to_disk(self.folder.parent)
        self.is_whole = True

    def delete_unfinished(self) -> None:
        """Trainer would keep one that was never finished, and delete a whole one for it."""
        limit = self.trainer.args.save_total_limit
        if limit is None or limit <= 0:
            return
        for folder in _checkpoints(self.folder.parent):
            if folder != self.folder and _read_manifest(folder) == _WRITING:
                logger.warning(f"{folder} is deleted: its save did not finish")
                shutil.rmtree(folder, ignore_errors=True)

    def failure(self, error: Exception) -> str:
        free = shutil.disk_usage(self.folder.parent if self.folder.parent.exists() else ".").free
        return (
            f"{self.folder} could not be saved: {error}. {free} bytes are free there. What is there is incomplete, "
            f"and resume_from_checkpoint=True passes it by{_instead(self.folder)}"
        )


def _is_of_the_disk(error: Exception) -> bool:
    """Whether writing failed, in the words of Python, safetensors or torch."""
    told = str(error)
    writer = "inline_container" in told or "PytorchStreamWriter" in told
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or writer


def _files(folder: Path) -> Iterator[Path]:
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name != _SENTINEL)
    return (path for path in kept if not path.name.startswith(MANIFEST))


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Replace the manifest in one step that a crash cannot halve."""
    partial = folder / f"{MANIFEST}.{os.getpid()}"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / MANIFEST)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _to_disk(folder)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot; the checksums still hold
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksums(files: list[Path]) -> dict[Path, dict[str, Any]]:
    sizes = {path: path.stat().st_size for path in files}
    pieces = [(path, start) for path in files for start in range(0, sizes[path], PIECE)]
    sums: dict[Path, list[int]] = {path: [] for path in files}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # both reading and zlib let other threads run
        for (path, _), value in zip(pieces, pool.map(lambda piece: _crc(*piece), pieces), strict=True):
            sums[path].append(value)
    return {path: {"bytes": sizes[path], "crc32": sums[path]} for path in files}


def _crc(path: Path, start: int) -> int:
    value = 0
    with open(path, "rb") as file:
        file.seek(start)
        for _ in range(PIECE // _READ):
            block = file.read(_READ)
            if not block:
                break
            value = zlib.crc32(block, value)
    return value


# resuming


def checked_arguments(trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of `Trainer.train`, with a checkpoint to resume from that is whole.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or `True` was given and none is whole.
    """
    asked = args[0] if args else kwargs.get("resume_from_checkpoint")
    if asked is None or asked is False:
        return args, kwargs
    chosen = _agreed(trainer, lambda: _choose(Path(trainer.args.output_dir)) if asked is True else _whole(Path(asked)))
    if chosen is None:
        return args, kwargs
    return ((chosen, *args[1:]), kwargs) if args else (args, {**kwargs, "resume_from_checkpoint": chosen})


def loading_best(original: Callable[..., Any], is_ours: Callable[[Any], bool]) -> Callable[..., Any]:
    """`Trainer._load_best_model`, of a checkpoint that is whole."""

    @functools.wraps(original)
    def _load_best_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_ours(self.args) and (best := self.state.best_model_checkpoint):
            _agreed(self, lambda: _whole(Path(best)))
        return original(self, *args, **kwargs)

    return _load_best_model


def refusing_missing_weights(original: Callable[..., Any], is_ours: Callable[[Any], bool]) -> Callable[..., Any]:
    """`Trainer._issue_warnings_after_load`, which only warns about weights that a checkpoint did not bring."""

    @functools.wraps(original)
    def _issue_warnings_after_load(self: Any, load_result: Any, *args: Any, **kwargs: Any) -> Any:
        if is_ours(self.args):
            refuse_missing(self.model, load_result.missing_keys)
        return original(self, load_result, *args, **kwargs)

    return _issue_warnings_after_load


def refuse_missing(model: Any, missing: list[str]) -> None:
    """Raise ValueError if a trained weight is under no name in what was loaded."""
    names: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        half = bool(module.__dict__.get("_int8_waiting"))  # codes without scales, which say so at the first forward
        for own, p in module.named_parameters(recurse=False):
            if p.requires_grad and not (half and own == "weight"):
                names.setdefault(id(p), []).append(f"{module_name}.{own}".lstrip("."))  # tied ones have several
    absent = [known[0] for known in names.values() if set(known) <= set(missing)]
    if absent:
        raise ValueError(
            f"the checkpoint brought no values for {len(absent)} of {len(names)} trained weights of "
            f"{type(model).__name__}, {absent[0]} the first: it is of another model, or transformers saves this one "
            "under other names, which from_pretrained reads and Trainer does not (Mixtral's experts). Expected a "
            "checkpoint with all trained weights, or training without resume_from_checkpoint and "
            "load_best_model_at_end"
        )


def _agreed(trainer: Any, decide: Callable[[], str | None]) -> str | None:
    """What `decide` says in the main process, in all of them; also its ValueError."""
    outcome: list[Any] = [None, None]
    if trainer.args.process_index == 0:
        try:
            outcome[0] = decide()
        except ValueError as error:
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
    folders = _checkpoints(output)
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
    return f"{folder} cannot be resumed from: {problem}{_instead(folder)}"


def _instead(folder: Path) -> str:
    """Which other checkpoint is whole, as the end of a sentence."""
    for other in _checkpoints(folder.parent):
        if other != folder:
            try:
                _check(other)
            except (Unfinished, Damaged):
                continue
            return f"; the newest complete checkpoint beside it is {other}"
    return "; no other checkpoint there is complete"


def _checkpoints(output: Path) -> list[Path]:
    """The folders of checkpoints in `output`, the newest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output.glob("checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in found if match is not None and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        if content != _WRITING:
            sums = [(str(name), int(told["bytes"]), list(told["crc32"])) for name, told in content["files"].items()]
            if content["complete"] is not True or int(content["piece"]) < 1 or not sums:
                raise ValueError
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} is damaged") from None
    return content


def _check(folder: Path) -> None:
    """Raise Unfinished or Damaged if a checkpoint is not what was saved."""
    manifest = _read_manifest(folder)
    if manifest is None:
        check_without_manifest(folder)
        return
    if manifest == _WRITING:
        raise Unfinished("its save did not finish")
    told = {name: sums for name, sums in manifest["files"].items() if name != _SENTINEL}  # of earlier versions
    for name, sums in told.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing (if that is meant, delete {MANIFEST} too)")
        if path.stat().st_size != sums["bytes"]:
            raise Damaged(f"{name} has {path.stat().st_size} bytes, it was saved with {sums['bytes']}")
    if manifest["piece"] != PIECE:
        raise Damaged(f"{MANIFEST} has checksums of {manifest['piece']} bytes each; expected {PIECE}")
    found = _checksums([folder / name for name in told])
    for name, sums in told.items():
        if found[folder / name] != sums:
            raise Damaged(f"{name} has other contents than were saved")


def foam_of(trainer: Any) -> Any:
    """The trainer's FOAM, or None."""
    from foam_hf.optimizer import FOAM

    optimizer = getattr(trainer, "optimizer", None)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return optimizer if isinstance(optimizer, FOAM) else None
