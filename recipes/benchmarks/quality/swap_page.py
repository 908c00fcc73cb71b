"""Tables of docs/choosing.md, from the results: FOAM's default against AdamW tuned, on encoders and chat models; other
scales; LoRA and INT8 weights.

python -m recipes.benchmarks.quality.swap_page --page docs/choosing.md
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from foam_hf.recipe_kit import renew_page
from recipes.benchmarks.common.folders import RESULTS
from recipes.benchmarks.quality.table import _table, read_runs

MARKS = "<!-- {}: held to the results by tests/benchmarks/test_swap_pages.py -->", "<!-- end of {} -->"
ENCODERS, SCALE = RESULTS / "swap_encoders.jsonl", 6
CHAT = [RESULTS / "instruct_swap_smollm2.json", RESULTS / "instruct_swap_qwen.json"]
NAMES = {"mpnet": "all-mpnet-base-v2, 109 M", "minilm": "all-MiniLM-L6-v2, 23 M"}
TASKS = {"cola": "CoLA", "mrpc": "MRPC", "sst2": "SST-2, 10,000 rows", "gsm8k": "GSM8K", "alpaca": "Alpaca pairs"}
# What a row of the second table says: an arm, and the arm whose losses are taken off.
CHAT_ROWS = {f"scale {scale}": (f"FOAM, scale {scale}, bf16", "AdamW, fp32") for scale in (2, 4, 6, 8)}
CHAT_ROWS["scale 4, fp32 weights"] = "FOAM, scale 4, fp32", "AdamW, fp32"
for scale in (4, 8):
    CHAT_ROWS[f"scale {scale}, LoRA, from AdamW's LoRA"] = f"LoRA, FOAM, scale {scale}", "LoRA, AdamW"
for scale in (4, 8):
    CHAT_ROWS[f"scale {scale}, INT8 weights"] = f"FOAM, scale {scale}, INT8", "AdamW, fp32"
    CHAT_ROWS[f"scale {scale}, INT8 weights, from bf16 weights"] = (
        f"FOAM, scale {scale}, INT8",
        f"FOAM, scale {scale}, bf16",
    )
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


def shown(values: list[float], digits: int) -> str:
    """Mean and error of differences; of a single one, no error."""
    if len(values) == 1:
        return f"{values[0]:+.{digits}f}, one seed"
    text = "{:+.{}f} ± {:.{}f}".format(mean(values), digits, with_error(values)[1], digits)
    return text + (", two seeds" if len(values) == 2 else "")


def table() -> str:
    """FOAM's default beside AdamW: a row for each pair of model and task."""
    lines = [["model", "task", "AdamW", "`foam`", "difference", "FOAM's state"]]
    base, foam, state = encoder_scores(SCALE)
    for model, task in [(model, task) for model in NAMES for task in TASKS if (model, task) in foam]:
        ours, theirs = foam[model, task], base[model, task]
        difference = shown([ours[seed] - theirs[seed] for seed in theirs], 1)
        cells = [f"{mean(theirs.values()):.1f}", f"{mean(ours.values()):.1f}", difference]
        lines.append([NAMES[model], TASKS[task], *cells, f"{state[model, task]:.2%}"])
    for path in CHAT:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        theirs, _ = chat_losses(path, "AdamW, fp32")
        ours, kept = chat_losses(path, f"FOAM, scale {SCALE}, bf16")
        for task in theirs:
            cells = [f"{mean(theirs[task].values()):.4f}", f"{mean(ours[task].values()):.4f}"]
            cells += [shown(chat_differences(path, task, f"FOAM, scale {SCALE}, bf16", "AdamW, fp32"), 4)]
            lines.append([model, TASKS[task], *cells, f"{kept[task]:.2%}"])
    return _table(lines)


def chat_differences(path: Path, task: str, arm: str, other: str) -> list[float]:
    """The arm's losses less the other's, of the seeds that both have."""
    ours, theirs = (chat_losses(path, name)[0].get(task, {}) for name in (arm, other))
    return [ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs]


def chat_table() -> str:
    """Differences from AdamW at other scales, under LoRA and with INT8 weights."""
    pairs = [(path, task) for path in CHAT for task in chat_losses(path, "AdamW, fp32")[0]]
    titles = [f"{json.loads(path.read_text(encoding='utf-8'))['model']}, {TASKS[task]}" for path, task in pairs]
    lines = [["", *titles]]
    for name, arms in CHAT_ROWS.items():
        found = [chat_differences(path, task, *arms) for path, task in pairs]
        lines.append([name, *(shown(values, 4) if values else "" for values in found)])
    return _table(lines)


TABLES = {"swap": table, "swap of chat models": chat_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--page", type=Path, help="renew the tables between their marks in this file")
    options = parser.parse_args()
    if options.page is None:
        print("\n\n".join(find() for find in TABLES.values()))
        for scale in (2, 4, 6, 8):
            print("scale {}: {:+.2f} ± {:.2f} over all pairs".format(scale, *pooled(scale)))
        for model in NAMES:
            print("scale {}: {:+.2f} ± {:.2f} on {}".format(SCALE, *pooled(models=(model,)), model))
        return
    for name, make in TABLES.items():
        renew_page(options.page, *(mark.format(name) for mark in MARKS), make())


if __name__ == "__main__":
    main()
