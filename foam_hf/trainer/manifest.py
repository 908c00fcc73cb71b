"""Which checkpoints are whole: a manifest says who is writing one, and then the size and the CRC-32 of every file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from foam_hf.folders import MANIFEST
from foam_hf.trainer.file_checks import (
    Damaged,
    Unfinished,
    check_file,
    check_without_manifest,
    is_read,
    step_for_missing,
)

logger = logging.getLogger("foam_hf")

PIECE = 1 << 26  # bytes of a file under one checksum: the pieces are read in parallel
SENTINEL = "checkpoint-is-incomplete.txt"  # of `enable_jit_checkpoint`, removed once the manifest is written
_READ = 1 << 20
_LONG = 24 * 3600.0  # seconds without a change after which a save elsewhere is dead

Stamp = tuple[int, int, int]  # size, time of the last change, inode


def files_of(folder: Path) -> list[Path]:
    """The files that the manifest of ``folder`` tells of."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name != SENTINEL)
    return sorted(path for path in kept if not path.name.startswith(MANIFEST))


def stamps(files: list[Path]) -> dict[Path, Stamp]:
    """What changes when a file does, without reading it."""
    found = {path: path.stat() for path in files}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


def seal(folder: Path, known: dict[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Bring the files of ``folder`` to the disk and write their checksums; ``known`` ones are not computed again."""
    files = files_of(folder)
    new = [path for path in files if path not in known]
    for path in new:
        to_disk(path)
    for parent in {path.parent for path in files}:
        to_disk(parent)
    sums = {path: known[path] for path in files if path in known} | checksums(new)
    named = {path.relative_to(folder).as_posix(): sums[path] for path in files}
    write_manifest(folder, {"version": 1, "complete": True, "piece": PIECE, "files": named})
    to_disk(folder.parent)
    return sums


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
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
    to_disk(folder)


def to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot; the checksums still hold
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        if content["complete"] is not False:
            sums = [(str(name), int(told["bytes"]), list(told["crc32"])) for name, told in content["files"].items()]
            if content["complete"] is not True or int(content["piece"]) < 1 or not sums:
                raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(
            f"{MANIFEST} is damaged; if that file is deleted, the others are checked as far as they tell of themselves"
        ) from None
    return content


def checksums(files: list[Path], piece: int | None = None) -> dict[Path, dict[str, Any]]:
    """Size and CRC-32 of each ``piece`` bytes of every file."""
    piece = piece or PIECE
    sizes = {path: path.stat().st_size for path in files}
    pieces = [(path, start) for path in files for start in range(0, sizes[path], piece)]
    sums: dict[Path, list[int]] = {path: [] for path in files}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # both reading and zlib let other threads run
        for (path, _), value in zip(pieces, pool.map(lambda at: _crc(at[0], at[1], piece), pieces), strict=True):
            sums[path].append(value)
    return {path: {"bytes": sizes[path], "crc32": sums[path]} for path in files}


def _crc(path: Path, start: int, piece: int) -> int:
    value = 0
    with open(path, "rb") as file:
        file.seek(start)
        for at in range(0, piece, _READ):
            block = file.read(min(_READ, piece - at))
            if not block:
                break
            value = zlib.crc32(block, value)
    return value


# who is writing

_mine: set[Path] = set()  # checkpoints that this process is writing now


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While this lasts, ``folder`` is known in this process as one that is being written."""
    place = folder.resolve()
    _mine.add(place)
    try:
        yield
    finally:
        _mine.discard(place)


def begin(folder: Path) -> bool:
    """Mark ``folder`` as being written by this process. Returns whether another save of it may be under way."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = unfinished(folder) is not None and not surely_dead(folder, besides_this=True)
    write_manifest(folder, {"version": 1, "complete": False, "writer": _writer()})
    return shared


def unfinished(folder: Path) -> dict[str, Any] | None:
    """The manifest of a save that has not come to its end, or None; a damaged one tells nothing."""
    try:
        manifest = read_manifest(folder)
    except Damaged:
        return None
    return manifest if manifest is not None and manifest["complete"] is False else None


def surely_dead(folder: Path, besides_this: bool = False) -> bool:
    """Whether nobody can still be writing ``folder``, whose save is unfinished.

    Its process is looked up where it ran on this machine; elsewhere a save is dead when no file changed for a day.
    ``besides_this`` leaves out what this process is doing.
    """
    manifest = unfinished(folder) or {}
    writer, here = manifest.get("writer"), _writer()
    if isinstance(writer, dict) and here["started"] and all(writer.get(key) == here[key] for key in ("boot", "pids")):
        if (writer.get("pid"), writer.get("started")) == (here["pid"], here["started"]):
            return besides_this or folder.resolve() not in _mine
        return _started(writer.get("pid")) != writer.get("started")
    with contextlib.suppress(OSError):  # a file that goes while we look: somebody is there
        times = [path.stat().st_mtime for path in (folder, *folder.rglob("*"))]
        return time.time() - max(times) > _LONG
    return False


def _writer() -> dict[str, Any]:
    pid = os.getpid()
    boot, pids = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        pids = os.readlink("/proc/self/ns/pid")  # numbers of processes mean nothing outside their container
    started = _started(pid) if boot and pids else None
    return {"host": socket.gethostname(), "boot": boot, "pids": pids, "pid": pid, "started": started}


def _started(pid: Any) -> str | None:
    """When a process of this machine started, by the kernel's clock: numbers of processes come again."""
    try:
        return (
            Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, ValueError, TypeError, IndexError):
        return None


# which checkpoints are whole


def checkpoints_in(output: Path) -> list[Path]:
    """The folders of checkpoints in `output`, the newest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output.glob("checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in found if match is not None and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def check(folder: Path, wanted: Callable[[str], bool] = is_read) -> None:
    """Raise Unfinished or Damaged if what is `wanted` of a checkpoint is not what was saved."""
    manifest = read_manifest(folder)
    if manifest is None:
        check_without_manifest(folder, wanted)
        return
    if manifest["complete"] is False:
        raise Unfinished("its save did not finish")
    saved = {name: sums for name, sums in manifest["files"].items() if name != SENTINEL and wanted(name)}
    for name, sums in saved.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing{step_for_missing(name)}")
        if path.stat().st_size != sums["bytes"]:
            _refuse_changed(path, name, f"has {path.stat().st_size} bytes, it was saved with {sums['bytes']}")
    found = checksums([folder / name for name in saved], manifest["piece"])
    for name, sums in saved.items():
        if found[folder / name] != sums:
            _refuse_changed(folder / name, name, "has other contents than were saved")


def _refuse_changed(path: Path, name: str, how: str) -> None:
    try:
        check_file(path)
    except Damaged as problem:
        raise Damaged(f"{name} {how}, and cannot be read: {problem}") from None
    raise Damaged(f"{name} {how}; if that is meant, delete {MANIFEST}, and it is taken as it is")


def instead(folder: Path) -> str:
    """Which other checkpoint is whole, as the end of a sentence."""
    for other in checkpoints_in(folder.parent):
        if other != folder:
            try:
                check(other)
            except (Unfinished, Damaged):
                continue
            return f"; the newest complete checkpoint beside it is {other}"
    return "; no other checkpoint there is complete"


def newest_whole(output: Path) -> str | None:
    """The newest complete checkpoint in `output`, or None where there is none at all, which Trainer says.

    Raises:
        ValueError: it is damaged, or none is complete.
    """
    folders = checkpoints_in(output)
    passed = []
    for folder in folders:
        try:
            check(folder)
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


def checked(folder: Path) -> str:
    """The folder of a checkpoint to resume from, if it is whole.

    Raises:
        ValueError: it is incomplete or damaged.
    """
    if folder.is_dir():  # otherwise Trainer says what is missing
        try:
            check(folder)
        except (Unfinished, Damaged) as problem:
            raise ValueError(_refusal(folder, problem)) from None
    return str(folder)


def _refusal(folder: Path, problem: Exception) -> str:
    return f"{folder} cannot be resumed from: {problem}{instead(folder)}"
