"""Tables of a study's JSON; `python instruct_table.py results/*.json --readme README.md` renews the README's.

The JSON comes from instruct_gpu.py of the benchmarks. `--swap` makes one table of all files: every arm on every model
and data set, its difference from the arm whose learning rate it took, and its state.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from foam_hf.recipe_kit import put_between

START, END = "<!-- tables: made by recipes/instruct/instruct_table.py -->", "<!-- end of tables -->"
KINDS = ("weights", "gradients", "optimizer_state", "rest")


def mean(values: list[float], digits: int, sign: str = "") -> str:
    """Mean, with its standard error (the standard deviation over the root of the count) if there are several."""
    text = f"{statistics.fmean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def rate(chosen: float, tried: list[float] | None) -> str:
    """The learning rate, with a word where no higher or no lower one was tried; none tried if it is another arm's."""
    if tried is None:
        return f"{chosen:g}, not tuned"
    edge = {max(tried): ", the highest tried", min(tried): ", the lowest tried"}.get(chosen, "")
    return f"{chosen:g}{edge if len(tried) > 1 else ''}"


def quality(content: dict, dataset: str, names: list[str]) -> list[str]:
    """Rows of one data set: the untrained model, then each arm's seeds at its best learning rate."""
    runs = [run for run in content["runs"] if run["dataset"] == dataset]
    tried = {arm["name"]: arm["rates"][dataset] if "rates" in arm else None for arm in content["study"]["arms"]}
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


def swap_table(contents: list[dict]) -> str:
    """One table: rows are arms, columns are pairs of model and data set, and the state over AdamW's of each model."""
    pairs = [(content, dataset) for content in contents for dataset in content["study"]["datasets"]]
    pairs = [(content, dataset) for content, dataset in pairs if seeds_of(content, dataset)]
    if not pairs:
        return ""
    models = [content for content in contents if any(content is one for one, _ in pairs)]
    arms = {arm["name"]: arm for content in models for arm in content["study"]["arms"]}
    titles = [f"{content['model']}, {dataset}" for content, dataset in pairs]
    rows = [["", *titles, f"state over AdamW's, {' and '.join(content['model'] for content in models)}"]]
    rows.append(["untrained", *(before(content, dataset) for content, dataset in pairs), ""])
    for name in arms:
        cells = [swap_cell(content, dataset, name) for content, dataset in pairs]
        if any(cells):
            rows.append(
                [name, *(cell or "-" for cell in cells), ", ".join(state(content, name) for content in models)]
            )
    devices = ", ".join(sorted({run["device"] for content in models for run in content["runs"]}))
    return (
        f"Held-out loss, mean ± standard error over seeds, on {devices}. In brackets: the difference, seed "
        "by seed, from the arm whose learning rate was taken. State: bytes of the optimizer over eight for each "
        "trained weight."
        f"\n\n{markdown(rows)}\n\n{chosen_rates(pairs)}"
    )


def seeds_of(content: dict, dataset: str, name: str | None = None) -> dict[int, float | None]:
    """Held-out losses by seed, of the first arm if none is named."""
    name = name or content["study"]["arms"][0]["name"]
    runs = [run for run in content["runs"] if run["dataset"] == dataset and run["arm"] == name]
    return {run["seed"]: run["after"]["eval_loss"] for run in runs}


def before(content: dict, dataset: str) -> str:
    found = [run["before"] for run in content["runs"] if run["dataset"] == dataset and run["before"]]
    return f"{found[0]['eval_loss']:.4f}" if found else ""


def swap_cell(content: dict, dataset: str, name: str) -> str:
    """Loss and difference; empty for an arm that has no runs here."""
    losses = seeds_of(content, dataset, name)
    if not losses:
        return ""
    if None in losses.values():
        return "diverged"
    arm = next(arm for arm in content["study"]["arms"] if arm["name"] == name)
    taken = seeds_of(content, dataset, arm["swap"]) if "swap" in arm else {}
    differences = [loss - taken[seed] for seed, loss in losses.items() if taken.get(seed) is not None]
    wanted = len(content["study"]["seeds"])
    short = "" if len(losses) == wanted else f", {len(losses)} of {wanted} seeds"
    return mean(list(losses.values()), 4) + (f" ({mean(differences, 4, '+')})" if differences else "") + short


def state(content: dict, name: str) -> str:
    """Bytes of the optimizer's state over AdamW's for the same weights, in percent."""
    run = next((run for run in content["runs"] if run["arm"] == name), None)
    return f"{100 * run['optimizer_state_bytes'] / (8 * run['trained_parameters']):.2f}%" if run else "-"


def chosen_rates(pairs: list[tuple[dict, str]]) -> str:
    """A sentence with the learning rate of each arm that has runs at a searched one."""
    words = []
    for content, dataset in pairs:
        for arm in content["study"]["arms"]:
            runs = [run for run in content["runs"] if run["dataset"] == dataset and run["arm"] == arm["name"]]
            if runs and "rates" in arm:
                found = rate(runs[0]["learning_rate"], arm["rates"][dataset])
                words.append(f"{arm['name']} on {content['model']}, {dataset}: {found}")
    return f"Learning rates: {'; '.join(words)}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("results", nargs="*", type=Path, help="JSON files of instruct_gpu.py")
    parser.add_argument("--readme", type=Path, help="replace the tables between its markers; else print them")
    parser.add_argument("--arms", help="numbers of the study's arms, from 1: 1,7,8 (default: all)")
    parser.add_argument("--swap", action="store_true", help="one table of all files, by arms")
    options = parser.parse_args(argv)
    try:
        numbers = [int(word) for word in options.arms.split(",")] if options.arms else None
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
        each = [] if options.swap else [tables(content, numbers) for content in contents]
        text = swap_table(contents) if options.swap else "\n\n".join(filter(None, each))
        if options.readme is None:
            print(text)
            return
        renewed = put_between(options.readme.read_text(encoding="utf-8"), START, END, text or "Not measured yet.")
    except (OSError, ValueError, KeyError, IndexError) as error:
        sys.exit(f"instruct_table.py: {type(error).__name__}: {error}; expected JSON of instruct_gpu.py, and markers.")
    options.readme.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    main()
