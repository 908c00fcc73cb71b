"""The Trainer under DDP with every rule and feature, in two processes, for tests/optimizer/test_ddp.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.sharding_trainer_worker import BLOCKS, DEFAULT, MUON, SHORT, lora, run
from tests.support.torchrun import launch

# Settings of runs of SHORT steps, each compared with the same run in one process.
CASES: dict[str, dict[str, Any]] = {
    "default": {"optim_args": DEFAULT},
    "default, row": {"optim": "foam_mini", "optim_args": "scale=0.25"},
    "row": {"optim": "foam_mini", "optim_args": "scale=0.25,embedding_rule=block"},
    "factored": {"optim_args": "level=3,scale=0.25,second_moment=factored"},
    "muon": {"optim": "foam_muon", "optim_args": "level=3"},
    "muon, embeddings and head plain": MUON,
    "adam_mini": {"optim": "foam_adam_mini", "optim_args": "level=3"},
    "plain_state=8bit": {"optim_args": f"{BLOCKS},plain_state=8bit"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "release, accumulation": {
        "optim_args": "level=3,scale=0.25,gradient_release=true",
        "gradient_accumulation_steps": 2,
    },
    "clipping": {"max_grad_norm": 0.05},
    "lora": {"model": lora},
}


def case(folder: Path, name: str, world: int = 1) -> list[torch.Tensor]:
    settings = {key: value() if key == "model" else value for key, value in CASES[name].items()}
    return run(folder, world=world, **settings)[1]


def resumed(folder: Path, world: int) -> list[torch.Tensor]:
    """The steps after a checkpoint of two processes."""
    return run(folder, world=world, resume=folder / "saved" / "checkpoint-2", max_steps=2 + SHORT)[1]


def as_one_rank(folder: Path) -> None:
    """The function that every process of the launcher runs."""
    found: dict[str, Any] = {name: case(folder, name, world=2) for name in CASES}
    run(folder / "saved", world=2, max_steps=2, save_strategy="steps", save_steps=2)
    found["resumed"] = resumed(folder, world=2)
    if int(os.environ["RANK"]) == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch(2, as_one_rank, Path(sys.argv[1]))
