"""The table of docs/choosing.md: FOAM's default against AdamW tuned, on encoders and chat models, from the results.

python -m recipes.benchmarks.quality.swap_page --page docs/choosing.md
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from foam_hf.recipe_kit import renew_page
from recipes.benchmarks.common.folders import RESULTS
from recipes.benchmarks.quality.table import _table, read_runs

START, END = "<!-- swap: held to the results by tests/benchmarks/test_swap_pages.py -->", "<!-- end of swap -->"
ENCODERS, SCALE = RESULTS / "swap_encoders.jsonl", 6
CHAT = [RESULTS / "instruct_swap_smollm2.json", RESULTS / "instruct_swap_qwen.json"]
NAMES = {"mpnet": "all-mpnet-base-v2, 109 M", "minilm": "all-MiniLM-L6-v2, 23 M"}
TASKS = {"cola": "CoLA", "mrpc": "MRPC", "sst2": "SST-2, 10,000 rows", "gsm8k": "GSM8K", "alpaca": "Alpaca pairs"}
Scores = dict[tuple[str, str], dict[int, float]]


def with_error(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) / len(values) ** 0.5


def encoder_scores(scale: int) -> tuple[Scores, Scores, dict[tuple[str, str], float]]:
    """In percent by seed, of AdamW and of FOAM at a scale; FOAM's state over AdamW's: by model and task."""
    base, foam, state = {}, {}, {}
    for run in read_runs([ENCODERS]):
        if run["part"] != "result" or run["arm"] not in ("AdamW", f"FOAM, level 8, scale {scale}"):
            continue
        scores = {seed: 100 * score for seed, score in zip(run["seeds"], run["scores"], strict=True)}
        (base if run["arm"] == "AdamW" else foam)[run["model"], run["task"]] = scores
        if run["arm"] != "AdamW":
            state[run["model"], run["task"]] = run["state_bytes"] / run["adamw_state_bytes"]
    return base, foam, state


def pooled(scale: int = SCALE, models: tuple[str, ...] = tuple(NAMES)) -> tuple[float, float]:
    """FOAM's mean difference from AdamW over the pairs of model and task that have run, and its error over seeds."""
    base, foam, _ = encoder_scores(scale)
    pairs = [pair for pair in foam if pair[0] in models]
    return with_error([mean(foam[pair][seed] - base[pair][seed] for pair in pairs) for seed in base[pairs[0]]])


def chat_losses(path: Path, arm: str) -> tuple[Scores, dict[str, float]]:
    """Held-out losses by data set and seed; the state's bytes over AdamW's by data set."""
    losses, state = {}, {}
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
        if run["arm"] == arm:
            losses.setdefault(run["dataset"], {})[run["seed"]] = run["after"]["eval_loss"]
            state[run["dataset"]] = run["optimizer_state_bytes"] / (8 * run["trained_parameters"])
    return losses, state


def table() -> str:
    lines = [["model", "task", "AdamW", "`foam`", "difference", "FOAM's state"]]
    base, foam, state = encoder_scores(SCALE)
    for model, task in [(model, task) for model in NAMES for task in TASKS if (model, task) in foam]:
        ours, theirs = foam[model, task], base[model, task]
        difference = with_error([ours[seed] - theirs[seed] for seed in theirs])
        cells = [f"{mean(theirs.values()):.1f}", f"{mean(ours.values()):.1f}", "{:+.1f} ± {:.1f}".format(*difference)]
        lines.append([NAMES[model], TASKS[task], *cells, f"{state[model, task]:.2%}"])
    for path in CHAT:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        theirs, _ = chat_losses(path, "AdamW, fp32")
        ours, kept = chat_losses(path, f"FOAM, scale {SCALE}, bf16")
        for task in theirs:
            difference = with_error([ours[task][seed] - theirs[task][seed] for seed in theirs[task]])
            cells = [f"{mean(theirs[task].values()):.4f}", f"{mean(ours[task].values()):.4f}"]
            cells += ["{:+.4f} ± {:.4f}".format(*difference), f"{kept[task]:.2%}"]
            lines.append([model, TASKS[task], *cells])
    return _table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--page", type=Path, help="renew the table between its marks in this file")
    options = parser.parse_args()
    if options.page is None:
        print(table())
        print("all pairs: {:+.2f} ± {:.2f}; MiniLM: {:+.2f} ± {:.2f}".format(*pooled(), *pooled(models=("minilm",))))
        return
    renew_page(options.page, START, END, table())


if __name__ == "__main__":
    main()
