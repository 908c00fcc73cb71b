"""Tables of a quality study, from the runs that study.py wrote.

    python -m recipes.benchmarks.quality.table --plan quality_main.yaml RUNS.jsonl [--readme README.md]

Means over seeds with their standard errors, and differences from the base arm, seed by seed: what a seed does to all
arms alike, its data order and first weights, is not in the error of the difference.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from foam_hf.recipe_kit import renew_page
from recipes.benchmarks.quality.plan import read_plan

HERE = Path(__file__).resolve().parent


def read_runs(paths: list[Path]) -> list[dict]:
    """The records of files with one JSON object a line; a last line that was cut off is left out."""
    runs = []
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                runs.append(json.loads(line))
            except json.JSONDecodeError:
                if number < len(lines):
                    raise SystemExit(f"{path}, line {number}: not JSON; expected one object a line.") from None
    return runs


def mend(runs: Path) -> None:
    """Take off a last line that was cut off, so that the next one stands alone."""
    content = runs.read_bytes() if runs.is_file() else b""
    if content and not content.endswith(b"\n"):
        runs.write_bytes(content[: content.rfind(b"\n") + 1])


def best_rate(records: list[dict], better: str) -> float | None:
    """The learning rate with the best mean score over the tuning seeds; one that diverged on any is out.

    Of rates that lost a run to a failure, only the seeds that all of them have count. The lower rate wins a tie.
    """
    scores: dict[float, dict[int, float | None]] = {}
    for record in records:
        scores.setdefault(record["rate"], {})[record["seed"]] = record["score"]
    scores = {rate: found for rate, found in scores.items() if None not in found.values()}
    if not scores:
        return None
    seeds = set.intersection(*(set(found) for found in scores.values()))
    if not seeds:
        return None
    sign = 1 if better == "higher" else -1
    means = {rate: statistics.fmean(found[seed] for seed in seeds) for rate, found in scores.items()}
    return max(sorted(means), key=lambda rate: sign * means[rate])


def current(plan: dict, runs: list[dict]) -> list[dict]:
    """The runs without results at a rate that a wider search has since replaced."""
    chosen = {}
    for task, spec in plan["tasks"].items():
        for arm in plan["arms"]:
            tuned = [run for run in runs if (run["part"], run["task"], run["arm"]) == ("tuning", task, arm["name"])]
            if "rates" in arm and tuned:
                chosen[task, arm["name"]] = best_rate(tuned, spec["better"])
        for arm in plan["arms"]:
            base = chosen.get((task, plan["base"]))
            if "times" in arm and base is not None:
                chosen[task, arm["name"]] = arm["times"] * base
    return [
        run
        for run in runs
        if run["part"] != "result" or chosen.get((run["task"], run["arm"]), run["rate"]) == run["rate"]
    ]


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error, which one value does not have."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def paired(scores: dict[int, float], base: dict[int, float]) -> tuple[int, float, float | None] | None:
    """Seeds that both have, the mean difference over them, its standard error; None without any."""
    common = sorted(scores.keys() & base.keys())
    if not common:
        return None
    return len(common), *mean_and_error([scores[seed] - base[seed] for seed in common])


def scores_of(runs: list[dict], part: str = "result") -> dict[tuple[str, str], dict[int, float]]:
    """(task, arm) -> seed -> score; runs that diverged are not in it."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        if run["part"] == part and run["score"] is not None:
            found.setdefault((run["task"], run["arm"]), {})[run["seed"]] = run["score"]
    return found


def averages(plan: dict, runs: list[dict]) -> dict[str, dict[int, float]]:
    """Arm -> seed -> mean score over the tasks where higher is better; only seeds that have all of them."""
    tasks = [name for name, task in plan["tasks"].items() if task["better"] == "higher"]
    scores = scores_of(runs)
    if len(tasks) < 2:
        return {}
    found = {}
    for arm in plan["arms"]:
        by_task = [scores.get((task, arm["name"]), {}) for task in tasks]
        seeds = set.intersection(*(set(one) for one in by_task))
        if seeds:
            found[arm["name"]] = {seed: statistics.fmean(one[seed] for one in by_task) for seed in seeds}
    return found


def shown(mean: float, error: float | None, factor: float, digits: int, sign: str = "") -> str:
    text = f"{factor * mean:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {factor * error:.{digits}f}"


def rows_of(plan: dict, scores: dict[str, dict[int, float]], better: str) -> dict[str, list[str]]:
    """Arm -> seeds, mean, paired difference: percent for scores, four digits for losses."""
    factor, digits = (100, 2) if better == "higher" else (1, 4)
    base = scores.get(plan["base"], {})
    rows = {}
    for arm, found in scores.items():
        difference = paired(found, base)
        said = "" if arm == plan["base"] or difference is None else shown(*difference[1:], factor, digits, "+")
        rows[arm] = [str(len(found)), shown(*mean_and_error(list(found.values())), factor, digits), said]
    return rows


