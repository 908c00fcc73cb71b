"""Runs of a script as forks of one process that has imported everything.

A fork works on a GPU only while its parent has not touched CUDA, so the parent asks NVML where a package asks CUDA
at its import. Where that does not work out, `warm` returns None and runs are started as processes of their own.
`Queue` keeps as many of them going as a study asks for.
"""

import contextlib
import logging
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

from recipes.benchmarks.common.folders import ROOT, load_script

LOG = "log.txt"  # in the folder of each run
CONTEXT = 0.01  # of the GPU's memory, for each process beside its tensors
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "mha_graph")  # the last is cuDNN's way to say so


def warm(script: Path):
    """The module of `script`, imported with all it needs and tried on the GPU by a fork; None if a fork failed."""
    os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    sys.modules.setdefault("torchao", None)  # peft imports it if it can, it starts CUDA, and no run needs it
    with _capability_from_nvml():
        train = load_script(script, f"forked_{script.stem}")
    pid = os.fork()
    if pid == 0:
        _exit_after(_touch_gpu)
    return train if os.waitpid(pid, 0)[1] == 0 else None


@contextlib.contextmanager
def _capability_from_nvml():
    """bitsandbytes asks for the GPU's compute capability when peft imports it."""
    import torch

    original = torch.cuda.get_device_capability

    def capability(device=None) -> tuple[int, int]:
        import pynvml

        pynvml.nvmlInit()
        return tuple(pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0)))

    torch.cuda.get_device_capability = capability
    try:
        yield
    finally:
        torch.cuda.get_device_capability = original


def _touch_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.ones(1, device="cuda").item()


def _exit_after(function, *arguments) -> None:
    """Call it and end this process, without what the parent has registered for its own end."""
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as error:
        print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Run:
    """One run of a script, forked from here if `train` is its module; its output goes to `log`.

    A fork takes at most the `share` of the GPU's memory, so that what one has cached does not starve the others.
    """

    def __init__(self, train, words: list[str], log: Path, threads: int, share: float, script: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        (log.parent / "results.json").unlink(missing_ok=True)  # of a run whose study was killed before it was read
        self.code: int | None = None
        self.process = None
        with open(log, "w", encoding="utf-8") as stream:
            if train is None:
                folders = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])  # for scripts that import recipes
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(folders)}
                command = [sys.executable, str(script), *words]
                self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
                self.pid = self.process.pid
                return
            sys.stdout.flush()
            sys.stderr.flush()
            self.pid = os.fork()
            if self.pid == 0:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
                _exit_after(_train, train, words, threads, share)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.process is not None:
            return self.process.poll()
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0) if self.process is None else self.process.wait()


def _train(train, words: list[str], threads: int, share: float) -> None:
    import torch

    torch.set_num_threads(threads)
    if torch.cuda.is_available() and share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("foam_hf").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast in every layer of every step
    train.main(words)


def read_log(folder: Path) -> str:
    """What the run of this folder printed."""
    return (folder / LOG).read_text(encoding="utf-8", errors="replace")


def remove_all_but(folder: Path, *names: str) -> None:
    """Remove what a run wrote into its folder, but these files: saved models fill a disk."""
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Queue:
    """The jobs of a study: waiting, running, finished.

    A job has `order`, by which a study may sort those that wait; `run`, a `Run` once it is started; `tries`, how often
    it was; `finish()`, called when that has ended; then `record`, None if it failed, and `log`, what it printed last;
    `what`, its name in the line that is printed.
    """

    def __init__(self, budget_s: float):
        self.budget_s = budget_s
        self.waiting: list = []
        self.earlier: dict = {}  # a job's key -> its record, of an earlier call
        self.running: list = []
        self.finished: list = []
        self.started = time.monotonic()

    def add(self, jobs: list) -> None:
        """Put jobs into the queue; those that an earlier call finished, whose records are in `earlier`, are done."""
        for job in jobs:
            job.record = self.earlier.get(job.key)
            (self.finished if job.record else self.waiting).append(job)
        self.waiting.sort(key=lambda job: job.order)
        self.choose()

    def choose(self) -> None:
        """Queue what follows from the jobs that have ended; called as jobs join."""

    def fill(self, start) -> None:
        """Move jobs from those that wait to those that run, by `start(job)`, as there is room and time."""
        raise NotImplementedError

    def put_off(self, job) -> None:
        """Let a job wait that ran out of memory the first time: behind all others, when the GPU has emptied."""
        job.order = (math.inf, *job.order)  # whatever numbers the orders of others begin with
        self.waiting.append(job)

    def ended(self, job) -> str:
        """Keep what a job has found, and say it in a few words."""
        raise NotImplementedError

    def report(self):
        """Write what has been found so far; called after each job."""

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> int:
        return len(self.waiting) + len(self.running)

    def collect(self) -> None:
        """Take in the runs that have ended."""
        for job in [job for job in self.running if job.run.poll() is not None]:
            self.running.remove(job)
            job.finish()
            if not job.record and job.tries == 1 and any(words in job.log for words in NO_MEMORY):
                self.put_off(job)
                continue
            self.finished.append(job)
            said = self.ended(job)
            print(f"{self.elapsed():6.0f} s  {job.what}  {said}  ({self.left()} left)", flush=True)
            self.report()

    def run(self, start) -> None:
        """Run all jobs, those too that join meanwhile, or as many as end within the budget."""
        try:
            while self.waiting or self.running:
                self.collect()
                if self.elapsed() > self.budget_s:
                    break
                self.fill(start)
                if not self.running and self.waiting:
                    break  # no time for any of them
                time.sleep(0.1)
        finally:
            for job in self.running:  # out of time, or interrupted: leave no process behind
                job.run.terminate()
