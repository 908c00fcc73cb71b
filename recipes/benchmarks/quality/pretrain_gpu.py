"""Optimizers compared by pretraining a small LLaMA on one GPU: two learning rates each, the same tokens in all runs.

A study names models and arms: pretrain_study.yaml, or pretrain_long.yaml, pretrain_defaults.yaml, pretrain_fresh.yaml.
Where it says `fresh`, no run may see a token twice. Where an arm's best rate lies at an end of those tried, one more
beyond it joins, as often as the study's `widen` says. Each run is recipes/pretrain/train.py on tokens made before;
`--jobs` of them share the GPU. There is one JSON, rewritten after every run, whole or not at all; with --resume the
runs that it has are kept. recipes/benchmarks/quality/pretrain_report.py makes the table and the pictures from it.

    python recipes/pretrain/train.py --prepare_only true --dataset_path text --tokens_path tokens --tokenizer train
    python -m recipes.benchmarks.quality.pretrain_gpu --tokens tokens --out runs --json results.json --jobs 4 \\
        --budget-s 560
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import yaml

from foam_hf.recipe_kit import write_json
from recipes.benchmarks.common.folders import RECIPES
from recipes.benchmarks.common.forked import CONTEXT, LOG, Queue, Run, read_log, remove_all_but, warm
from recipes.benchmarks.quality.plan import next_rate

HERE = Path(__file__).resolve().parent

SCRIPT = RECIPES / "pretrain" / "train.py"
MARGIN = 1.15  # a run may take so much longer than the longest like it
KEPT = (  # of a run's results.json; what is not here names folders
    "parameters",
    "optim",
    "optim_args",
    "eval_loss",
    "perplexity",
    "curve",
    "train_loss",
    "steps",
    "tokens",
    "tokens_per_second",
    "seconds",
    "optimizer_state_bytes",
    "layers_state_bytes",
    "adamw_state_bytes",
    "peak_cuda_bytes",
    "device",
    "versions",
)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest for train.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--study", type=Path, default=HERE / "pretrain_study.yaml")
    parser.add_argument("--tokens", type=Path, required=True, help="folder that train.py --prepare_only made")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, help="the results (default: OUT/results.json)")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the JSON already has")
    parser.add_argument("--models", help="some of the study's, with commas (default: the first)")
    parser.add_argument("--arms", help="numbers of the study's arms, from 1 (default: all)")
    parser.add_argument("--seeds", help="numbers with commas (default: the study's)")
    parser.add_argument("--rates", help="learning rates with commas, for all of --arms (default: the study's)")
    parser.add_argument("--tokens-per-run", type=float, help="default: the study's")
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="stop after so many seconds")
    options, rest = parser.parse_known_args(argv)
    options.json = options.json or options.out / "results.json"
    options.study = study = yaml.safe_load(options.study.read_text(encoding="utf-8"))
    numbers = options.arms.split(",") if options.arms else [str(n) for n in range(1, len(study["arms"]) + 1)]
    options.models = options.models.split(",") if options.models else list(study["models"])[:1]
    legal = [str(n) for n in range(1, len(study["arms"]) + 1)]
    for what, given, known in (("arm", numbers, legal), ("model", options.models, study["models"])):
        if unknown := [word for word in given if word not in known]:
            parser.error(f"unknown {what} {', '.join(unknown)}; expected some of {', '.join(known)}")
    try:
        options.seeds = [int(word) for word in options.seeds.split(",")] if options.seeds else study["seeds"]
    except ValueError:
        parser.error(f"--seeds: got {options.seeds}; expected whole numbers, as in 1,2,3")
    try:
        rates = [float(word) for word in options.rates.split(",")] if options.rates else None
    except ValueError:
        parser.error(f"--rates: got {options.rates}; expected numbers, as in 5e-3,1e-2")
    arms = [study["arms"][int(number) - 1] for number in numbers]
    options.arms = [{**arm, "rates": rates or arm["rates"]} for arm in arms]
    if not (options.tokens / "tokens.json").is_file():
        parser.error(f"--tokens: no tokens.json in {options.tokens}; expected what train.py --prepare_only made")
    step = study["settings"]["sequence_length"] * study["settings"]["total_batch_size"]
    options.steps = round((options.tokens_per_run or study["tokens"]) / step)
    if options.steps < 10:
        parser.error(f"--tokens-per-run: got {options.tokens_per_run:g}; expected at least 10 steps of {step} tokens")
    made = json.loads((options.tokens / "tokens.json").read_text(encoding="utf-8"))["counts"]["train"]["tokens"]
    if study.get("fresh") and options.steps * step > made // step * step:
        parser.error(
            f"--tokens: {made} tokens to train on; expected {options.steps * step}, as no run may see one twice"
        )
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}; expected 1 or more")
    return options, rest


class Job:
    """One run: its settings, its record once it is finished."""

    def __init__(
        self, options: argparse.Namespace, rest: list[str], model: str, arm: dict, rate: float, seed: int, turn: int
    ):
        study, shape = options.study, options.study["models"][model]
        settings = {**study["settings"], **shape["settings"], **arm["settings"]}
        if "optim_args" in settings:
            settings["optim_args"] = settings["optim_args"].format(rank=shape["rank"])
        settings |= {
            "learning_rate": rate,
            "seed": seed,
            "max_steps": options.steps,
            "eval_steps": max(1, options.steps // study["evaluations"]),
            "save_strategy": "no",
        }
        self.model, self.arm, self.rate, self.seed = model, arm["name"], rate, seed
        self.identity = {"model": model, "arm": self.arm, "learning_rate": rate, "seed": seed}
        self.what = f"{model} | {self.arm} | lr {rate:g} seed {seed}"
        self.key = json.dumps([model, self.arm, settings, rest], sort_keys=True)
        number = [known["name"] for known in study["arms"]].index(self.arm)
        # One rate of every arm first: a study cut short is still a comparison.
        self.order = (options.models.index(model), options.seeds.index(seed), turn, number)
        self.folder = options.out / model / f"arm-{number + 1}-lr-{rate:g}-seed-{seed}"
        words = {**settings, "dataset_path": options.tokens, "output_dir": self.folder, "disable_tqdm": True}
        self.words = [word for name, value in words.items() for word in (f"--{name}", str(value))] + rest
        self.run: Run | None = None
        self.record: dict | None = None
        self.tries = 0

    def start(self, train, jobs: int) -> None:
        """Run beside as many others as `jobs` allows; what failed for want of memory may take all of it."""
        self.began, self.tries = time.monotonic(), self.tries + 1
        share = 1.0 if self.tries > 1 else 1 / jobs - CONTEXT
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.run = Run(train, self.words, self.folder / LOG, threads, share, SCRIPT)

    def finish(self) -> None:
        """Take the record from results.json, if there is one, and leave only the log: saved models fill a disk."""
        file = self.folder / "results.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            wall = round(time.monotonic() - self.began, 1)
            self.record = {**self.identity, **{name: found[name] for name in KEPT}, "wall_seconds": wall}
            self.record["key"] = self.key
        remove_all_but(self.folder, LOG)

    @property
    def log(self) -> str:
        return read_log(self.folder)[-1500:]


def plan(options: argparse.Namespace, rest: list[str]) -> list[Job]:
    """The runs that the study names, in the order in which they start."""
    jobs = [
        Job(options, rest, model, arm, rate, seed, turn)
        for model in options.models
        for seed in options.seeds
        for arm in options.arms
        for turn, rate in enumerate(arm["rates"])
    ]
    return sorted(jobs, key=lambda job: job.order)


class Study(Queue):
    """The runs: waiting, running, finished, and those of other arms or models that the JSON had before."""

    def __init__(self, options: argparse.Namespace, rest: list[str]):
        super().__init__(options.budget_s)
        self.options, self.rest = options, rest
        self.made = json.loads((options.tokens / "tokens.json").read_text(encoding="utf-8"))
        earlier: list[dict] = []
        if options.resume and options.json.is_file():
            earlier = json.loads(options.json.read_text(encoding="utf-8"))["runs"]
        self.earlier = {record["key"]: record for record in earlier}
        self.arms: dict[tuple[str, str], list[Job]] = {}
        self.add(plan(options, rest))
        mine = {json.dumps(job.identity) for jobs in self.arms.values() for job in jobs}
        self.others = [
            record
            for record in earlier
            if json.dumps({name: record[name] for name in ("model", "arm", "learning_rate", "seed")}) not in mine
        ]

    def add(self, jobs: list[Job]) -> None:
        """Put jobs into the queue; those that the JSON has are done, and what follows from them joins too."""
        for job in jobs:
            self.arms.setdefault((job.model, job.arm), []).append(job)
            job.record = self.earlier.get(job.key)
            (self.finished if job.record else self.waiting).append(job)
        self.waiting.sort(key=lambda job: job.order)
        for model, arm in {(job.model, job.arm): None for job in jobs}:
            self.widen(model, arm)

    def widen(self, model: str, name: str) -> None:
        """Add the rate beyond an arm's best, if that lies at an end of those tried and all of them have ended."""
        jobs = self.arms[model, name]
        if not all(job in self.finished for job in jobs):
            return
        scores: dict[float, list[float | None]] = {}
        for job in jobs:
            scores.setdefault(job.rate, []).append(job.record and job.record["perplexity"])
        means = {rate: statistics.fmean(found) for rate, found in scores.items() if None not in found}
        arm = next(arm for arm in self.options.arms if arm["name"] == name)
        beyond = next_rate(list(scores), min(means, key=means.get)) if means else None
        if beyond is not None and len(scores) < len(arm["rates"]) + self.options.study.get("widen", 0):
            seeds = self.options.seeds
            self.add([Job(self.options, self.rest, model, arm, beyond, seed, len(scores)) for seed in seeds])

    def put_off(self, job: Job) -> None:
        self.waiting.insert(0, job)  # again, with all the memory it can get

    def ended(self, job: Job) -> str:
        self.widen(job.model, job.arm)
        if job.record is None:
            return f"FAILED, see {job.folder / LOG}"
        return f"perplexity {job.record['perplexity'] or 'diverged'}"

    def fits(self, job: Job) -> bool:
        """Whether a run is likely to end within the budget: as long as the longest of its model, or the one before."""
        known = [other.record["wall_seconds"] for other in self.finished if other.record and other.model == job.model]
        return self.elapsed() + MARGIN * max(known, default=0) < self.options.budget_s

    def fill(self, start) -> None:
        """Start what there is room and time for."""
        while self.waiting and len(self.running) < self.options.jobs and self.fits(self.waiting[0]):
            job = self.waiting.pop(0)
            self.running.append(job)
            start(job)

    def report(self) -> dict:
        finished = sorted(self.finished, key=lambda job: job.order)
        content = {
            "benchmark": "pretraining",
            "study": self.options.study,
            "extra": self.rest,
            "data": {name: self.made[name] for name in ("tokenizer", "vocab_size", "counts")},
            "jobs": self.options.jobs,
            "runs": [*self.others, *(job.record for job in finished if job.record)],
            "failed": [{**job.identity, "log": job.log} for job in finished if not job.record],
            "unfinished": self.left(),
            "seconds": round(self.elapsed(), 1),
        }
        write_json(self.options.json, content)
        return content


def main(argv: list[str] | None = None) -> dict:
    options, rest = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options, rest)
    train = None
    if study.waiting:
        train = warm(SCRIPT)
        kind = "forks" if train else "fresh processes"
        print(f"Imported in {study.elapsed():.0f} s; {len(study.waiting)} runs of {options.steps} steps, {kind}.")
        sys.stdout.flush()
    study.run(lambda job: job.start(train, options.jobs))
    content = study.report()
    counts = f"{len(content['runs'])} runs, {len(content['failed'])} failed, {content['unfinished']} unfinished"
    print(f"{counts}: {options.json}" + ("; the same command with --resume goes on" if content["unfinished"] else ""))
    return content


if __name__ == "__main__":
    main()
