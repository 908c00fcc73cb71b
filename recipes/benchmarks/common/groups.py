"""A group of processes for every case: one that fails or hangs ends with its case, and takes no other with it."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from recipes.benchmarks.common.harness import answer_into

GRACE_S = 5  # for the others, once a process has failed: they may wait for it for ever


def start_server(preload: Sequence[str]) -> None:
    """Start the server that all processes are forked from; it imports `preload` once, and never touches a GPU."""
    # is_available() asks the driver otherwise, and then no process that is forked can use a GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    multiprocessing.forkserver.ensure_running()


def run_group(
    function: Callable[..., dict], *args, world: int, device: str, timeout: float, env: dict[str, str] | None = None
) -> dict:
    """`function(*args)` in `world` processes with the environment that torchrun gives, one GPU for each.

    Returns the dict of rank 0 with "status": "ok". If a process fails, its status and reason, see
    ``harness.run_alone``; after `timeout` seconds all are killed, and the status is "failed".
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder, f"answer{rank}.json") for rank in range(world)]
        port = _free_port()
        processes = []
        for rank, answer in enumerate(answers):
            variables = {**_environment(rank, world, port, device), **(env or {})}
            log = Path(folder, f"log{rank}.txt")
            processes.append(context.Process(target=answer_into, args=(function, args, variables, answer, log)))
        for process in processes:
            process.start()
        stopped, late = _wait(processes, answers, timeout)
        ranks = sorted(range(world), key=lambda rank: _when(answers[rank], rank in stopped))
        rows = [_row(rank, processes[rank], answers[rank], late) for rank in ranks]
        failed = [row for row in rows if row["status"] != "ok"]
        return failed[0] if failed else rows[ranks.index(0)]


def _environment(rank: int, world: int, port: int, device: str) -> dict[str, str]:
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    found |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": device}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(world)))
    return {name: str(value) for name, value in found.items()} | {"CUDA_VISIBLE_DEVICES": gpus}


def _when(answer: Path, stopped: bool) -> float:
    """A time to sort by, so that the cause is the first that failed: who died without a word, then by answers."""
    if answer.is_file():
        return answer.stat().st_mtime_ns
    return float("inf") if stopped else 0.0


def _wait(processes: list, answers: list[Path], timeout: float) -> tuple[set[int], bool]:
    """Wait for all, or stop those that are left; says which these were, and whether the time was over."""
    end = time.monotonic() + timeout
    failed, stopped = None, set()
    while any(process.is_alive() for process in processes):
        time.sleep(0.05)
        ended = [rank for rank, process in enumerate(processes) if not process.is_alive()]
        if failed is None and any(not _is_ok(answers[rank]) for rank in ended):
            failed = time.monotonic()
        if time.monotonic() > (end if failed is None else min(end, failed + GRACE_S)):
            stopped = {rank for rank, process in enumerate(processes) if process.is_alive()}
            for process in processes:
                process.kill()
            break
    for process in processes:
        process.join()
    return stopped, failed is None and time.monotonic() > end


def _is_ok(answer: Path) -> bool:
    return answer.is_file() and json.loads(answer.read_text(encoding="utf-8"))["status"] == "ok"


def _row(rank: int, process, answer: Path, late: bool) -> dict:
    if answer.is_file():
        return json.loads(answer.read_text(encoding="utf-8"))
    log = answer.with_name(f"log{rank}.txt")
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if log.is_file() else []
    what = "took too long" if late else f"process {rank} ended with code {process.exitcode}"
    return {"status": "failed", "reason": " ".join([what, *last])[:300]}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
