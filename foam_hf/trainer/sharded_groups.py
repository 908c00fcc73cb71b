"""Reads the param groups of a checkpoint of FSDP2, and refuses them if they are not those of this run.

torch loads such a checkpoint by the names of weights: where two of its groups meet in one of this run, that gets the
fields of the last one, and where one is split, a part gets none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PREFIX = "optimizer.param_groups."  # of accelerate's keys in a sharded checkpoint


def check_sharded_groups(optimizer: Any, folder: Path) -> None:
    """Raise CheckpointMismatchError if `optimizer`, a FOAM, has other param groups than the checkpoint in `folder`."""
    from foam_hf.optimizer.state import check_checkpoint

    if groups := _saved_groups(folder):
        check_checkpoint({"param_groups": groups, "state": {}}, optimizer.param_groups)


def _saved_groups(folder: Path) -> list[dict[str, Any]]:
    """The param groups in a checkpoint that accelerate wrote under FSDP2; empty if there is none."""
    import torch

    whole, parts = folder / "optimizer.bin", folder / "optimizer_0"
    if whole.is_file():
        groups: list[dict[str, Any]] = torch.load(whole, weights_only=True, mmap=True)["param_groups"]
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
