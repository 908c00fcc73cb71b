"""Checks a file of a checkpoint by its own format (JSON, safetensors, zip), and lists the files that Trainer reads."""

from __future__ import annotations

import fnmatch
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foam_hf.folders import MANIFEST

_STATE = "trainer_state.json"  # Trainer writes this file last
_PAIR = ("optimizer.pt", "scheduler.pt")  # Trainer reads both or neither
_WEIGHTS = ("*.safetensors", "*.index.json", "pytorch_model*.bin", "adapter_model*.bin", "*.distcp", ".metadata")
_DEEPSPEED = ("*_optim_states.pt", "*_model_states.pt", "latest")  # the first two in a folder global_stepN
_TRAINING = (_STATE, *_PAIR, "optimizer.bin", "scaler.pt", "rng_state*.pth", *_DEEPSPEED)


class Unfinished(Exception):
    """The save of a checkpoint was interrupted; the files on the disk are not damaged."""


class Damaged(Exception):
    """A file of a checkpoint is missing or differs from the one that was saved."""


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint holds weights or an index of them; `name` is its path in the checkpoint."""
    return _matches(name, _WEIGHTS)


def is_read_on_resume(name: str) -> bool:
    """Whether Trainer reads a file of a checkpoint to resume: not configs, tokenizers or the files of callbacks."""
    return is_weights(name) or _matches(name, _TRAINING)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    *folders, last = name.split("/")
    if any(folder.startswith("optimizer") for folder in folders):  # FSDP writes a folder of this name
        return patterns is _TRAINING
    return any(fnmatch.fnmatchcase(last, pattern) for pattern in patterns)


def check_without_manifest(folder: Path, wanted: Callable[[str], bool] = is_read_on_resume) -> None:
    """Check the `wanted` files of a checkpoint that has no manifest: that each exists and is sound in its own format.

    Raises:
        Unfinished: trainer_state.json, which is written last, is missing or cut off.
        Damaged: another file is missing or cut off, or its length or CRC is wrong.
    """
    names = {path.name for path in folder.iterdir()}
    if wanted(_STATE):
        if _STATE not in names:
            raise Unfinished(f"it has no {_STATE}, which is written last")
        try:
            json.loads((folder / _STATE).read_bytes())
        except ValueError:
            raise Unfinished(f"{_STATE} is cut off or damaged") from None
    for present, missing in (_PAIR, _PAIR[::-1]) if wanted(_PAIR[0]) else ():
        if present in names and missing not in names and not any(map(_holds_optimizer, names - {present})):
            raise Damaged(
                f"it has {present} but no {missing}, and Trainer would leave out both; if that is meant, delete "
                f"{present} too: moments and schedule then start anew"
            )
    for index in folder.glob("*.index.json"):
        for name in sorted(set(_read_json_object(index).get("weight_map", {}).values()) - names):
            raise Damaged(f"{name} is missing, which {index.name} lists")
    for path in sorted(folder.iterdir()):
        if path.is_file() and wanted(path.name):
            check_file(path)


def check_file(path: Path) -> None:
    """Raise Damaged if a file is cut off, or its length or CRC is wrong by its own format; other formats pass."""
    if path.suffix == ".safetensors":
        _check_safetensors(path)
    elif path.suffix == ".json":
        _read_json_object(path)
    elif path.suffix in (".pt", ".pth", ".bin"):
        _check_zip(path)


def _holds_optimizer(name: str) -> bool:
    return "optimizer" in name or name.startswith("global_step")  # the second is DeepSpeed's


def advice_for_missing(name: str) -> str:
    """What to do if a file was deleted on purpose, as the end of an error message."""
    if name in _PAIR:
        other = _PAIR[1 - _PAIR.index(name)]
        return (
            f"; if that is meant, delete {other} and {MANIFEST} too: training then goes on from the saved weights, "
            "and moments and schedule start anew"
        )
    if is_weights(name) or name == _STATE:
        return ", without which nothing can be resumed; expected it back in its place"
    return f"; if that is meant, delete {MANIFEST} too"


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        raise Damaged(f"{path.name} is cut off or damaged") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path.name} is no JSON object")
    return content


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content = file.read(length) if length <= size else b""
    try:
        header = json.loads(content)
        data = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise Damaged(f"{path.name} is cut off or damaged: it has no readable header") from None
    if 8 + length + data != size:
        raise Damaged(f"{path.name} has {size} bytes; its header says {8 + length + data}")


def _check_zip(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(1) == b"\x80":  # torch's old format is a pickle, which has no checksum
            return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, zlib.error, OSError) as error:
        raise Damaged(f"{path.name} is cut off or damaged: {error}") from None
    if bad is not None:
        raise Damaged(f"{path.name} is damaged: {bad} in it has another CRC than was saved")
