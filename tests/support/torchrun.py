"""torchrun's launcher for processes that need what this one has imported already."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(world: int, function: Callable[..., None], *args: Any) -> None:
    """``function(*args)`` in `world` processes, as ``torchrun --standalone --nproc_per_node world`` sets them up.

    They are forked from this one, in which no thread of torch's may have started: importing what a Trainer needs takes
    a process some ten seconds. They end without the interpreter's end, which gloo's threads may abort (pytorch pull
    request 179291).
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
    )
    elastic_launch(config, function)(*args)
