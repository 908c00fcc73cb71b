"""GLUE scores of several optimizers on one machine: a learning-rate search on a seed of its own, then the seeds.

Every run is a process of recipes/glue/train.py, --jobs of them at a time. Rerun the same command to go on: finished
runs are kept. The JSON (all runs, the rates tried, what failed) is rewritten after every run, whole or not at all, so
a run cut off by --budget-s or from outside loses nothing; recipes/glue/table.py reads it.

    python -m recipes.benchmarks.quality.glue_gpu --data glue --model MiniLM --out runs --json results.json \\
        --jobs 12 --search-train-samples sst2=10000 --bf16 true
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from foam_hf.recipe_kit import write_json
from recipes.benchmarks.common.folders import RECIPES
from recipes.benchmarks.common.forked import LOG, read_log, remove_all_but
from recipes.glue.data import TASKS

GLUE = RECIPES / "glue"

# FOAM as in version 0.1.0, which the results of recipes/glue are of.
MEASURED = "level=8,scale=0.25,fold_embeddings=false,fold_head=false"
OPTIMIZERS = [["adamw_torch", "2e-5,5e-5,1e-4"], ["foam", "1e-4,2e-4,4e-4", MEASURED]]
PRIVATE = ("model_name_or_path", "dataset_path")  # folders of the machine: no setting that a reader could use


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest for train.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", required=True, help="folder with one subfolder a task")
    parser.add_argument("--model", required=True, help="folder or hub name of the encoder")
    parser.add_argument("--label", help="the model's name in the results (default: --model)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, help="the results (default: OUT/results.json)")
    parser.add_argument("--config", type=Path, default=GLUE / "roberta-base.yaml", help="train.py's config")
    parser.add_argument("--tasks", default="cola,mrpc,sst2")
    parser.add_argument(
        "--optimizer",
        nargs="+",
        action="append",
        metavar=("NAME", "RATES"),
        help="name, learning rates to try, optim_args if any, and int8 for INT8 weights; repeat for each optimizer",
    )
    parser.add_argument("--search-seed", type=int, default=100, help="of the search alone; never reported")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--search-train-samples", default="", help="for shorter searches: sst2=10000,qqp=20000")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing new after so many seconds")
    options, rest = parser.parse_known_args(argv)
    options.json = options.json or options.out / "results.json"
    options.optimizer = options.optimizer or OPTIMIZERS
    options.tasks = options.tasks.split(",")
    options.limits = dict(pair.split("=") for pair in options.search_train_samples.split(",") if pair)
    unknown = ({*options.tasks} | options.limits.keys()) - TASKS.keys()
    if unknown:
        parser.error(f"unknown task {', '.join(sorted(unknown))}; expected some of {', '.join(TASKS)}")
    if any(not 2 <= len(words) <= 4 or words[3:] not in ([], ["int8"]) for words in options.optimizer):
        parser.error(
            "--optimizer takes a name, learning rates, perhaps optim_args, perhaps int8: foam 1e-4 level=8 int8"
        )
    return options, rest


class Job:
    """One process of train.py and its folder; finished where results.json exists."""

    def __init__(
        self, options: argparse.Namespace, rest: list[str], stage: str, task: str, optimizer, rate: str, seed
    ):
        name, _, *more = optimizer
        self.key, self.stage, self.rate = (task, name, *more), stage, rate
        self.folder = options.out / stage / task / "-".join([name, *more]) / f"lr-{rate}-seed-{seed}"
        flags = {
            "task_name": task,
            "model_name_or_path": options.model,
            "dataset_path": options.data,
            "output_dir": self.folder,
            "optim": name,
            "learning_rate": rate,
            "seed": seed,
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": "true",
        }
        if more:
            flags["optim_args"] = more[0]
        if more[1:]:
            flags["int8_weights"] = "true"
        if stage == "search" and task in options.limits:
            flags["max_train_samples"] = options.limits[task]
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        self.command = [sys.executable, str(GLUE / "train.py"), str(options.config), *words, *rest]
        self.process: subprocess.Popen | None = None

    def start(self, threads: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with open(self.folder / LOG, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def result(self) -> dict | None:
        """The run's results, if it finished; its settings without the machine's folders."""
        file = self.folder / "results.json"
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        found["settings"] = {name: value for name, value in found["settings"].items() if name not in PRIVATE}
        return found

    def failure(self) -> dict:
        log = read_log(self.folder)[-1500:]
        return {"run": str(self.folder.name), "of": list(self.key), "stage": self.stage, "log": log}

    def tidy(self) -> None:
        """Keep results and log only: a grid of saved models fills a disk."""
        remove_all_but(self.folder, "results.json", LOG)


def best_rate(jobs: list[Job]) -> str | None:
    """The learning rate of the best score among a search's finished runs."""
    scored = [(result["main_score"], job.rate) for job in jobs if (result := job.result())]
    return max(scored)[1] if scored else None


