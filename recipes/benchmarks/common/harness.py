"""What both speed benchmarks share: a fresh process for every case, results that survive a killed run, timing."""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from foam_hf.recipe_kit import write_json
from recipes.benchmarks.common.folders import RESULTS


def run_alone(function: Callable[..., dict], *args, env: dict[str, str] | None = None, timeout: float = 600) -> dict:
    """`function(*args)` in a process of its own, so that memory and caches are clean and a crash costs one row.

    The dict it returned with "status": "ok"; else the status is "missing" (a package), "does not fit" (out of memory)
    or "failed", with a "reason".
    """
    # The server imports torch once and never touches the GPU, so a process starts in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "answer.json"), Path(folder, "log.txt")
        process = context.Process(target=answer_into, args=(function, args, env or {}, answer, log))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            return {"status": "failed", "reason": f"took more than {timeout:.0f} s"}
        if answer.is_file():
            return json.loads(answer.read_text(encoding="utf-8"))
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        return {"status": "failed", "reason": " ".join([f"the process ended with code {process.exitcode}", *last])}


def answer_into(function: Callable[..., dict], args: tuple, env: dict[str, str], answer: Path, log: Path) -> None:
    """Call `function` in this process, write what came of it to `answer`, and all that it prints to `log`."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU, also where there are several
    os.environ.update(env)
    with open(log, "w", encoding="utf-8") as stream:  # warnings of a dozen packages would bury the table
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        result = {"status": "ok", **function(*args)}
    except ImportError as error:
        result = {"status": "missing", "reason": _one_line(error)}
    except torch.OutOfMemoryError as error:
        result = {"status": "does not fit", "reason": _one_line(error).split(". ")[0]}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        result = {"status": "failed", "reason": f"{_one_line(error)} ({Path(where.filename).name}:{where.lineno})"}
    write_json(answer, result)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Results:
    """The JSON of one machine: its rows, rewritten whole after every case; a case measured again replaces its row."""

    def __init__(self, folder: Path, benchmark: str, machine: dict) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
        self.path = folder / f"{benchmark}-{slug}.json"
        self.content = {"benchmark": benchmark, "machine": machine, "rows": []}
        if self.path.is_file():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            self.content["rows"] = [{"date": earlier["machine"]["date"], **row} for row in earlier["rows"]]

    def has(self, key: dict) -> bool:
        return any(_is(row, key) and row["status"] in ("ok", "does not fit") for row in self.content["rows"])

    def record(self, key: dict, row: dict) -> None:
        others = [old for old in self.content["rows"] if not _is(old, key)]
        self.content["rows"] = [*others, {**key, **row, "date": self.content["machine"]["date"]}]
        write_json(self.path, self.content)


def _is(row: dict, key: dict) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def run_cases(results: Results, cases: list[dict], measure: Callable[[dict], dict], options) -> None:
    """Measure each case (its key in the results) until --budget-s; prints a line each."""
    started = time.monotonic()
    if options.resume:
        cases = [case for case in cases if not results.has(case)]
    for index, case in enumerate(cases):
        if time.monotonic() - started > options.budget_s:
            print(
                f"--budget-s is over: {len(cases) - index} of {len(cases)} cases were not run; add --resume to go on"
            )
            break
        row = measure(case)
        results.record(case, row)
        said = row.get("reason") or ("done" if row["ms"] is None else f"{row['ms']:.3f} ms")
        print(
            f"{time.monotonic() - started:6.0f} s  {' '.join(map(str, case.values()))}: {row['status']}, {said}",
            flush=True,
        )
    print(f"Results: {results.path}")


def add_options(parser) -> None:
    """The options of both benchmarks."""
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    help = "folder of the JSON files, one for each machine (default: recipes/benchmarks/results)"
    parser.add_argument("--results", type=Path, default=RESULTS, help=help)
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start no case after so many seconds")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON already has")


def names_of(
    parser: argparse.ArgumentParser, options: argparse.Namespace, kind: str, known: Collection[str]
) -> list[str]:
    """The names that an option lists with commas; the parser's error if one is not among those that are known."""
    names = getattr(options, kind).split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--{kind}: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    return names


def machine_of(device: str) -> dict:
    """What `probe` finds, in a process of its own; SystemExit if there is no such device."""
    machine = run_alone(probe, device)
    if machine.pop("status") != "ok":
        raise SystemExit(f"no {device} device to measure on: {machine['reason']}")
    return machine


def probe(device: str) -> dict:
    """The machine, its software, and the speed of a large copy in GB/s, bytes read plus bytes written."""
    # A large block, but one that a small machine holds twice.
    size = 2**31 if device == "cuda" else 2**28
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(times(device, lambda: target.copy_(source), repeats=20)) / 1000
    return {
        "name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "driver": _driver() if device == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "copy_GBps": round(2 * size / seconds / 1e9, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def times(
    device: str, step: Callable[[], object], repeats: int, before: Callable[[], object] | None = None
) -> list[float]:
    """Milliseconds of each of `repeats` calls after two unmeasured ones; `before` runs before each, untimed.

    On a GPU the calls are queued without waiting for one another, as in training, and events between them tell the
    time: what the host does counts only as far as the GPU has to wait for it.
    """
    marks = []
    for _ in range(repeats + 2):
        if before:
            before()
        marks.append((now(device), step(), now(device)))
    synchronize(device)
    return [elapsed(start, end) for start, _, end in marks[2:]]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def now(device: str):
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start, end) -> float:
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return f"{found[1].strip() if found else platform.machine()}, {torch.get_num_threads()} threads"
