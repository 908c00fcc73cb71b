"""Tables from results.json files; `python table.py results/*.json --readme README.md` renews the README's."""

import json
import os
import statistics
import tempfile
from pathlib import Path

START, END = "<!-- table: made by table.py from results/*.json -->", "<!-- end of table -->"


def write_json(path: Path, value: object) -> None:
    """Write the whole file or leave what was there: a temporary neighbour, then one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1, allow_nan=False)
            stream.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_runs(paths: list[Path]) -> list[dict]:
    """All runs of results files: of one run each, or with a list under "runs"."""
    runs = []
    for path in paths:
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