def main(argv: list[str] | None = None) -> dict:
    options, rest = parse(argv)
    started = time.monotonic()
    searches = {
        (task, optimizer[0], *optimizer[2:]): [
            Job(options, rest, "search", task, optimizer, rate, options.search_seed)
            for rate in optimizer[1].split(",")
        ]
        for task in options.tasks
        for optimizer in options.optimizer
    }
    rates = {
        (task, optimizer[0], *optimizer[2:]): optimizer for task in options.tasks for optimizer in options.optimizer
    }
    waiting = [job for jobs in searches.values() for job in jobs]
    running: list[Job] = []
    finished: list[Job] = []
    chosen: dict[tuple, str] = {}
    threads = max(1, (os.cpu_count() or 1) // options.jobs)

    def report() -> dict:
        runs = [(job, job.result()) for job in finished]
        for _, run in runs:
            if run:
                run["model"] = options.label or options.model
        content = {
            "runs": [run for job, run in runs if run and job.stage == "final"],
            "search": [run for job, run in runs if run and job.stage == "search"],
            "chosen": [{"of": list(key), "learning_rate": rate} for key, rate in chosen.items()],
            "failed": [job.failure() for job, run in runs if not run],
            "unfinished": len(waiting) + len(running),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(options.json, content)
        return content

    try:
        while waiting or running:
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                finished.append(job)
                job.tidy()
                result = job.result()
                score = f"{100 * result['main_score']:.2f}" if result else f"FAILED, see {job.folder / LOG}"
                left = len(waiting) + len(running)
                where = job.folder.relative_to(options.out)
                print(f"{time.monotonic() - started:6.0f} s  {where}  {score}  ({left} left)", flush=True)
                report()
            over = time.monotonic() - started > options.budget_s
            while waiting and len(running) < options.jobs:
                job = waiting[0]
                if job.result():  # by an earlier run of the same command
                    finished.append(waiting.pop(0))
                elif over:
                    break
                else:
                    running.append(waiting.pop(0))
                    job.start(threads)
            for key, jobs in searches.items():
                if key not in chosen and all(job in finished for job in jobs):
                    chosen[key] = best_rate(jobs) or ""
                    if chosen[key]:
                        seeds = options.seeds.split(",")
                        final = [Job(options, rest, "final", key[0], rates[key], chosen[key], seed) for seed in seeds]
                        waiting = final + waiting  # a pair goes on as soon as its own search is over
            if over and not running:
                break
            time.sleep(0.2)
    finally:
        for job in running:  # after an interrupt: leave no process behind
            job.process.terminate()
    content = report()
    counts = f"{len(content['search'])} + {len(content['runs'])} runs, {len(content['failed'])} failed"
    print(f"{counts}, {content['unfinished']} unfinished: {options.json}")
    return content


if __name__ == "__main__":
    main()
