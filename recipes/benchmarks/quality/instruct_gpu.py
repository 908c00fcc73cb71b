"""Ways to tune a chat model, compared on one GPU: a learning-rate search on a seed of its own, then the seeds.

A study (instruct_study.yaml) names arms and data sets. An arm has learning rates to search, or takes (`swap`) those
that the search of another has chosen; a data set is searched, or takes those of another (`rates_of`). Arms and data
sets with a higher `last` wait for the others, or for one seed of theirs a step of it (`by_seed`). Each run is
recipes/instruct/train.py, by instruct_run.py, or the script that the study names as its `runner`; `--jobs` of them
share the GPU. Speed and memory are measured apart (`alone`), one run at a time, the first after a rehearsal; the peak
at other settings beside other runs (`memory`). Rerun the same command to go on: finished runs are lines of
OUT/runs.jsonl; where that is lost, --resume takes those of the JSON. The JSON is rewritten after every run, whole or
not at all; instruct_table.py of the recipe makes tables of it.
Sample answers, which quote the data, stay out of it.

    python recipes/instruct/gguf_models.py smollm2-135m smollm2
    python -m recipes.benchmarks.quality.instruct_gpu --model smollm2 --data folder --out runs \\
        --json results.json --jobs 8
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import yaml

from foam_hf.recipe_kit import write_json
from recipes.benchmarks.common.forked import CONTEXT, LOG, Queue, warm
from recipes.benchmarks.quality.before import as_before
from recipes.benchmarks.quality.instruct_jobs import LISTS, PARTS, Job, best_rate, runner, source
from recipes.benchmarks.quality.table import mend, read_runs

HERE = Path(__file__).resolve().parent


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest for train.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--study", type=Path, default=HERE / "instruct_study.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder with the study's files")
    parser.add_argument("--model", required=True, help="folder or hub name of the chat model")
    parser.add_argument("--label", help="the model's name in the results (default: --model)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, help="the results (default: OUT/results.json)")
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)}; final needs search (default: all of the study)")
    parser.add_argument("--arms", help="numbers of the study's arms, from 1 (default: all)")
    parser.add_argument("--datasets", help="some of the study's (default: all)")
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the JSON has of the same study")
    parser.add_argument("--memory", type=float, default=1.0, help="share of the GPU's memory for all jobs together")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=float("inf"),
        help="stop after so many seconds, and start no run that is likely to take longer",
    )
    options, rest = parser.parse_known_args(argv)
    options.json = options.json or options.out / "results.json"
    options.study = yaml.safe_load(options.study.read_text(encoding="utf-8"))
    arms, datasets = options.study["arms"], options.study["datasets"]
    parts = [part for part in PARTS if part in options.study or part in ("search", "final")]
    options.parts = options.parts.split(",") if options.parts else parts
    options.datasets = options.datasets.split(",") if options.datasets else list(datasets)
    numbers = [int(word) for word in options.arms.split(",")] if options.arms else range(1, len(arms) + 1)
    for what, given, legal in (
        ("part", options.parts, parts),
        ("data set", options.datasets, datasets),
        ("arm", numbers, range(1, len(arms) + 1)),
    ):
        if unknown := [str(word) for word in given if word not in legal]:
            parser.error(f"unknown {what} {', '.join(unknown)}; expected some of {', '.join(map(str, legal))}")
    if "final" in options.parts and "search" not in options.parts:
        parser.error("the part final needs search, which chooses its learning rates")
    if not CONTEXT * options.jobs < options.memory <= 1:
        parser.error(f"--memory: got {options.memory:g}; expected a share of 1 that leaves each job some")
    for name in options.datasets:
        taken = datasets[name].get("rates_of", name)
        if taken not in options.datasets and "final" in options.parts:
            parser.error(f"the data set {name!r} takes the rates of {taken!r}; expected that one too")
    missing = [name for name in options.datasets if not (options.data / datasets[name]["file"]).is_file()]
    if missing:
        parser.error(f"--data: no file {options.data / datasets[missing[0]]['file']}")
    options.arms = [arms[number - 1] for number in numbers]
    check_arms(parser, options)
    return options, rest


def check_arms(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error for an arm that has no learning rates, or leaves open how its embeddings train."""
    searched = [arm["name"] for arm in options.arms if "rates" in arm]
    for arm in options.arms:
        if source(arm) not in searched:
            parser.error(f"the arm {arm['name']!r} takes the rates of {source(arm)!r}; expected that one too")
        try:
            as_before({**options.study["settings"], **arm["settings"]})
        except ValueError as error:
            parser.error(f"the arm {arm['name']!r}: {error}")


