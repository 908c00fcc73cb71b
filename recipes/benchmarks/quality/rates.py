"""Scores by learning rate, of several plans together: what tells two rules apart once the choice of a rate does not.

A plan chooses each arm's rate on one or two seeds, and that choice can cost more than what the arms differ by; the
errors in its table do not know it. Here every run counts, of tuning and results alike: each of them ran whatever it
gave. Arms are the same that have the same optimizer and settings, whatever a plan calls them.

    python -m recipes.benchmarks.quality.rates quality_main quality_candidates quality_held_out --readme README.md
"""

import argparse
import json
import math
from pathlib import Path

from foam_hf.recipe_kit import renew_page
from recipes.benchmarks.common.folders import RESULTS
from recipes.benchmarks.quality.plan import read_plan
from recipes.benchmarks.quality.table import _table, marks, mean_and_error, read_runs, shown

HERE = Path(__file__).resolve().parent

FEWEST = 10  # runs of a rate that may be an arm's best

Scores = dict[tuple[str, str], dict[float, list[float]]]  # (task, arm) -> rate -> scores


def key_of(plan: dict, arm: dict) -> str:
    """What an arm runs, whatever its name is; its tasks aside."""
    settings = {**plan["settings"], **arm["settings"]}
    return json.dumps([plan["model"], arm["optim"], arm["optim_args"], arm["lora"], settings], sort_keys=True)


def pooled(plans: list[tuple[dict, list[dict]]]) -> tuple[dict[str, str], Scores]:
    """The names of the arms that at least two plans have, by what they run, and their finite scores.

    An arm is called as in the first plan that has it. Tasks are the first plan's, with its settings; a seed that two
    plans have at one rate is one run. SystemExit for tasks whose tuning runs are others, or where lower is better.
    """
    names: dict[str, str] = {}
    plans_with: dict[str, set[int]] = {}
    scores: Scores = {}
    tasks = plans[0][0]["tasks"]
    if other := [task for task, spec in tasks.items() if spec["tuning"] or spec["better"] != "higher"]:
        raise SystemExit(
            f"task {other[0]}: expected one whose tuning runs are as its results, and higher scores better"
        )
    seen = set()
    for number, (plan, runs) in enumerate(plans):
        keys = {arm["name"]: key_of(plan, arm) for arm in plan["arms"]}
        for run in runs:
            key, task = keys.get(run["arm"]), run["task"]
            same = plan["tasks"].get(task) == tasks.get(task)
            if key is None or run["score"] is None or task not in tasks or not same:
                continue
            names.setdefault(key, run["arm"])
            plans_with.setdefault(key, set()).add(number)
            which = (task, key, run["rate"], run["seed"])
            if which in seen:
                continue
            seen.add(which)
            scores.setdefault((task, key), {}).setdefault(run["rate"], []).append(run["score"])
    return {key: names[key] for key, found in plans_with.items() if len(found) > 1}, scores


def best(found: dict[float, list[float]]) -> tuple[float, float, int] | None:
    """Mean, error and number of runs at the rate of the highest mean, among those with enough of them."""
    means = [(*mean_and_error(values), len(values)) for values in found.values() if len(values) >= FEWEST]
    return max(means, default=None)


def markdown(plans: list[tuple[dict, list[dict]]]) -> str:
    """A table a task, and how far each arm's best rates are from the base arm's on average; in percent."""
    names, scores = pooled(plans)
    plan = plans[0][0]
    base = next(key_of(plan, arm) for arm in plan["arms"] if arm["name"] == plan["base"])
    tasks = [task for task in plan["tasks"] if (task, base) in scores]
    parts, bests = [], {}
    for task in tasks:
        here = {key: scores[task, key] for key in names if (task, key) in scores}
        rates = sorted({rate for found in here.values() for rate in found})
        lines = [[task, *(f"{rate:g}" for rate in rates)]]
        for key, found in here.items():
            cells = [
                f"{shown(*mean_and_error(found[rate]), 100, 1)} ({len(found[rate])})" if rate in found else ""
                for rate in rates
            ]
            lines.append([names[key], *cells])
            bests[task, key] = best(found)
        parts.append(_table(lines))
    lines = [["each at its best rate", "runs", "average", "difference"]]
    others = [bests.get((task, base)) for task in tasks]
    for key, name in names.items():
        found = [bests.get((task, key)) for task in tasks]
        if None in found:
            continue
        average, error = average_of(found)
        said = ""
        if key != base and None not in others:
            mean, other = average_of(others)
            said = shown(average - mean, math.hypot(error, other), 100, 1, "+")
        runs = sum(count for *_, count in found)
        lines.append([name, str(runs), shown(average, error, 100, 1), said])
    return "\n\n".join([*parts, _table(lines)])


def average_of(found: list[tuple[float, float, int]]) -> tuple[float, float]:
    """The mean of independent means, and its error."""
    return sum(mean for mean, *_ in found) / len(found), math.hypot(*(error for _, error, _ in found)) / len(found)


def load(names: list[str]) -> list[tuple[dict, list[dict]]]:
    """The plans of these names beside this script, with their runs."""
    files = [(HERE / f"{name}.yaml", RESULTS / f"{name}.jsonl") for name in names]
    return [(read_plan(plan), read_runs([runs])) for plan, runs in files]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("plans", nargs="+", help="names of plans beside this script, whose runs are in results/")
    parser.add_argument("--readme", type=Path, help="renew the table between its markers of `rates`")
    options = parser.parse_args(argv)
    table = markdown(load(options.plans))
    if options.readme is None:
        print(table)
        return
    renew_page(options.readme, *marks("rates"), table)


if __name__ == "__main__":
    main()
