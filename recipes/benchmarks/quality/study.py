"""A study of quality: optimizers x settings x tasks x seeds, as many runs side by side as `--jobs` says, on one GPU.

A plan (quality_main.yaml and the other quality_*.yaml) names tasks, seeds and arms. Every arm's learning rate is
chosen on the plan's tuning seeds; the runs that are reported use other seeds. Arms and tasks take turns, a seed at a
time, so what a time limit cuts off is the last seeds of all. A finished run is a line of --runs; the same command goes
on from there. The table compares each arm with the base arm, seed by seed.

    python -m recipes.benchmarks.quality.study --plan quality_main.yaml --data glue --model MiniLM \\
        --runs m.jsonl --jobs 15
    python -m recipes.benchmarks.quality.study --plan quality_screen.yaml --runs screen.jsonl  # no data, no GPU
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.benchmarks.common.forked import CONTEXT, LOG, Queue, Run, read_log, warm
from recipes.benchmarks.quality import table as quality_table
from recipes.benchmarks.quality.plan import next_rate, read_plan

HERE = Path(__file__).resolve().parent

SCRIPT = HERE / "run.py"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--plan", type=Path, required=True, help="a YAML file, or the name of one beside this script")
    parser.add_argument("--data", help="folder of the GLUE tasks, one subfolder each")
    parser.add_argument("--model", help="folder or hub name of the encoder")
    parser.add_argument("--runs", type=Path, required=True, help="file of finished runs, one JSON line each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="of each run on the CPU (default: cores / jobs)")
    parser.add_argument("--tasks", help="some of the plan's, by comma (default: all)")
    parser.add_argument("--arms", help="numbers of the plan's arms, from 1, by comma; the base arm always runs")
    parser.add_argument("--seeds", type=int, help="the first so many of the plan's seeds (default: all)")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="end after so many seconds")
    parser.add_argument("--count", action="store_true", help="say how many runs there are, and run none")
    options = parser.parse_args(argv)
    if not options.plan.is_file():
        options.plan = HERE / options.plan.name
    options.plan_name, options.plan = options.plan.stem, read_plan(options.plan)
    plan = options.plan
    options.tasks = options.tasks.split(",") if options.tasks else list(plan["tasks"])
    if unknown := [task for task in options.tasks if task not in plan["tasks"]]:
        parser.error(f"unknown task {unknown[0]}; expected some of {', '.join(plan['tasks'])}")
    numbers = options.arms.split(",") if options.arms else range(1, len(plan["arms"]) + 1)
    legal = [str(number) for number in range(1, len(plan["arms"]) + 1)]
    if unknown := [number for number in numbers if str(number) not in legal]:
        parser.error(f"unknown arm {unknown[0]}; expected some of 1 to {len(legal)}")
    chosen = {int(number) for number in numbers}
    options.arms = [arm for i, arm in enumerate(plan["arms"], 1) if i in chosen or arm["name"] == plan["base"]]
    options.seeds = plan["seeds"][: options.seeds]
    needs = any(plan["tasks"][task]["runner"] == "glue" for task in options.tasks) and not options.count
    if needs and not (options.data and options.model):
        parser.error("the plan has GLUE tasks: expected --data and --model")
    return options


class Job:
    """One run: its request to the script, its place in the queue, its record once it is finished."""

    def __init__(self, options: argparse.Namespace, part: str, task: str, arm: dict, rate: float, seed: int):
        plan = options.plan
        spec = plan["tasks"][task]
        self.part, self.task, self.arm, self.rate, self.seed = part, task, arm, rate, seed
        self.what = f"{part} {task} | {arm['name']} | lr {rate:g} seed {seed}"
        settings = {**plan["settings"], **spec["settings"], **arm["settings"]}
        if part == "tuning":
            settings |= spec["tuning"]
        self.request = {
            "runner": spec["runner"],
            "task": task,
            "rate": rate,
            "seed": seed,
            "settings": settings,
            "arm": {name: arm[name] for name in ("optim", "optim_args", "lora")},
        }
        # What makes a run another: all of its request but the machine's folders.
        text = json.dumps([plan["model"], part, self.request], sort_keys=True)
        self.key = hashlib.sha1(text.encode()).hexdigest()[:12]
        self.request |= {"model": options.model, "data": options.data}
        arms, tasks = [one["name"] for one in plan["arms"]], list(plan["tasks"])
        turn = plan["tuning_seeds"].index(seed) if part == "tuning" else plan["seeds"].index(seed)
        tried = arm["rates"][task].index(rate) if part == "tuning" else 0
        self.order = (part != "tuning", turn, tried, tasks.index(task), arms.index(arm["name"]))
        self.run: Run | None = None
        self.record: dict | None = None
        self.tries = 0

    def start(self, module, folder: Path, jobs: int, threads: int) -> None:
        self.began, self.tries = time.monotonic(), self.tries + 1
        self.folder = folder / f"{self.key}-{self.tries}"
        self.folder.mkdir(parents=True)
        words = self.folder / "job.json"
        words.write_text(json.dumps({**self.request, "folder": str(self.folder)}), encoding="utf-8")
        share = 1.0 if self.tries > 1 or jobs == 1 else 1 / jobs - CONTEXT
        self.run = Run(module, [str(words)], self.folder / LOG, threads, share, SCRIPT)

    def finish(self) -> None:
        """Take the record, if there is one, and remove the folder."""
        file = self.folder / "results.json"
        self.log = read_log(self.folder)
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            named = {"part": self.part, "task": self.task, "arm": self.arm["name"], "rate": self.rate}
            self.record = {"key": self.key, **named, "seed": self.seed, **found}
            self.record["wall_s"] = round(time.monotonic() - self.began, 1)
        shutil.rmtree(self.folder)


class Study(Queue):
    """All jobs: waiting, running, finished; a result run joins once its arm's learning rate is chosen."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options.budget_s)
        self.options, self.plan = options, options.plan
        self.arms = {arm["name"]: arm for arm in options.arms}
        self.earlier = {record["key"]: record for record in quality_table.read_runs([options.runs])}
        self.chosen: dict[tuple[str, str], float | None] = {}
        self.widened: dict[tuple[str, str], int] = {}
        self.tunings = {
            (task, arm["name"]): [
                Job(options, "tuning", task, arm, rate, seed)
                for seed in self.plan["tuning_seeds"]
                for rate in arm["rates"][task]
                if len(arm["rates"][task]) > 1  # one is chosen as it is
            ]
            for task in options.tasks
            for arm in options.arms
            if "rates" in arm and task in arm["tasks"]
        }
        self.add([job for jobs in self.tunings.values() for job in jobs])

    def widen(self, task: str, name: str, best: float) -> list[Job]:
        """Tuning runs at one more rate, beyond the best, if that lies at an end of those tried."""
        arm = self.arms[name]
        beyond = next_rate(arm["rates"][task], best)
        wider = self.widened.get((task, name), 0)
        if beyond is None or wider >= self.plan["widen"]:
            return []
        self.widened[task, name] = wider + 1
        arm["rates"][task].append(beyond)
        jobs = [Job(self.options, "tuning", task, arm, beyond, seed) for seed in self.plan["tuning_seeds"]]
        self.tunings[task, name] += jobs
        return jobs

    def choose(self) -> None:
        """Choose the rates of arms whose tuning has ended, and queue what follows from them."""
        more = []
        for (task, name), jobs in self.tunings.items():
            if (task, name) in self.chosen or not all(job in self.finished for job in jobs):
                continue
            if jobs:
                records = [job.record for job in jobs if job.record]
                rate = quality_table.best_rate(records, self.plan["tasks"][task]["better"])
            else:
                (rate,) = self.arms[name]["rates"][task]
            if rate is not None and (wider := self.widen(task, name, rate)):
                more += wider
                continue
            self.chosen[task, name] = rate
            follow = [(self.arms[name], rate)]
            if name == self.plan["base"] and rate is not None:
                follow += [(arm, arm["times"] * rate) for arm in self.options.arms if "times" in arm]
            more += [
                Job(self.options, "result", task, arm, at, seed)
                for arm, at in follow
                for seed in self.options.seeds
                if at is not None and task in arm["tasks"]
            ]
        if more:
            self.add(more)

    def ended(self, job: Job) -> str:
        if job.record:
            with open(self.options.runs, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(job.record, allow_nan=False) + "\n")
            score = job.record["score"]
            said = "diverged" if score is None else f"{score:.4f}"
        else:
            said = f"FAILED: {' '.join(job.log.split())[-300:]}"
        self.choose()
        return said

    def fits(self, job: Job) -> bool:
        """Whether a run would end within the budget, by those of its task that have ended in this call."""
        walls = [done.record["wall_s"] for done in self.finished if done.task == job.task and done.run and done.record]
        return self.elapsed() + (statistics.fmean(walls) if walls else 0) < self.options.budget_s

    def fill(self, start) -> None:
        for job in list(self.waiting):
            if len(self.running) >= self.options.jobs:
                break
            if self.fits(job):
                self.waiting.remove(job)
                self.running.append(job)
                start(job)


