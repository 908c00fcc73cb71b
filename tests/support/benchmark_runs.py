"""Functions that run a script of recipes/benchmarks, as a command or in this process."""

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

from tests.support.printing import printed

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "recipes" / "benchmarks"
# Importing these takes about ten seconds. The server that cases are forked from imports them once.
IMPORTED_ONCE = ["torch", "torch._dynamo", "transformers.trainer", "transformers.models.llama.modeling_llama"]


def run(script: str, *words: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script, with a name as `speed.step_speed`, as a user's command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", f"recipes.benchmarks.{script}", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=500)
    assert done.returncode == 0 or not check, done.stderr
    return done


def call(script: str, *words: str) -> str:
    """Call the main() of a script and return what it prints. It still runs every case in its own process."""
    start_server()
    return printed(importlib.import_module(f"recipes.benchmarks.{script}").main, [*words])


def refused(script: str, *words: str) -> str:
    """What a script prints to stderr when its arguments are wrong; AssertionError if it accepts them."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            importlib.import_module(f"recipes.benchmarks.{script}").main([*words])
        except SystemExit as stopped:
            assert stopped.code not in (None, 0)
        else:
            raise AssertionError(f"{script} {words} was not refused")
    return stderr.getvalue()


def start_server() -> None:
    """Start multiprocessing's forkserver for this process, unless it runs already."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_ONCE)
    multiprocessing.forkserver.ensure_running()
