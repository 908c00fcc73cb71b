"""Reads the param groups of a checkpoint of FSDP2 or ZeRO, and refuses them if they are not those of this run.

torch loads a checkpoint of FSDP2 by the names of weights: where two of its groups meet in one of this run, that gets
the fields of the last one, and where one is split, a part gets none. DeepSpeed compares its own vectors first, and its
errors speak of those.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

_PREFIX = "optimizer.param_groups."  # of accelerate's keys in a sharded checkpoint


def check_sharded_groups(optimizer: Any, folder: Path) -> None:
    """Raise CheckpointMismatchError if `optimizer`, a FOAM, has other param groups than the checkpoint in `folder`."""
    from foam_hf.optimizer.state import check_checkpoint

    if groups := _saved_groups(folder):
        check_checkpoint({"param_groups": groups, "state": {}}, optimizer.param_groups)


def check_zero_groups(optimizer: Any, folder: Path) -> None:
    """Raise an error if `optimizer`, a FOAM under ZeRO, has other param groups than the checkpoint in `folder`.

    Raises:
        CheckpointMismatchError, ValueError: as `check_flat_groups`.
    """
    from foam_hf.optimizer.flat import check_flat_groups

    groups, by_zero3 = _saved_by_zero(folder)
    if groups:
        check_flat_groups(optimizer, groups, by_zero3)


def _saved_by_zero(folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """The param groups in this process's part of a checkpoint that ZeRO wrote, and whether ZeRO 3 did.

    There are none if there is no such part.
    """
    import torch

    latest = folder / "latest"
    written = folder / latest.read_text(encoding="utf-8").strip() if latest.is_file() else folder
    parts = sorted(written.glob(f"*zero_pp_rank_{torch.distributed.get_rank()}_mp_rank_*_optim_states.pt"))
    if not parts:
        return [], False
    # DeepSpeed reads the same file next, and it holds objects of DeepSpeed's.
    state = _load(parts[0], weights_only=False)["optimizer_state_dict"]
    for name, by_zero3 in (("base_optimizer_state", False), ("optimizer_state_dict", True)):
        inner = state.get(name)
        if isinstance(inner, dict) and "param_groups" in inner:
            return inner["param_groups"], by_zero3
    return [], False


def _load(file: Path, *, weights_only: bool) -> Any:
    """What torch.save wrote; its tensors are mapped, but those of a file of its old format are read."""
    import torch

    return torch.load(file, weights_only=weights_only, mmap=zipfile.is_zipfile(file), map_location="cpu")


def _saved_groups(folder: Path) -> list[dict[str, Any]]:
    """The param groups in a checkpoint that accelerate wrote under FSDP2; empty if there is none."""
    whole, parts = folder / "optimizer.bin", folder / "optimizer_0"
    if whole.is_file():
        groups: list[dict[str, Any]] = _load(whole, weights_only=True)["param_groups"]
        return groups
    if not (parts / ".metadata").is_file():
        return []
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(parts)
    keys = [key.removeprefix(_PREFIX) for key in reader.read_metadata().state_dict_metadata if key.startswith(_PREFIX)]
    fields = [(int(number), name) for number, _, name in (key.partition(".") for key in keys)]
    saved: list[dict[str, Any]] = [{} for _ in range(1 + max((number for number, _ in fields), default=-1))]
    for number, name in fields:
        saved[number][name] = None
    dcp.load({"optimizer": {"param_groups": saved}}, storage_reader=reader, no_dist=True)
    return saved
