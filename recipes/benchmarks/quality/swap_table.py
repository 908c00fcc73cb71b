"""Tables of the swap test, from the runs that swap_encoders.py wrote.

    python -m recipes.benchmarks.quality.swap_table RUNS.jsonl [--plan swap_encoders.yaml] [--readme swap.md]

A line of RUNS is a job with a score for each of its seeds. Differences from the base arm are taken seed by seed.
"""

import argparse
from pathlib import Path

import yaml

from foam_hf.recipe_kit import renew_page
from recipes.benchmarks.quality.table import (
    _table,
    averages,
    marks,
    mean_and_error,
    paired,
    read_runs,
    shown,
    tuning_markdown,
)
from recipes.benchmarks.quality.table import markdown as markdown_of_runs

HERE = Path(__file__).resolve().parent


def by_seed(records: list[dict]) -> list[dict]:
    """A record a seed, as table.py takes them."""
    return [
        {**record, "seed": seed, "score": score}
        for record in records
        for seed, score in zip(record["seeds"], record["scores"], strict=True)
    ]


def of_model(plan: dict, records: list[dict], model: str) -> tuple[dict, list[dict]]:
    """The plan and the runs of one model, as table.py takes them."""
    runs = by_seed([record for record in records if record["model"] == model])
    return {**plan, "tasks": {task: {"better": "higher"} for task in plan["tasks"]}}, runs


def of_all(plan: dict, records: list[dict]) -> tuple[dict, list[dict]]:
    """The same with every pair of model and task for a task."""
    runs = [{**run, "task": f"{run['model']} {run['task']}"} for run in by_seed(records)]
    tasks = {f"{model} {task}": {"better": "higher"} for model in plan["models"] for task in plan["tasks"]}
    return {**plan, "tasks": tasks}, runs


def summary(plan: dict, records: list[dict]) -> str:
    """Each arm's difference from the base, averaged over tasks, by model and over all of them; its state."""
    models = list(plan["models"])
    columns = {plan["models"][model]["name"]: of_model(plan, records, model) for model in models}
    columns = {name: averages(*found) for name, found in columns.items()}
    if len(models) > 1:
        columns["all"] = averages(*of_all(plan, records))
    lines = [["arm", *columns, *(f"state / AdamW's, {plan['models'][model]['name']}" for model in models)]]
    for arm in (arm["name"] for arm in plan["arms"]):
        cells = []
        for found in columns.values():
            difference = paired(found.get(arm, {}), found.get(plan["base"], {}))
            if difference is None:
                cells.append("")
            elif arm == plan["base"]:
                cells.append(shown(*mean_and_error(list(found[arm].values())), 100, 2))
            else:
                cells.append(shown(*difference[1:], 100, 2, "+"))
        if any(cells):
            lines.append([arm, *cells, *(_state(records, model, arm) for model in models)])
    return _table(lines) if lines[1:] else ""


def _state(records: list[dict], model: str, arm: str) -> str:
    found = [
        record for record in records if (record["model"], record["arm"], record["part"]) == (model, arm, "result")
    ]
    return f"{100 * found[-1]['state_bytes'] / found[-1]['adamw_state_bytes']:.2f}%" if found else ""


def scores_by_seed(plan: dict, records: list[dict]) -> str:
    """Every score of every seed, in percent."""
    lines = [["model, task, arm", "learning rate", *(str(seed) for seed in plan["seeds"])]]
    for record in records:
        if record["part"] == "result":
            scores = dict(zip(record["seeds"], record["scores"], strict=True))
            cells = ["" if scores.get(seed) is None else f"{100 * scores[seed]:.1f}" for seed in plan["seeds"]]
            lines.append([f"{record['model']}, {record['task']}, {record['arm']}", f"{record['rate']:g}", *cells])
    return _table(lines)


def markdown(plan: dict, records: list[dict], seeds: bool = False) -> str:
    """The summary, then the tables of each model; with `seeds`, every score and what tuning gave."""
    parts = []
    if text := summary(plan, records):
        parts.append("**Difference from the base arm, average over tasks, points**\n\n" + text)
    for model, spec in plan["models"].items():
        of_one = of_model(plan, records, model)
        if of_one[1]:
            parts.append(f"### {spec['name']}\n\n" + markdown_of_runs(*of_one))
            if seeds:
                parts.append(tuning_markdown(*of_one))
    if seeds:
        parts.append(scores_by_seed(plan, records))
    return "\n\n".join(parts) or "No result yet."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="files that swap_encoders.py wrote")
    parser.add_argument("--plan", type=Path, default=HERE / "swap_encoders.yaml")
    parser.add_argument("--seeds", action="store_true", help="every score, and the tuning runs")
    parser.add_argument("--readme", type=Path, help="renew the table between the markers of the first file's name")
    options = parser.parse_args(argv)
    plan = yaml.safe_load(options.plan.read_text(encoding="utf-8"))
    table = markdown(plan, read_runs(options.runs), options.seeds)
    if options.readme is None:
        print(table)
        return
    renew_page(options.readme, *marks(options.runs[0].stem), table)


if __name__ == "__main__":
    main()
