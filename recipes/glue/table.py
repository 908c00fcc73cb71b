"""Runs of several optimizers side by side: `python table.py runs/cola runs/cola-adamw`, folders or results.json files.

`python table.py results/*.json --readme README.md` renews the README's table.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from foam_hf.recipe_kit import put_between

START, END = "<!-- table: made by table.py from results/*.json -->", "<!-- end of table -->"


def read_runs(paths: list[Path]) -> list[dict]:
    """All runs of results files: of one run each, or with a list under "runs"."""
    runs = []
    for path in paths:
        path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        runs += content.get("runs", [content])
    return runs


def spread(values: list[float]) -> str:
    """Mean in percent, with the sample standard deviation where there are several values."""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def groups(runs: list[dict]) -> dict[tuple, list[dict]]:
    """Runs that differ by their seed only, by (task, model, optimizer with its arguments)."""
    found: dict[tuple, list[dict]] = {}
    for run in runs:
        optim = run["optim"] + (f" ({run['optim_args']})" if run["optim_args"] else "")
        optim += " on INT8 weights" if run.get("settings", {}).get("int8_weights") else ""
        found.setdefault((run["task"], run["model"], optim, run["learning_rate"]), []).append(run)
    return found


def summary_rows(runs: list[dict]) -> list[list[str]]:
    """One row for each task, optimizer and metric: its score over the seeds, the state it costs, the time."""
    rows = []
    for (task, _, optim, rate), group in groups(runs).items():
        for name in [name for name in group[0]["scores"] if not name.endswith("loss")]:
            before = [run["untrained"][name] for run in group if run["untrained"]]
            rows.append(
                [
                    task,
                    optim,
                    f"{rate:g}",
                    name,
                    spread(before) if before else "-",
                    spread([run["scores"][name] for run in group]),
                    str(len(group)),
                    megabytes(group[0]["optimizer_state_bytes"]),
                    megabytes(group[0]["adamw_state_bytes"]),
                    f"{statistics.fmean(run['seconds']['train'] for run in group):.0f}",
                ]
            )
    return rows


HEADER = ["task", "optimizer", "lr", "metric", "untrained %", "trained %", "runs", "state", "AdamW's", "train s"]


def text_table(runs: list[dict]) -> str:
    """The table that ends a run; the spread is the sample standard deviation over seeds."""
    rows = [HEADER, *summary_rows(runs)]
    if all(row[4] == "-" for row in rows[1:]):
        rows = [row[:4] + row[5:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def short(model: str) -> str:
    """A model's name without the folders before it."""
    return Path(model).name if os.path.isabs(model) else model


def markdown_table(runs: list[dict]) -> str:
    """One table a model: tasks and metrics down, optimizers across; an empty text without runs.

    A cell is mean ± sample standard deviation over seeds, in percent, and the learning rate of those runs. The average
    is over the tasks' main scores, seed by seed; it is "-" for an optimizer that lacks a task or a seed.
    """
    parts = []
    for model in dict.fromkeys(run["model"] for run in runs):
        cells: dict[tuple[str, str], dict[str, str]] = {}
        state: dict[str, str] = {}
        main: dict[str, dict[tuple[str, int], float]] = {}
        counts, devices = set(), set()
        for (task, _, optim, rate), group in groups([run for run in runs if run["model"] == model]).items():
            counts.add(len(group))
            devices.update(run["versions"]["device"] for run in group)
            state[optim] = megabytes(group[0]["optimizer_state_bytes"])
            main.setdefault(optim, {}).update({(task, run["seed"]): run["main_score"] for run in group})
            for name in [name for name in group[0]["scores"] if not name.endswith("loss")]:
                text = f"{spread([run['scores'][name] for run in group])} (lr {rate:g})"
                row = cells.setdefault((task, name), {})
                row[optim] = f"{row[optim]}; {text}" if optim in row else text
        lines = [["task", "metric", *state], ["---"] * (2 + len(state))]
        lines += [[task, name, *(row.get(optim, "-") for optim in state)] for (task, name), row in cells.items()]
        lines += _average(main)
        lines.append(["", "optimizer state", *state.values()])
        seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        title = (
            f"{short(model)}, {seeds} seeds, on {', '.join(sorted(devices))}; mean ± standard deviation, in percent:"
        )
        parts.append(title + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _average(main: dict[str, dict[tuple[str, int], float]]) -> list[list[str]]:
    """The row of averages from the main scores of each optimizer by (task, seed).

    An optimizer that lacks any gets "-"; there is no row if all do.
    """
    keys = set().union(*main.values())
    tasks, seeds = {task for task, _ in keys}, sorted({seed for _, seed in keys})
    if len(tasks) < 2:
        return []
    cells = []
    for scores in main.values():
        complete = len(scores) == len(tasks) * len(seeds)
        means = [statistics.fmean(scores[task, seed] for task in tasks) for seed in seeds] if complete else []
        cells.append(spread(means) if means else "-")
    return [["average", "of main scores", *cells]] if set(cells) != {"-"} else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("results", nargs="*", type=Path, help="folders of runs, or results.json files")
    parser.add_argument("--readme", type=Path, help="replace the table between its markers; else print it")
    options = parser.parse_args(argv)
    try:
        table = markdown_table(read_runs(options.results))
        if options.readme is None:
            print(table)
            return
        text = put_between(options.readme.read_text(encoding="utf-8"), START, END, table or "Not measured yet.")
    except (OSError, ValueError, KeyError) as error:
        sys.exit(
            f"table.py: {type(error).__name__}: {error}; expected folders of runs or results.json files, and a "
            "README with markers."
        )
    options.readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
