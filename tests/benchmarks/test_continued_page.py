"""The page on embeddings in continued pretraining holds its results, and names the runs that were lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recipes.benchmarks.quality import continued, full_or_lora

# Runs whose JSON is lost: the page says so, and no file has them.
LOST = ("2.3871", "2.3672", "2.3744", "0.7594", "0.6778")


def test_the_page_has_the_tables_of_the_results() -> None:
    start, end = (mark.format("tables") for mark in continued.MARKS)
    made = "\n".join([start, continued.tables(full_or_lora.read()), end])
    assert made in continued.PAGE.read_text(encoding="utf-8")


def test_every_number_of_the_text_is_in_the_results_or_among_the_lost() -> None:
    parts = full_or_lora.read()
    made = continued.tables(parts)
    first = {dataset: parts["smollm2"].runs[dataset, "FOAM, bf16"][1] for dataset in ("gsm8k_16th", "gsm8k_4th")}
    made += " ".join(f"{run['after']['eval_loss']:.4f}" for run in first.values())  # beside the lost ones, by seed
    text = continued.PAGE.read_text(encoding="utf-8").split("<!-- tables")[0]
    before, after = text.split("**Lost runs.**")
    numbers = r"\d+\.\d{4}(?: ± \d+\.\d+)?|\d+\.\d MB"
    assert [number for number in re.findall(numbers, before) if number.removesuffix(" MB") not in made] == []
    assert sorted(number for number in re.findall(numbers, after) if number not in made) == sorted(LOST)


def test_what_the_text_says_of_rates_and_scales_is_so() -> None:
    found = continued.content("continued_rates.json")
    losses = {(run["arm"], run["learning_rate"]): run["after"]["eval_loss"] for run in found["search"]}
    state = {run["arm"]: run["optimizer_state_bytes"] for run in found["search"]}
    scales = {key: loss for key, loss in losses.items() if re.fullmatch(r"FOAM, scale \d", key[0])}
    assert len(scales) == 8 and min(scales, key=scales.__getitem__) == ("FOAM, scale 6", 1e-4)
    plain = "FOAM, scale 6, embeddings plain"
    assert (
        losses[plain, 3e-4]
        < losses["AdamW, fp32", 3e-4]
        < min(loss for key, loss in losses.items() if key[0] != plain and "FOAM" in key[0])
    )
    assert state[plain] < state["FOAM, scale 2, level 2"]
    assert losses["AdamW, fp32", 1e-3] < losses[plain, 3e-4] and (plain, 1e-3) not in losses


def made_up(folder: Path, tokens: int) -> dict[str, full_or_lora.Part]:
    def study(arm: str, tokens: int, rate: float) -> dict:
        run = {
            "dataset": "text_2m",
            "arm": arm,
            "seed": 1,
            "learning_rate": rate,
            "before": None,
            "after": {"eval_loss": 2.0},
        }
        datasets = {"text_2m": {"file": "tokens.json", "settings": {"tokens": tokens}}}
        plan = {"settings": {"block": 512}, "seeds": [1], "datasets": datasets, "arms": [{"name": arm}]}
        return {"study": plan, "runs": [run], "search": [], "alone": [], "chosen": []}

    (folder / "full_or_lora_text.json").write_text(json.dumps(study("AdamW, fp32", 2_000_000, 0.1)))
    (folder / "continued_rates.json").write_text(json.dumps(study("FOAM, scale 6, embeddings plain", tokens, 0.1)))
    return full_or_lora.read(folder)


def test_runs_of_another_study_join_those_of_the_same_data_alone(tmp_path: Path) -> None:
    part = made_up(tmp_path, 2_000_000)["text"]
    assert part.values("text_2m", continued.PLAIN, full_or_lora.loss) == [2.0]
    with pytest.raises(
        ValueError,
        match="continued_rates.json, text_2m: got settings .*300.*; expected those of the other arms, .*2000000",
    ):
        made_up(tmp_path, 300)
