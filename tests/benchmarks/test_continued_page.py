"""The page on embeddings in continued pretraining holds its results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recipes.benchmarks.quality import continued, full_or_lora


def test_the_page_has_the_tables_of_the_results() -> None:
    start, end = (mark.format("tables") for mark in continued.MARKS)
    made = "\n".join([start, continued.tables(full_or_lora.read()), end])
    assert made in continued.PAGE.read_text(encoding="utf-8")


def test_every_number_of_the_text_is_in_the_results() -> None:
    made = continued.tables(full_or_lora.read())
    text = continued.PAGE.read_text(encoding="utf-8").split("<!-- tables")[0]
    found = re.findall(r"\d+\.\d{4}(?: ± \d+\.\d+)?|\d+\.\d MB", text)
    assert len(found) > 20 and [number for number in found if number.removesuffix(" MB") not in made] == []


def test_what_the_text_says_of_rates_and_scales_is_so() -> None:
    found = continued.content("continued_rates.json")
    losses = {(run["arm"], run["learning_rate"]): run["after"]["eval_loss"] for run in found["search"]}
    state = {run["arm"]: run["optimizer_state_bytes"] for run in found["search"]}
    scales = {key: loss for key, loss in losses.items() if re.fullmatch(r"FOAM, scale \d", key[0])}
    assert len(scales) == 8 and min(scales, key=scales.__getitem__) == ("FOAM, scale 6", 1e-4)
    factored, plain = "FOAM, scale 6, embeddings factored", "FOAM, scale 6, embeddings plain"
    by_blocks = [loss for (arm, _), loss in losses.items() if "FOAM" in arm and not arm.startswith((factored, plain))]
    for arm in (factored, plain):
        assert losses[arm, 3e-4] < losses["AdamW, fp32", 3e-4] < min(by_blocks)
    assert state[factored] < state["FOAM, scale 6"] < state[plain] < state["FOAM, scale 2, level 2"]
    adamw = {rate: loss for (arm, rate), loss in losses.items() if arm == "AdamW, fp32"}
    assert min(adamw, key=adamw.__getitem__) == max(adamw) == 1e-3 and adamw[1e-3] < losses[factored, 1e-3]


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
