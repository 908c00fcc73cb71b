"""The manifest of a checkpoint: which process is writing it and, once it is complete, the CRC-32 of every file.

This file knows nothing of the Trainer.
"""

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
    advice_for_missing,
    check_file,
    check_without_manifest,
    is_read_on_resume,
)

logger = logging.getLogger("foam_hf")

PIECE = 1 << 26  # bytes of a file under one checksum: several are read in parallel
SENTINEL = "checkpoint-is-incomplete.txt"  # `enable_jit_checkpoint` removes it after the manifest is written
_READ_BYTES = 1 << 20
_SECONDS_UNTIL_DEAD = 24 * 3600.0  # without a change, for a save by another machine

Stamp = tuple[int, int, int]  # size, time of the last change, inode


def files_of(folder: Path) -> list[Path]:
    """The files that belong into the manifest of ``folder``."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name != SENTINEL)
    return sorted(path for path in kept if not path.name.startswith(MANIFEST))


def file_stamps(files: list[Path]) -> dict[Path, Stamp]:
    """Size, time of the last change and inode of each file: they show a change without reading the file."""
    found = {path: path.stat() for path in files}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


def complete_manifest(folder: Path, known: dict[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Flush the files of ``folder`` to the disk, then write a manifest with their checksums.

    Args:
        folder: a checkpoint whose files are all written.
        known: checksums of files that have not changed; they are not computed again.

    Returns:
        The checksums of all files.
    """
    files = files_of(folder)
    new = [path for path in files if path not in known]
    for path in new:
        flush_to_disk(path)
    for parent in {path.parent for path in files}:
        flush_to_disk(parent)
    sums = {path: known[path] for path in files if path in known} | checksums(new)
    named = {path.relative_to(folder).as_posix(): sums[path] for path in files}
    write_manifest(folder, {"version": 1, "complete": True, "piece": PIECE, "files": named})
    flush_to_disk(folder.parent)
    return sums


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Replace the manifest by a rename, so that a crash leaves the old one or the new one."""
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
    flush_to_disk(folder)


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no fsync; the checksums find what is lost
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of ``folder``, or None if it has none.

    Raises:
        Damaged: the manifest cannot be read, or lacks a field.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        if content["complete"] is not False:
            entries = content["files"].items()
            sums = [(str(name), int(entry["bytes"]), list(entry["crc32"])) for name, entry in entries]
            if content["complete"] is not True or int(content["piece"]) < 1 or not sums:
                raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(
            f"{MANIFEST} is damaged; if that file is deleted, the others are checked by their own formats alone"
        ) from None
    return content


def checksums(files: list[Path], piece: int | None = None) -> dict[Path, dict[str, Any]]:
    """Size and CRC-32 of each ``piece`` bytes of every file."""
    piece = piece or PIECE
    sizes = {path: path.stat().st_size for path in files}
    pieces = [(path, start) for path in files for start in range(0, sizes[path], piece)]
    sums: dict[Path, list[int]] = {path: [] for path in files}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # reading and zlib release the interpreter lock
        for (path, _), value in zip(pieces, pool.map(lambda at: _crc(at[0], at[1], piece), pieces), strict=True):
            sums[path].append(value)
    return {path: {"bytes": sizes[path], "crc32": sums[path]} for path in files}


def _crc(path: Path, start: int, piece: int) -> int:
    value = 0
    with open(path, "rb") as file:
        file.seek(start)
        for at in range(0, piece, _READ_BYTES):
            data = file.read(min(_READ_BYTES, piece - at))
            if not data:
                break
            value = zlib.crc32(data, value)
    return value


# which process is writing a checkpoint

_written_here: set[Path] = set()  # checkpoints that this process is writing now


@contextlib.contextmanager
def mark_as_written_here(folder: Path) -> Iterator[None]:
    """Inside it, `writer_is_gone` takes ``folder`` for a checkpoint that this process is writing."""
    resolved = folder.resolve()
    _written_here.add(resolved)
    try:
        yield
    finally:
        _written_here.discard(resolved)


def begin(folder: Path) -> bool:
    """Write an incomplete manifest that names this process.

    Returns:
        Whether another process may be writing ``folder`` too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = unfinished_manifest(folder) is not None and not writer_is_gone(folder, ignore_this_process=True)
    write_manifest(folder, {"version": 1, "complete": False, "writer": _this_process()})
    return shared


