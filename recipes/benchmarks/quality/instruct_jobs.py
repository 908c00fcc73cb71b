"""One run of a study of instruct_gpu.py as a job of its queue."""

import argparse
import json
import os
import time
from pathlib import Path

from recipes.benchmarks.common.forked import CONTEXT, LOG, Run, read_log, remove_all_but
from recipes.benchmarks.quality.before import as_before

HERE = Path(__file__).resolve().parent
PARTS = ("alone", "memory", "search", "final")
LISTS = {"alone": "alone", "memory": "memory", "search": "search", "final": "runs"}  # the parts' lists in the JSON
KEPT = (  # of a run's results.json; what is not here names folders or quotes the data
    "method",
    "dtype",
    "attention",
    "optim",
    "optim_args",
    "train_loss",
    "steps",
    "train_seconds",
    "trained_tokens",
    "trained_parameters",
    "optimizer_state_bytes",
    "peak_bytes",
    "data",
    "device",
    "versions",
)


def runner(study: dict) -> Path:
    """The script of a study's runs."""
    return HERE / study.get("runner", "instruct_run.py")


def source(arm: dict) -> str:
    """The name of the arm whose search chooses this one's learning rates."""
    return arm.get("swap", arm["name"])


class Job:
    """One run: its settings, its place in the queue, its record once it is finished."""

    def __init__(self, options: argparse.Namespace, rest: list[str], part: str, dataset: str, arm: dict, rate, seed):
        study = options.study
        self.part, self.dataset, self.arm, self.rate, self.seed = part, dataset, arm["name"], rate, seed
        settings = {**study["settings"], **study["datasets"][dataset]["settings"], **arm["settings"]}
        data = study["datasets"][dataset]
        settings |= data.get("search", {}) if part == "search" else study.get(part, {}).get("settings", {})
        settings |= {"learning_rate": rate, "seed": seed}
        first = arm is study["arms"][0] and seed == study["seeds"][0] and "rates_of" not in data
        if part == "final" and first:
            settings["eval_before"] = True  # the untrained model's scores, once a data set
        self.name = (part, dataset, self.arm, rate, seed)
        self.what = f"{part} {dataset} | {self.arm} | lr {rate:g} seed {seed}"
        model = options.label or options.model
        self.key = json.dumps([part, dataset, self.arm, settings, rest, model], sort_keys=True)
        number = study["arms"].index(arm)
        stage = study["seeds"].index(seed) + 1 if part == "final" else 0
        last = int(arm.get("last", 0)) + (int(data.get("last", 0)) if part in ("search", "final") else 0)
        rank = last + stage if study.get("by_seed") else last
        self.order = (part != "alone", rank, stage, options.datasets.index(dataset), number)
        self.folder = options.out / part / dataset / f"arm-{number + 1}-lr-{rate:g}-seed-{seed}"
        words = {
            **as_before(settings),
            "model_name_or_path": options.model,
            "dataset_path": options.data / data["file"],
            **({"other": options.data / data["other"]} if "other" in data and part == "final" else {}),
            "output_dir": self.folder,
            "prepared": options.out / "prepared",
            "disable_tqdm": True,
        }
        self.words = [word for name, value in words.items() for word in (f"--{name}", str(value))] + rest
        self.runner = runner(study)
        self.run: Run | None = None
        self.record: dict | None = None
        self.tries = 0
        self.runs_alone = part == "alone"  # and what ran out of memory beside others

    def start(self, train, jobs: int, memory: float = 1.0) -> None:
        """Run beside as many others as `jobs` allows; what runs alone, or a second time, may take all memory."""
        share = memory if self.runs_alone else memory / jobs - CONTEXT
        self.began, self.tries = time.monotonic(), self.tries + 1
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.run = Run(train, self.words, self.folder / LOG, threads, share, self.runner)

    def finish(self) -> None:
        """Take the record from results.json, if there is one, and leave only the log: saved models fill a disk."""
        file = self.folder / "results.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            record = {"dataset": self.dataset, "arm": self.arm, "learning_rate": self.rate, "seed": self.seed}
            record |= {name: found[name] for name in KEPT}
            for when in ("before", "after"):
                scores = found[when] or {}
                record[when] = {name: value for name, value in scores.items() if name != "samples"} or None
            if self.part == "alone":  # among other runs it would say nothing
                record["tokens_per_second"] = found["tokens_per_second"]
            self.record = record | {"seconds": round(time.monotonic() - self.began, 1)}
        remove_all_but(self.folder, LOG)

    def like(self, other: "Job") -> bool:
        """Whether it takes about as long as another."""
        return (self.part, self.dataset) == (other.part, other.dataset)

    @property
    def log(self) -> str:
        return read_log(self.folder)[-1500:]

    def failure(self) -> dict:
        return {"part": self.part, "dataset": self.dataset, "arm": self.arm, "rate": self.rate, "log": self.log}


def best_rate(jobs: list[Job]) -> float | None:
    """The learning rate of the lowest held-out loss among a search's finished runs; a diverged one has none."""
    losses = [(job.record["after"]["eval_loss"], job.rate) for job in jobs if job.record]
    return min((pair for pair in losses if pair[0] is not None), default=(None, None))[1]
