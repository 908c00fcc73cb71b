"""Checkpoints of the Trainer under DeepSpeed's ZeRO that a run with another config, options or model goes on from.

For tests/zero/test_checkpoints.py: two processes write each checkpoint after one of two steps, and try to make the
second one from it again.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.tiny_models import tiny_llama
from tests.support.torchrun import launch
from tests.support.zero_trainer_worker import config, exact, run

WROTE = "level=4,residual_scale=0.5,scale=2.0,fold_embeddings=false"
OTHERS = (
    *("level=4", "fold_embeddings=false", "embedding_scale=1", "level=0", "second_moment=block"),
    f"{WROTE},fold_head=false",  # of which only the length of a group tells
)
OLD_FORMAT = {"checkpoint": {"checkpoint_serialization": False}}


class Resumed(NamedTuple):
    """What came of going on from a checkpoint: the error's text, or the weights after the second step."""

    error: str
    weights: Tensor | None
    expected: Tensor | None  # of the run that wrote the checkpoint, after its second step


class Case(NamedTuple):
    """Settings of the run that writes a checkpoint, and what is other in the one that goes on from it."""

    wrote: dict[str, Any]
    here: dict[str, Any]


def zero(stage: int, more: dict[str, Any] | None = None, **section: Any) -> dict[str, Any]:
    return {"deepspeed": config(stage, zero=exact(stage, **section), **(more or {}))}


def wider() -> Any:
    """A model with the names of the others' weights."""
    return tiny_llama(intermediate_size=96)


CASES: dict[str, Case] = {
    "ZeRO 1 under 2": Case(zero(1), zero(2)),
    "ZeRO 2 under 1": Case(zero(2), zero(1)),
    "ZeRO 2 under 3": Case(zero(2), zero(3)),
    "ZeRO 3 under 2": Case(zero(3), zero(2)),
    "ZeRO 3 under 1, other options": Case(zero(3), {**zero(1), "optim_args": "level=4"}),
    "sub_group_size": Case(zero(3), zero(3, sub_group_size=3000)),
    "round_robin_gradients": Case(zero(2), zero(2, round_robin_gradients=True)),
    **{f"wider {stage}": Case({**zero(stage), "model": wider}, {"model": tiny_llama}) for stage in (1, 2, 3)},
    "old format": Case(zero(2, OLD_FORMAT), {}),
    "old format, other options": Case(zero(2, OLD_FORMAT), {"optim_args": "level=4"}),
    "AdamW's": Case(
        {**zero(2), "optim": "adamw_torch", "optim_args": None}, {"optim": "foam", "optim_args": "level=4"}
    ),
}


def write(folder: Path, settings: dict[str, Any]) -> tuple[Path, Tensor | None]:
    """The checkpoint after the first step, and on rank 0 the weights after the second."""
    _, steps = run(folder, world=2, max_steps=2, save_strategy="steps", save_steps=1, **settings)
    return folder / "checkpoint-1", steps[-1] if steps else None


def go_on(checkpoint: Path, expected: Tensor | None, settings: dict[str, Any]) -> Resumed:
    try:
        _, steps = run(checkpoint.parent / "again", world=2, max_steps=2, resume=checkpoint, **settings)
    except Exception as error:  # DeepSpeed's own may be of any class
        return Resumed(f"{type(error).__name__}: {error}", None, expected)
    assert len(steps) == (dist.get_rank() == 0), "one step was left to make"
    return Resumed("", steps[-1] if steps else None, expected)


def other_options(folder: Path, stage: int) -> tuple[dict[str, str], dict[str, Any]]:
    """What of `optim` and `optim_args` each error on OTHERS names, and what comes of every choice that is named."""
    checkpoint, expected = write(folder, {**zero(stage), "optim_args": WROTE})
    named = {}
    for others in OTHERS:
        error = go_on(checkpoint, expected, {**zero(stage), "optim_args": others}).error
        named[others] = error.partition("To go on with this checkpoint: ")[2]
    again = {}
    for advice in dict.fromkeys(named.values()):
        if choice := re.fullmatch(r"optim='(\w+)', optim_args='(.*)'\.", advice):
            settings = {**zero(stage), "optim": choice[1], "optim_args": choice[2]}
            again[advice] = go_on(checkpoint, expected, settings)._asdict()
    return named, again


def as_one_rank(folder: Path) -> None:
    """The function that every process of the launcher runs."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        checkpoint, expected = write(folder / name, case.wrote)
        if "old format" in name:
            parts = [*checkpoint.glob("global_step1/*.pt")]
            assert parts and not any(map(zipfile.is_zipfile, parts))
        results[name] = go_on(checkpoint, expected, {**case.wrote, **case.here})._asdict()
    for stage in (1, 2, 3):
        results[f"options {stage}"] = other_options(folder / f"options{stage}", stage)
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    launch(2, as_one_rank, Path(sys.argv[1]))
