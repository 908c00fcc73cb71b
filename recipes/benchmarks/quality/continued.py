"""Page of what kept `foam` behind AdamW in continued pretraining, from the JSON of two plans.

python -m recipes.benchmarks.quality.continued          # renews continued.md
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from foam_hf.recipe_kit import renew_page
from recipes.benchmarks.common.folders import RESULTS
from recipes.benchmarks.quality.table import _table

if TYPE_CHECKING:
    from recipes.benchmarks.quality.full_or_lora import Part

PAGE = Path(__file__).with_name("continued.md")
MARKS = "<!-- {}: made by continued.py -->", "<!-- end of {} -->"
PLAIN, FACTORED = "FOAM, embeddings plain", "FOAM, embeddings factored, bf16"  # as the study of adapters calls them
# Plan of the study of adapters: the file that has the runs of this arm on its data sets, and their name there
JOINED = {
    "text": ("continued_rates.json", "FOAM, scale 6, embeddings plain"),
    "smollm2": ("tuned_embeddings.json", PLAIN),
}
LATER = ", highest rate"  # of an arm that ran before without it, and could not change any more
NAMES = {
    "AdamW, fp32": "AdamW, fp32",
    FACTORED: "`foam`, embeddings factored",
    PLAIN: "`foam`, embeddings plain",
    "FOAM, bf16": "`foam`, embeddings by blocks at scale 6",
}


def content(name: str, folder: Path = RESULTS) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def join(parts: dict[str, Part], folder: Path) -> None:
    """Give the study of adapters the runs with plain embeddings, which are of its data sets, seeds and rates.

    Raises ValueError where a data set, the other settings or the learning rate differ.
    """
    for name, (file, arm) in JOINED.items():
        if name not in parts or not (folder / file).is_file():
            continue
        found, known = content(file, folder), parts[name].study
        for dataset in {run["dataset"] for run in found["runs"]}:
            theirs, ours = (
                {**study["settings"], **study["datasets"][dataset]["settings"]} for study in (found["study"], known)
            )
            if theirs != ours:
                raise ValueError(f"{file}, {dataset}: got settings {theirs}; expected those of the other arms, {ours}")
        for run in found["runs"]:
            if run["arm"] == arm:
                rate = parts[name].chosen.get((run["dataset"], "AdamW, fp32"), run["learning_rate"])
                if run["learning_rate"] != rate:
                    raise ValueError(
                        f"{file}, {run['dataset']}: got learning rate {run['learning_rate']}; expected {rate}"
                    )
                parts[name].runs.setdefault((run["dataset"], PLAIN), {})[run["seed"]] = {**run, "arm": PLAIN}


def searched(found: dict) -> str:
    """A row an arm, a column a learning rate: the loss of the seed that chooses the rate."""
    rates = sorted({run["learning_rate"] for run in found["search"]})
    losses: dict[str, dict[float, float]] = {}
    state: dict[str, int] = {}
    for run in found["search"]:
        arm = run["arm"].removesuffix(LATER)
        losses.setdefault(arm, {})[run["learning_rate"]] = run["after"]["eval_loss"]
        state[arm] = run["optimizer_state_bytes"]
    rows = [["", *(f"{rate:g}" for rate in rates), "state, MB"]]
    for arm, by_rate in losses.items():
        cells = [f"{by_rate[rate]:.4f}" if rate in by_rate else "" for rate in rates]
        rows.append([arm.replace("FOAM", "`foam`"), *cells, f"{state[arm] / 1e6:.1f}"])
    return _table(rows)


def beside(part: Part, datasets: tuple[str, ...]) -> str:
    """Each rule of embeddings beside AdamW: loss, what was forgotten, state."""
    from recipes.benchmarks.quality.full_or_lora import loss, other, size

    columns = [(dataset, value) for value in (loss, other) for dataset in datasets]
    titles = [f"{size(part, dataset)}: {'loss' if value is loss else 'forgotten'}" for dataset, value in columns]
    rows = [["", *titles, "state, MB"]]
    for arm, name in NAMES.items():
        runs = [run for (_, of), by_seed in part.runs.items() if of == arm for run in by_seed.values()]
        if runs:
            cells = [part.cell(dataset, arm, value, 4) for dataset, value in columns]
            rows.append([name, *cells, f"{runs[0]['optimizer_state_bytes'] / 1e6:.1f}"])
    return _table(rows)


def missing(found: dict) -> str:
    """A sentence on the arms of a plan without any run, empty if there are none."""
    ran = {run["arm"] for run in [*found["search"], *found["runs"]]}
    names = [arm["name"].replace("FOAM", "`foam`") for arm in found["study"]["arms"] if arm["name"] not in ran]
    said = f"Of this plan have not run: {'; '.join(names)}; and seeds of all but plain embeddings."
    return textwrap.fill(said, 140) if names else ""


def tables(parts: dict[str, Part], folder: Path = RESULTS) -> str:
    """All tables of the page."""
    rates = content(JOINED["text"][0], folder)
    blocks = [
        "**Continued pretraining, at AdamW's rate of 2 M tokens, 3e-4**",
        beside(parts["text"], ("text_2m", "text_8m")),
        "**8 M tokens by learning rate: held-out loss of one run each, seed 100.** Where an arm says nothing of "
        "embeddings, they fold\nby blocks at the scale of all matrices.",
        searched(rates),
        missing(rates),
        "**GSM8K, at AdamW's rate of a quarter of it, 3e-4**",
        beside(parts["smollm2"], ("gsm8k_16th", "gsm8k_4th", "gsm8k")),
    ]
    return "\n\n".join(filter(None, blocks))


def main() -> None:
    from recipes.benchmarks.quality.full_or_lora import read

    renew_page(PAGE, *(mark.format("tables") for mark in MARKS), tables(read()))


if __name__ == "__main__":
    main()