def markdown(plan: dict, runs: list[dict]) -> str:
    """One table a task, and one of the averages over tasks; arms in the plan's order."""
    parts = []
    runs = current(plan, runs)
    scores = scores_of(runs)
    order = [arm["name"] for arm in plan["arms"]]
    if average := averages(plan, runs):
        rows = rows_of(plan, average, "higher")
        lines = [["arm", "seeds", "average, %", "difference", "state / AdamW's", "on folded weights"]]
        lines += [[arm, *rows[arm], *_state(runs, arm)] for arm in order if arm in rows]
        parts.append("**Average over tasks**\n\n" + _table(lines))
    for task, spec in plan["tasks"].items():
        found = {arm: scores[task, arm] for arm in order if (task, arm) in scores}
        if not found:
            continue
        unit = "score, %" if spec["better"] == "higher" else "loss"
        lines = [["arm", "learning rate", "seeds", unit, "difference", "diverged"]]
        rows = rows_of(plan, found, spec["better"])
        for arm in found:
            here = [run for run in runs if run["part"] == "result" and (run["task"], run["arm"]) == (task, arm)]
            diverged = sum(run["score"] is None for run in here)
            lines.append([arm, _rate(runs, task, arm, here[0]["rate"]), *rows[arm], str(diverged or "")])
        parts.append(f"**{task}**, {spec['better']} is better\n\n" + _table(lines))
    return "\n\n".join(parts) or "No result yet."


def tuning_markdown(plan: dict, runs: list[dict]) -> str:
    """What every learning rate gave on the tuning seeds, which choose it and prove nothing."""
    scores: dict[tuple[str, str], dict[float, list[float | None]]] = {}
    for run in runs:
        if run["part"] == "tuning":
            scores.setdefault((run["task"], run["arm"]), {}).setdefault(run["rate"], []).append(run["score"])
    parts = []
    for task, spec in plan["tasks"].items():
        factor, digits = (100, 2) if spec["better"] == "higher" else (1, 3)
        lines = [["arm", "best", "at each learning rate"]]
        for arm in (one["name"] for one in plan["arms"] if (task, one["name"]) in scores):
            found = sorted(scores[task, arm].items())
            means = {rate: statistics.fmean(values) for rate, values in found if None not in values}
            best = (max if spec["better"] == "higher" else min)(means.values(), default=None)
            texts = [
                f"{rate:g}: {factor * means[rate]:.{digits}f}" if rate in means else f"{rate:g}: diverged"
                for rate, _ in found
            ]
            lines.append([arm, "" if best is None else f"{factor * best:.{digits}f}", ", ".join(texts)])
        if lines[1:]:
            parts.append(f"**{task}**, tuning runs, {spec['better']} is better\n\n" + _table(lines))
    return "\n\n".join(parts) or "No tuning run yet."


def _rate(runs: list[dict], task: str, arm: str, rate: float) -> str:
    """The rate, and whether it lies at an end of those tried: then a better one may lie beyond."""
    tried = {run["rate"] for run in runs if (run["part"], run["task"], run["arm"]) == ("tuning", task, arm)}
    end = {min(tried): ", the lowest tried", max(tried): ", the highest tried"} if len(tried) > 1 else {}
    return f"{rate:g}{end.get(rate, '')}"


def _state(runs: list[dict], arm: str) -> list[str]:
    """Bytes of state over AdamW's for all weights, and on those that fold, in percent."""
    last = [run for run in runs if run["part"] == "result" and run["arm"] == arm and "adamw_state_bytes" in run][-1:]
    if not last:
        return ["", ""]
    share, folded = last[0]["state_bytes"] / last[0]["adamw_state_bytes"], last[0].get("folded_state_share")
    return [f"{100 * share:.1f}%", "" if folded is None else f"{100 * folded:.2f}%"]


def _table(lines: list[list[str]]) -> str:
    head, *rest = lines
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, marks, *rest])


def marks(name: str) -> tuple[str, str]:
    """The lines of a page between which the table `name` stands."""
    return f"<!-- table: {name} -->", f"<!-- end of {name} -->"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="files that study.py wrote")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--tuning", action="store_true", help="the tuning runs instead")
    parser.add_argument("--readme", type=Path, help="renew the table between the markers of the first file's name")
    options = parser.parse_args(argv)
    plan = options.plan if options.plan.is_file() else HERE / options.plan.name
    plan, runs = read_plan(plan), read_runs(options.runs)
    table = tuning_markdown(plan, runs) if options.tuning else markdown(plan, runs)
    if options.readme is None:
        print(table)
        return
    name = options.runs[0].stem + (" tuning" if options.tuning else "")
    renew_page(options.readme, *marks(name), table)


if __name__ == "__main__":
    main()
