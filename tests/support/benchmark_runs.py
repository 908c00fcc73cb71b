"""What the tests of recipes/benchmarks share: their scripts as commands, and called in this process."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "recipes" / "benchmarks"
# What a case imports itself takes it some ten seconds; the server that all cases are forked from does so once.
IMPORTED_ONCE = ["torch", "torch._dynamo", "transformers.trainer", "transformers.models.llama.modeling_llama"]


def run(script: str, *words: str, check: bool = True) -> subprocess.CompletedProcess:
    """A script, named as in `speed.step_speed`, as the command that a user gives."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", f"recipes.benchmarks.{script}", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=500)
    assert done.returncode == 0 or not check, done.stderr
    return done


def call(script: str, *words: str) -> str:
    """What the main() of a script prints; it still runs every case in a process of its own."""
    start_server()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        importlib.import_module(f"recipes.benchmarks.{script}").main([*words])
    return printed.getvalue()


def refused(script: str, *words: str) -> str:
    """The error of a script whose arguments are wrong."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            importlib.import_module(f"recipes.benchmarks.{script}").main([*words])
        except SystemExit as stopped:
            assert stopped.code not in (None, 0)
        else:
            raise AssertionError(f"{script} {words} was not refused")
    return told.getvalue()


def start_server() -> None:
    """multiprocessing's forkserver of this process, where none runs yet."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_ONCE)
    multiprocessing.forkserver.ensure_running()