def kept(options: argparse.Namespace, rest: list[str]) -> dict:
    """What the JSON has, empty without one; its study and words must be the same.

    But arms may have joined, and those without any run may have left or changed.
    """
    if not options.json.is_file():
        return {}
    content = json.loads(options.json.read_text(encoding="utf-8"))
    before, now = content["study"], options.study
    if content["model"] != (model := options.label or options.model):
        raise SystemExit(f"--resume: {options.json} is of {content['model']}, got {model}; expected another --json")
    ran = {run["arm"] for part in PARTS for run in content.get(LISTS[part], [])}
    shared = [arm for arm in before["arms"] if arm in now["arms"] or arm["name"] not in ran]
    if content["extra"] != rest or {**before, "arms": now["arms"]} != now or shared != before["arms"]:
        raise SystemExit(f"--resume: {options.json} is of another study or other settings; expected the same ones")
    return content


class Study(Queue):
    """All jobs: waiting, running, finished; a final run joins once the search has chosen its learning rate."""

    def __init__(self, options: argparse.Namespace, rest: list[str]):
        super().__init__(options.budget_s)
        self.options, self.rest = options, rest
        study = options.study
        self.lines = options.out / "runs.jsonl"
        mend(self.lines)
        self.earlier = {entry["key"]: entry["record"] for entry in read_runs([self.lines])}
        before = kept(options, rest) if options.resume else {}
        self.kept = {
            (part, *(run[name] for name in ("dataset", "arm", "learning_rate", "seed"))): run
            for part in PARTS
            for run in before.get(LISTS[part], [])
        }
        self.kept_choices, self.kept_failures = before.get("chosen", []), before.get("failed", [])
        self.chosen: dict[tuple[str, str], float | None] = {}
        self.searches: dict[tuple[str, str], list[Job]] = {}
        for part in ("alone", "memory"):
            if part in options.parts:
                dataset, seed = study[part]["dataset"], study["search_seed"]
                rates = {arm["name"]: arm["rates"][dataset][1] for arm in options.arms if "rates" in arm}
                arms = [arm for arm in options.arms if part not in arm.get("without", [])]
                self.add(Job(options, rest, part, dataset, arm, rates[source(arm)], seed) for arm in arms)
        self.searches = {
            (dataset, arm["name"]): [
                Job(options, rest, "search", dataset, arm, rate, study["search_seed"])
                for rate in arm["rates"][dataset]
            ]
            for dataset in options.datasets
            for arm in options.arms
            if "search" in options.parts and "rates" in arm and "rates_of" not in study["datasets"][dataset]
        }
        for jobs in self.searches.values():
            self.add(jobs)

    def add(self, jobs) -> None:
        """Put jobs into the queue; those that an earlier call finished are done."""
        for job in jobs:
            job.record = self.earlier.get(job.key) or self.kept.get(job.name)
            (self.finished if job.record else self.waiting).append(job)
        self.waiting.sort(key=lambda job: job.order)
        self.choose()

    def choose(self) -> None:
        for (dataset, name), jobs in self.searches.items():
            if (dataset, name) in self.chosen or not all(job in self.finished for job in jobs):
                continue
            rate = best_rate(jobs)
            arms = [arm for arm in self.options.arms if source(arm) == name]
            takers = self.takers(dataset)
            self.chosen |= {(taker, arm["name"]): rate for taker in takers for arm in arms}
            if rate is not None and "final" in self.options.parts:
                self.add([job for taker in takers for job in self.finals(taker, arms, rate)])

    def takers(self, dataset: str) -> list[str]:
        """The data sets whose runs take the rates that were searched on this one."""
        of = {name: given.get("rates_of", name) for name, given in self.options.study["datasets"].items()}
        return [name for name in self.options.datasets if of[name] == dataset]

    def finals(self, dataset: str, arms: list[dict], rate: float) -> list[Job]:
        """The seeds of a data set at a rate, of the arms and as many as it asks for."""
        study = self.options.study
        given = study["datasets"][dataset]
        arms = [arm for arm in arms if arm["name"] in given.get("arms", [arm["name"]])]
        seeds = study["seeds"][: given.get("seeds")]
        return [Job(self.options, self.rest, "final", dataset, arm, rate, seed) for arm in arms for seed in seeds]

    def put_off(self, job: Job) -> None:
        super().put_off(job)
        job.runs_alone = True
        print(f"{self.elapsed():6.0f} s  out of memory, put off: {job.folder}", flush=True)

    def ended(self, job: Job) -> str:
        said = f"FAILED, see {job.folder / LOG}"
        if job.record:
            with open(self.lines, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": job.key, "record": job.record}) + "\n")
            after = job.record["after"]
            loss, match = after["eval_loss"], after.get("exact_match")
            said = "diverged" if loss is None else f"loss {loss:.4f}"
            said += "" if match is None else f", exact match {100 * match:.1f}%"
            said += f", {job.record['seconds']:.0f} s"
        self.choose()
        return said

    def fits(self, job: Job) -> bool:
        """Whether a run is likely to end within the budget: as long as the longest of its data set in this call."""
        like = [one.record["seconds"] for one in self.finished if one.run and one.record and one.like(job)]
        return self.elapsed() + max(like, default=0) < self.budget_s

    def fill(self, start) -> None:
        """Start what there is room and time for; what needs the whole GPU waits for the others, and they for it."""
        while len(self.running) < self.options.jobs:
            job = next((job for job in self.waiting if self.fits(job)), None)
            if job is None or (self.running and any(one.runs_alone for one in (job, *self.running))):
                break
            self.waiting.remove(job)
            self.running.append(job)
            start(job)

    def asked(self, part: str, dataset: str, arm: str) -> bool:
        """Whether this command was asked for such a run."""
        given = self.options
        return part in given.parts and dataset in given.datasets and arm in (one["name"] for one in given.arms)

    def others(self) -> dict[tuple, dict]:
        """The JSON's runs that are no jobs of this command, without final ones at a rate that is the best no more."""
        mine = {job.name for job in [*self.finished, *self.waiting, *self.running]}
        return {
            name: run
            for name, run in self.kept.items()
            if name not in mine and (name[0] != "final" or self.chosen.get(name[1:3], name[3]) == name[3])
        }

    def report(self) -> dict:
        finished = sorted(self.finished, key=lambda job: (job.order, job.rate))  # whichever ended first
        others = self.others()
        records = {
            part: [
                *(run for name, run in others.items() if name[0] == part),
                *(job.record for job in finished if job.part == part and job.record),
            ]
            for part in PARTS
        }
        content = {
            "model": self.options.label or self.options.model,
            "study": self.options.study,
            "extra": self.rest,
            "chosen": [
                *(one for one in self.kept_choices if (one["dataset"], one["arm"]) not in self.chosen),
                *(
                    {"dataset": dataset, "arm": name, "learning_rate": rate}
                    for (dataset, name), rate in self.chosen.items()
                ),
            ],
            **{LISTS[part]: found for part, found in records.items()},
            "failed": [
                *(one for one in self.kept_failures if not self.asked(one["part"], one["dataset"], one["arm"])),
                *(job.failure() for job in finished if not job.record),
            ],
            "unfinished": self.left(),
            "seconds": round(self.elapsed(), 1),
        }
        write_json(self.options.json, content)
        return content


def rehearse(study: Study, train) -> None:
    """Run the first of the runs that are timed once for nothing: on a cold machine it waits for files."""
    started = time.monotonic()
    job = next((job for job in study.waiting if job.part == "alone"), None)
    if job is None:
        return
    job.start(train, 1)
    while job.run.poll() is None and study.elapsed() < study.budget_s:
        time.sleep(0.1)
    job.run.terminate()
    shutil.rmtree(job.folder)
    job.tries = 0
    print(f"Rehearsed in {time.monotonic() - started:.0f} s.", flush=True)


def main(argv: list[str] | None = None) -> dict:
    options, rest = parse(argv)
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options, rest)
    train = None
    if study.waiting:
        train = warm(runner(options.study))
        kind = "forks" if train else "fresh processes"
        print(f"Imported in {time.monotonic() - started:.0f} s; runs are {kind}.", flush=True)
        rehearse(study, train)
    study.run(lambda job: job.start(train, options.jobs, options.memory))
    content = study.report()
    counts = ", ".join(f"{len(content[name])} {name}" for name in (*LISTS.values(), "failed"))
    print(f"{counts}, {content['unfinished']} unfinished: {options.json}")
    return content


if __name__ == "__main__":
    main()
