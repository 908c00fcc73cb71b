"""Kills runs under ZeRO at random moments, resumes them, and compares their end with that of a run nobody killed.

    python -m tests.support.zero_kill FOLDER TIMES [STAGE ...]

A run that cannot go on must say so; it then starts anew. A difference without an error is a failure.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import tests.support.zero_trainer_worker as worker
from tests.support.torchrun import launch

STEPS = 8


def train(folder: Path, stage: int) -> None:
    """The function that every process of the launcher runs: go on from the newest complete checkpoint."""
    torch.set_num_threads(1)
    found = any(folder.glob("checkpoint-*"))
    try:
        _, steps = worker.run(
            folder,
            world=2,
            deepspeed=worker.config(stage, zero=worker.exact(stage)),
            resume=True if found else None,
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
        )
    except ValueError as error:  # no save has finished yet
        (folder / "said.txt").write_text(str(error))
        raise
    if os.environ["RANK"] == "0":
        torch.save(steps[-1], folder / "unfinished.pt")
        os.replace(folder / "unfinished.pt", folder / "final.pt")


def start(folder: Path, stage: int) -> int:
    """Start a run of two processes in a process group of its own; returns the id of the group."""
    child = os.fork()  # what the run needs is imported already
    if child == 0:
        os.setsid()
        try:
            launch(2, train, folder, stage)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def kill_and_resume(folder: Path, stage: int, times: int) -> dict[str, int]:
    """Returns how often a run was killed, and how often it refused to resume and started anew."""
    folder.mkdir(parents=True)
    clock = time.monotonic()
    os.waitpid(start(folder / "whole", stage), 0)
    length = time.monotonic() - clock
    expected = torch.load(folder / "whole" / "final.pt")
    killed = refused = rounds = 0
    while killed < times:
        rounds += 1
        run = folder / f"killed{rounds}"
        while not (run / "final.pt").is_file():
            child = start(run, stage)
            deadline = time.monotonic() + random.uniform(0.2, 1.0) * length if killed < times else float("inf")
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    killed += 1
                    break
                time.sleep(0.01)
            if (run / "said.txt").is_file():
                refused += 1
                shutil.rmtree(run)
        assert torch.equal(torch.load(run / "final.pt"), expected), f"ZeRO {stage}: another end without an error"
        print(f"ZeRO {stage}: {killed} kills, {refused} refusals, {rounds} runs ended with the same bits", flush=True)
    return {"killed": killed, "refused": refused, "runs": rounds}


if __name__ == "__main__":
    for number in map(int, sys.argv[3:] or ["2", "3"]):
        random.seed(number)
        kill_and_resume(Path(sys.argv[1]) / f"zero{number}", number, int(sys.argv[2]))