def print_end(study: Any, markdown: Callable[[dict, list[dict]], str], what: str) -> None:
    """Print the table that `markdown` makes of the plan and the records, and how many jobs there were."""
    records = [job.record for job in study.finished if job.record]
    failed = len(study.finished) - len(records)
    print(markdown(study.options.plan, records))
    print(f"\n{len(records)} {what}, {failed} failed, {study.left()} not run: {study.options.runs}")


def count(options: argparse.Namespace) -> dict[str, int]:
    """How many runs of each part a plan has, before any search goes on beyond an end."""
    pairs = [(arm, task) for arm in options.arms for task in options.tasks if task in arm["tasks"]]
    tried = [len(arm["rates"][task]) for arm, task in pairs if "rates" in arm]
    tuned = sum(number for number in tried if number > 1)
    return {
        "tuning": tuned * len(options.plan["tuning_seeds"]),
        "result": len(pairs) * len(options.seeds),
    }


def main(argv: list[str] | None = None) -> Study | None:
    options = parse(argv)
    if options.count:
        numbers = count(options)
        print(f"{options.plan_name}: {numbers['tuning']} + {numbers['result']} runs, {len(options.arms)} arms")
        return None
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    quality_table.mend(options.runs)
    study = Study(options)
    module, threads = None, 1
    if study.waiting:
        threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
        module = warm(SCRIPT)
        kind = "forks" if module else "fresh processes"
        now = datetime.datetime.now(datetime.timezone.utc).date()
        print(f"{study.left()} runs wait; they are {kind}; {platform.node()}, {now}", flush=True)
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        study.run(lambda job: job.start(module, Path(folder), options.jobs, threads))
    print_end(study, quality_table.markdown, "runs")
    return study


if __name__ == "__main__":
    main()
