"""Tables of a study's JSON; `python instruct_table.py results/*.json --readme README.md` renews the README's.

The JSON comes from recipes/benchmarks/instruct_gpu.py.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

START, END = "<!-- tables: made by recipes/instruct/instruct_table.py -->", "<!-- end of tables -->"
KINDS = ("weights", "gradients", "optimizer_state", "rest")


def mean(values: list[float], digits: int) -> str:
    """Mean, with its standard error (the standard deviation over the root of the count) if there are several."""
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def rate(chosen: float, tried: list[float]) -> str:
    """The learning rate, with a word where no higher or no lower one was tried."""
    edge = {max(tried): ", the highest tried", min(tried): ", the lowest tried"}.get(chosen, "")
    return f"{chosen:g}{edge if len(tried) > 1 else ''}"


def quality(content: dict, dataset: str, names: list[str]) -> list[str]:
    """Rows of one data set: the untrained model, then each arm's seeds at its best learning rate."""
    runs = [run for run in content["runs"] if run["dataset"] == dataset]
    tried = {arm["name"]: arm["rates"][dataset] for arm in content["study"]["arms"]}
    matched = any("exact_match" in run["after"] for run in runs)
    rows = [["", "learning rate", "held-out loss", *(["exact match, %"] if matched else []), "seeds"]]
    before = next((run["before"] for run in runs if run["before"]), None)
    if before:
        match = [f"{100 * before['exact_match']:.1f}"] if matched else []
        rows.append(["untrained", "", f"{before['eval_loss']:.4f}", *match, ""])
    for name in names:
        group = [run for run in runs if run["arm"] == name]
        if not group:
            continue
        losses = [run["after"]["eval_loss"] for run in group]
        loss = "diverged" if None in losses else mean(losses, 4)
        match = [mean([100 * run["after"]["exact_match"] for run in group], 1)] if matched else []
        rows.append([name, rate(group[0]["learning_rate"], tried[name]), loss, *match, str(len(group))])
    return rows if len(rows) > 1 else []


def cost(content: dict, names: list[str]) -> list[list[str]]:
    """Rows of speed and peak memory, of runs that had the GPU to themselves."""
    found = {run["arm"]: run for run in content["alone"]}
    rows = [["", "tokens/s", "peak, GB", *(f"{kind.replace('_', ' ')}, GB" for kind in KINDS)]]
    for run in (found[name] for name in names if name in found):
        peak = run["peak_bytes"] or {}
        total = [f"{peak[kind] / 1e9:.2f}" if peak else "-" for kind in ("total", *KINDS)]
        rows.append([run["arm"], f"{run['tokens_per_second']:,.0f}", *total])
    return rows if len(rows) > 1 else []


def markdown(rows: list[list[str]]) -> str:
    line = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], line, *rows[1:]])


def tables(content: dict, numbers: list[int] | None = None) -> str:
    """A table a data set and one of cost, for the study's arms or those with these numbers (from 1)."""
    arms = content["study"]["arms"]
    names = [arm["name"] for number, arm in enumerate(arms, 1) if numbers is None or number in numbers]
    devices = ", ".join(sorted({run["device"] for run in content["runs"] + content["alone"]}))
    parts = []
    for dataset in content["study"]["datasets"]:
        rows = quality(content, dataset, names)
        if not rows:
            continue
        run = next(run for run in content["runs"] if run["dataset"] == dataset)
        used = run["data"]["train"]["used"], run["data"]["held_out"]["used"]
        parts.append(
            f"{content['model']} on {dataset}, {used[0]} examples, {run['steps']} steps; {used[1]} held out; on "
            f"{devices}. Mean ± standard error over seeds, at the best of {len(arms[0]['rates'][dataset])} learning "
            f"rates:\n\n{markdown(rows)}"
        )
    rows = cost(content, names)
    if rows:
        study = content["study"]
        settings = {**study["settings"], **study["datasets"][study["alone"]["dataset"]]["settings"]}
        parts.append(
            f"Speed (padding not counted) and memory at the peak, one run at a time, batches of "
            f"{settings['per_device_train_batch_size']} with up to {settings['max_length']} tokens each, on {devices}:"
            f"\n\n{markdown(rows)}"
        )
    return "\n\n".join(parts)


def with_tables(readme: str, text: str) -> str:
    """The README's text with what stands between the markers replaced."""
    before, rest = readme.split(START, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{START}\n{text or 'Not measured yet.'}\n{END}{after}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("results", nargs="*", type=Path, help="JSON files of instruct_gpu.py")
    parser.add_argument("--readme", type=Path, help="replace the tables between its markers; else print them")
    parser.add_argument("--arms", help="numbers of the study's arms, from 1: 1,7,8 (default: all)")
    options = parser.parse_args(argv)
    try:
        numbers = [int(word) for word in options.arms.split(",")] if options.arms else None
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
        text = "\n\n".join(filter(None, (tables(content, numbers) for content in contents)))
        if options.readme is None:
            print(text)
            return
        renewed = with_tables(options.readme.read_text(encoding="utf-8"), text)
    except (OSError, ValueError, KeyError, IndexError) as error:
        sys.exit(f"instruct_table.py: {type(error).__name__}: {error}; expected JSON of instruct_gpu.py, and markers.")
    options.readme.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    main()
