"""torchrun's launcher, with processes that on CPUs are forked from this one and need not import everything again."""

from __future__ import annotations

import gc
import importlib
import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.support.devices import DEVICE

# What models, Trainers and adapters import when they are first used, which each process would do for itself.
IMPORTED_ONCE = ("peft", "torch._dynamo", "transformers.models.llama.modeling_llama", "transformers.trainer")


def launch(world: int, function: Callable[..., None], *args: Any) -> None:
    """``function(*args)`` in `world` processes, as ``torchrun --standalone --nproc_per_node world`` sets them up.

    On CPUs they are forked, because importing what a Trainer needs takes about ten seconds. No thread of torch may run
    in this process before. With GPUs they are new, as a process that is forked cannot use a GPU. The children exit
    without shutting down Python, as gloo's threads may abort that (pytorch pull request 179291).
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork" if DEVICE == "cpu" else "spawn",
        max_restarts=0,
    )
    for name in IMPORTED_ONCE if DEVICE == "cpu" else ():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what was imported is no garbage, and every process would look for it there
    elastic_launch(config, function)(*args)
