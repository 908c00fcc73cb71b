"""`python -m recipes.benchmarks.quality.release_table` renews the tables in release.md from the studies' JSON.

Each arm's held-out losses are compared, seed by seed, with plain accumulation of the same weights and micro-batches.
"""

import json
import statistics
from pathlib import Path

from foam_hf.recipe_kit import renew_page

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE.parent / "results", HERE / "release.md"
CANDIDATES = {  # names in the JSON -> what they are
    "share squares": "as it is",
    "share mixed": "mean of squares by the sketch, for each weight",
    "share sketch": "mean of squares by the sketch, for each block",
    "k squares": "an element's own squares times the number of micro-batches",
}


def losses(content: dict, dataset: str, arm: str) -> dict[int, float]:
    """Seed -> held-out loss."""
    return {
        run["seed"]: run["after"]["eval_loss"]
        for run in content["runs"]
        if run["dataset"] == dataset and run["arm"] == arm
    }


def difference(mine: dict[int, float], base: dict[int, float]) -> tuple[float, int]:
    """The mean difference over the seeds that both have, and their number."""
    pairs = [mine[seed] - base[seed] for seed in mine.keys() & base.keys()]
    return statistics.fmean(pairs), len(pairs)


def accumulation(content: dict) -> list[list[str]]:
    """A row for each kind of weights and micro-batches and each kind of denominators; newer studies have one kind."""
    arms = {arm["name"] for arm in content["study"]["arms"]}
    rows = [["weights, micro-batches", "denominators", *content["study"]["datasets"]]]
    for kind in ("bf16, 4 x 4", "bf16, 16 x 1", "INT8, 4 x 4", "INT8, 16 x 1"):
        for name, words in CANDIDATES.items():
            cells = []
            for dataset in content["study"]["datasets"]:
                arm = f"release, {name}, {kind}"
                if arm not in arms and words == "as it is":
                    arm = f"release, {kind}"
                mine = losses(content, dataset, arm)
                base = losses(content, dataset, f"plain, {kind}")
                if not mine:
                    cells += [""] if arm in arms else []
                    continue
                found, count = difference(mine, base)
                cells.append(f"{found:+.4f} ({count} seed{'s' if count > 1 else ''})")
            if any(cells):
                rows.append([kind, words, *cells])
    return rows


def spikes(content: dict) -> list[list[str]]:
    rows = [["", "held-out loss by seed"]]
    for arm in (one["name"] for one in content["study"]["arms"]):
        found = losses(content, "gsm8k", arm)
        if found:
            rows.append([arm, ", ".join(f"{found[seed]:.4f}" for seed in sorted(found))])
    return rows


def markdown(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


TABLES = {"release_study": accumulation, "release_shipped": accumulation, "release_spikes": spikes}


def main() -> None:
    for name, rows in TABLES.items():
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        renew_page(PAGE, f"<!-- table: {name} -->", f"<!-- end of {name} -->", markdown(rows(content)))


if __name__ == "__main__":
    main()