def unfinished_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of ``folder`` if its save has not finished; None for a complete, damaged or missing one."""
    try:
        manifest = read_manifest(folder)
    except Damaged:
        return None
    return manifest if manifest is not None and manifest["complete"] is False else None


def writer_is_gone(folder: Path, ignore_this_process: bool = False) -> bool:
    """Whether no process can still be writing ``folder``, whose save is unfinished.

    A process of this machine is looked up. A save by another machine is dead if no file changed for a day.

    Args:
        folder: of a checkpoint whose manifest is incomplete.
        ignore_this_process: whether a save by this process counts as gone.
    """
    manifest = unfinished_manifest(folder) or {}
    writer, here = manifest.get("writer"), _this_process()
    if isinstance(writer, dict) and here["started"] and all(writer.get(key) == here[key] for key in ("boot", "pids")):
        if (writer.get("pid"), writer.get("started")) == (here["pid"], here["started"]):
            return ignore_this_process or folder.resolve() not in _written_here
        return _start_time(writer.get("pid")) != writer.get("started")
    with contextlib.suppress(OSError):  # a file vanished between listing and stat: a process is at work
        times = [path.stat().st_mtime for path in (folder, *folder.rglob("*"))]
        return time.time() - max(times) > _SECONDS_UNTIL_DEAD
    return False


def _this_process() -> dict[str, Any]:
    """What a manifest says of its writer: host, boot, namespace of process ids, id and start time of the process."""
    pid = os.getpid()
    boot, pids = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        pids = os.readlink("/proc/self/ns/pid")  # process ids are unique within one container only
    started = _start_time(pid) if boot and pids else None
    return {"host": socket.gethostname(), "boot": boot, "pids": pids, "pid": pid, "started": started}


def _start_time(pid: Any) -> str | None:
    """When a process started, in ticks of the kernel, or None: process ids are reused, a start time is not."""
    try:
        return (
            Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, ValueError, TypeError, IndexError):
        return None


# which checkpoints are complete


def checkpoints_in(output: Path) -> list[Path]:
    """The folders of checkpoints in `output`, the newest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output.glob("checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in found if match is not None and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def check(folder: Path, wanted: Callable[[str], bool] = is_read_on_resume) -> None:
    """Compare the `wanted` files of a checkpoint with its manifest.

    Raises:
        Unfinished: the save was interrupted.
        Damaged: a file is missing or differs from the one that was saved.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        check_without_manifest(folder, wanted)
        return
    saved = _check_sizes(folder, manifest, wanted)
    found = checksums([folder / name for name in saved], manifest["piece"])
    for name, sums in saved.items():
        if found[folder / name] != sums:
            _refuse_changed(folder / name, name, "has other contents than were saved")


def check_sizes(folder: Path) -> None:
    """As `check`, but large files are not read, unless one has another size than was saved."""
    manifest = read_manifest(folder)
    if manifest is None:
        check_without_manifest(folder, lambda name: name == "trainer_state.json")
    else:
        _check_sizes(folder, manifest, is_read_on_resume)


def _check_sizes(folder: Path, manifest: dict[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The entries of the `wanted` files in a manifest, once all are there in their sizes."""
    if manifest["complete"] is False:
        raise Unfinished("its save did not finish")
    saved = {name: sums for name, sums in manifest["files"].items() if name != SENTINEL and wanted(name)}
    for name, sums in saved.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing{advice_for_missing(name)}")
        if path.stat().st_size != sums["bytes"]:
            _refuse_changed(path, name, f"has {path.stat().st_size} bytes, it was saved with {sums['bytes']}")
    return saved


def _refuse_changed(path: Path, name: str, how: str) -> None:
    try:
        check_file(path)
    except Damaged as problem:
        raise Damaged(f"{name} {how}, and cannot be read: {problem}") from None
    raise Damaged(f"{name} {how}; if that is meant, delete {MANIFEST}, and the file is read as it is")


def name_complete_checkpoint(folder: Path) -> str:
    """The newest complete checkpoint beside `folder`, as the end of an error message."""
    for other in checkpoints_in(folder.parent):
        if other != folder:
            try:
                check(other)
            except (Unfinished, Damaged):
                continue
            return f"; the newest complete checkpoint beside it is {other}"
    return "; no other checkpoint there is complete"


def newest_complete(output: Path) -> str | None:
    """The newest complete checkpoint in `output`, or None if `output` has no checkpoint, which Trainer reports.

    Raises:
        ValueError: the newest one whose save finished is damaged, or no save finished.
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


def checked_folder(folder: Path) -> str:
    """The path of a checkpoint to resume from, after it was checked.

    Raises:
        ValueError: the checkpoint is incomplete or damaged.
    """
    if folder.is_dir():  # otherwise Trainer reports the missing folder
        try:
            check(folder)
        except (Unfinished, Damaged) as problem:
            raise ValueError(_refusal(folder, problem)) from None
    return str(folder)


def _refusal(folder: Path, problem: Exception) -> str:
    return f"{folder} cannot be resumed from: {problem}{name_complete_checkpoint(folder)}"
