"""A Trainer in several processes, of which one is killed after a checkpoint: for tests of what the others do.

torchrun --standalone --nproc_per_node 2 tests/support/killed_rank_worker.py FOLDER
RANK=0 WORLD_SIZE=2 ... python tests/support/killed_rank_worker.py FOLDER  # without a launcher that watches
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.support.devices import DEVICE, choose_gpu
from tests.support.sharding_trainer_worker import run

SAVED, KILLED, STEPS = 2, 3, 6
TIMEOUT_S = 20  # of a collective on GPUs; gloo sees at once that a process has ended


class Killer(TrainerCallback):
    """Kills this process when a step begins, as the kernel does if memory is short."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, world: int, **settings: Any) -> list[Any]:
    timeout = TIMEOUT_S if DEVICE == "cuda" else 120
    saves = {"save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS, "ddp_timeout": timeout}
    return run(folder, world=world, **{**saves, **settings})[1]


def two_processes(folder: Path, device: str, limit_s: float) -> list[subprocess.CompletedProcess]:
    """Two processes that no launcher watches, so that only a collective tells one of the other's end."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    processes = []
    for rank in ("0", "1"):
        own = {**_environment(device), **place, "RANK": rank, "LOCAL_RANK": rank}
        with (folder / f"{rank}.txt").open("w") as out:
            processes.append(subprocess.Popen(command, env=own, cwd=folder, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = [(folder / f"{rank}.txt").read_text(errors="replace") for rank in ("0", "1")]
    return [subprocess.CompletedProcess(command, code, text) for code, text in zip(codes, texts, strict=True)]


def under_torchrun(folder: Path, device: str, limit_s: float) -> subprocess.CompletedProcess:
    """The same two processes, of which torchrun ends one when the other was killed."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, __file__, str(folder)],
        env=_environment(device),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=limit_s,
    )


def _environment(device: str) -> dict[str, str]:
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "FOAM_HF_TEST_DEVICE": device,
        "USE_TF": "0",
    }


if __name__ == "__main__":
    choose_gpu()
    train(Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]), callbacks=(Killer(),))
