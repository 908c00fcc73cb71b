"""What the files of a checkpoint say of themselves: JSON that ends, safetensors of the right length, sound zips."""

from __future__ import annotations

import fnmatch
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foam_hf.folders import MANIFEST

_STATE = "trainer_state.json"  # what Trainer writes last
_PAIR = ("optimizer.pt", "scheduler.pt")  # Trainer reads both or none
_WEIGHTS = ("*.safetensors", "*.index.json", "pytorch_model*.bin", "adapter_model*.bin", "*.distcp", ".metadata")
_TRAINING = (_STATE, *_PAIR, "optimizer.bin", "scaler.pt", "rng_state*.pth")


class Unfinished(Exception):
    """A checkpoint whose save did not come to its end: nothing is wrong with the disk."""


class Damaged(Exception):
    """A checkpoint that is not what was saved."""


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint, named as in its manifest, holds weights or says where they are."""
    return _matches(name, _WEIGHTS)


def is_read(name: str) -> bool:
    """Whether resuming reads it: configs, tokenizers and what callbacks leave there are the business of others."""
    return is_weights(name) or _matches(name, _TRAINING)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    *folders, last = name.split("/")
    if any(folder.startswith("optimizer") for folder in folders):  # FSDP's
        return patterns is _TRAINING
    return any(fnmatch.fnmatchcase(last, pattern) for pattern in patterns)


def check_without_manifest(folder: Path, wanted: Callable[[str], bool] = is_read) -> None:
    """What the files say of themselves: JSON that ends, safetensors of the right length, zip files with their CRCs."""
    names = {path.name for path in folder.iterdir()}
    if wanted(_STATE):
        if _STATE not in names:
            raise Unfinished(f"it has no {_STATE}, which is written last")
        try:
            json.loads((folder / _STATE).read_bytes())
        except ValueError:
            raise Unfinished(f"{_STATE} is cut off or damaged") from None
    for present, missing in (_PAIR, _PAIR[::-1]) if wanted(_PAIR[0]) else ():
        if present in names and missing not in names and not any("optimizer" in name for name in names - {present}):
            raise Damaged(
                f"it has {present} but no {missing}, and Trainer would leave out both; if that is meant, delete "
                f"{present} too: moments and schedule then start anew"
            )
    for index in folder.glob("*.index.json"):
        for name in sorted(set(_json(index).get("weight_map", {}).values()) - names):
            raise Damaged(f"{name} is missing, of which {index.name} tells")
    for path in sorted(folder.iterdir()):
        if path.is_file() and wanted(path.name):
            check_file(path)


def check_file(path: Path) -> None:
    """Raise Damaged if a file is not sound in itself."""
    if path.suffix == ".safetensors":
        _check_safetensors(path)
    elif path.suffix == ".json":
        _json(path)
    elif path.suffix in (".pt", ".pth", ".bin"):
        _check_zip(path)


def step_for_missing(name: str) -> str:
    """What to do if a file is missing on purpose, as the end of a sentence; empty if nothing goes without it."""
    if name in _PAIR:
        other = _PAIR[1 - _PAIR.index(name)]
        return (
            f"; if that is meant, delete {other} and {MANIFEST} too: training then goes on from the saved weights, "
            "and moments and schedule start anew"
        )
    if is_weights(name) or name == _STATE:
        return ", without which nothing can be resumed; expected it back in its place"
    return f"; if that is meant, delete {MANIFEST} too"


def _json(path: Path) -> dict[str, Any]:
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
        data = max((told["data_offsets"][1] for name, told in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise Damaged(f"{path.name} is cut off or damaged: it has no readable header") from None
    if 8 + length + data != size:
        raise Damaged(f"{path.name} has {size} bytes, and its header tells of {8 + length + data}")


def _check_zip(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(1) == b"\x80":  # torch's old format, a pickle, which tells nothing of itself
            return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, zlib.error, OSError) as error:
        raise Damaged(f"{path.name} is cut off or damaged: {error}") from None
    if bad is not None:
        raise Damaged(f"{path.name} is damaged: {bad} in it has another CRC than was saved")
