"""The pages on every weight against adapters hold the numbers of the results, and say what has not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.benchmarks.quality import full_or_lora as page
from recipes.benchmarks.quality import full_or_lora_pictures as pictures
from tests.support.instruct_runs import ROOT


def made_up(folder: Path) -> dict[str, page.Part]:
    """Results of two files of one plan: two seeds of one arm on two sizes, one seed of another on one."""
    data = {"file": "gsm8k_train.jsonl", "settings": {"eval_exact_match": True}}
    study = {
        "settings": {"num_train_epochs": 1},
        "seeds": [1, 2],
        "datasets": {"gsm8k_4th": data, "gsm8k": {**data, "rates_of": "gsm8k_4th"}},
        "arms": [{"name": "AdamW, fp32", "rates": {"gsm8k_4th": [0.1, 0.2]}}],
    }
    cost = {"trained_parameters": 10**6, "optimizer_state_bytes": 8 * 10**6, "peak_bytes": {"total": 2**30}}

    def run(dataset: str, arm: str, seed: int, loss: float | None, used: int) -> dict:
        before = {"eval_loss": 2.0, "exact_match": 0.1} if (dataset, seed) == ("gsm8k_4th", 1) else None
        after = {"eval_loss": loss, "exact_match": 0.5, "other_loss": 1.5}
        named = {"dataset": dataset, "arm": arm, "seed": seed, "before": before, "after": after, "device": "GPU"}
        named["learning_rate"] = 0.2
        return {**named, **cost, "data": {"train": {"used": used}}, "trained_tokens": 100 * used}

    first = [run("gsm8k_4th", "AdamW, fp32", 1, 1.0, 20), run("gsm8k_4th", "AdamW, fp32", 2, 1.5, 20)]
    first += [run("gsm8k", "AdamW, fp32", 1, 0.75, 80), run("gsm8k", "AdamW, fp32", 2, None, 80)]
    alone = [{"arm": "AdamW, fp32", "tokens_per_second": 500.0, **cost}]
    chosen = [{"dataset": "gsm8k_4th", "arm": "AdamW, fp32", "learning_rate": 0.2}]
    second = [run("gsm8k", "LoRA 16, AdamW", 1, 0.5, 80)]
    for name, runs, more in (("full", first, alone), ("lora", second, [])):
        search = [{"dataset": "gsm8k_4th", "arm": "AdamW, fp32", "learning_rate": rate} for rate in (0.1, 0.2)]
        content = {"study": study, "runs": runs, "search": search, "alone": more, "memory": more, "chosen": chosen}
        (folder / f"full_or_lora_qwen_{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return page.read(folder)


def test_means_errors_and_what_is_missing_are_in_the_tables(tmp_path: Path) -> None:
    parts = made_up(tmp_path)
    text = page.tables(parts)
    assert "|  | 20 of GSM8K | 80 of GSM8K |" in text
    assert "| AdamW, all weights, fp32 | 1.2500 ± 0.2500 | 0.7500, 1 of 2 seeds, 1 diverged |" in text
    assert "| LoRA, rank 16, AdamW | not run | 0.5000, 1 of 2 seeds |" in text
    assert "| untrained | 10.0 | 10.0 |" in text  # the same held-out examples
    assert "| AdamW, all weights, fp32 | 1.0 M | 8.0 | 1.00 | 1.00 | 500 | 16 |" in text
    assert "AdamW, all weights, fp32, on 20 of GSM8K: 0.2, the highest tried" in text
    assert "Not run: `foam`, all weights, bf16; " in text
    points = pictures.curve(parts["qwen"], ["gsm8k_4th", "gsm8k"], "AdamW, fp32", page.loss)
    assert (
        points == [(20, 1.25, 0.25), (80, 0.75, 0.0)] and pictures.diverged(parts["qwen"], ["gsm8k"], page.loss) == ""
    )
    assert [path.stat().st_size > 10_000 for path in pictures.draw(parts, tmp_path)] == [True, True]
    assert page.tables({}) == page.answer({}) == "Not measured yet." and pictures.draw({}, tmp_path) == []


def test_what_diverged_is_not_called_missing_and_more_passes_are_no_larger_size(tmp_path: Path) -> None:
    parts = made_up(tmp_path)
    part = parts["qwen"]
    one = part.runs["gsm8k", "AdamW, fp32"][1]
    part.study["datasets"]["gsm8k_x3"] = {**part.study["datasets"]["gsm8k"], "settings": {"num_train_epochs": 3}}
    for dataset, loss in (("gsm8k_4th", 1.0), ("gsm8k", 0.6), ("gsm8k_x3", 0.9)):  # it overfits
        for arm in page.CORE:
            part.runs[dataset, arm] = {seed: {**one, "seed": seed, "after": {"eval_loss": loss}} for seed in (1, 2)}
    of_int8 = "FOAM, embeddings factored, INT8"
    part.runs["gsm8k", of_int8] = {1: {**one, "after": {"eval_loss": 0.7}}}
    part.alone[of_int8] = part.alone["AdamW, fp32"]
    assert "80 of GSM8K, 3 times" in page.tables(parts) and page.goal(part, "qwen") == 0.6
    assert "80 of GSM8K: loss" in page.answer(parts) and "3 times" not in page.answer(parts)
    words = [line.split(" | ")[-1] for line in page.cost(part, "qwen").splitlines()]
    assert words[0] == "seconds to a loss of 0.600 |"
    assert words[2:5] == ["16 |", "not run |", "not reached |"]  # AdamW, FOAM without a speed, FOAM in INT8
    part.runs["gsm8k", "LoRA 128, AdamW"] = {seed: {**one, "after": {"eval_loss": None}} for seed in (1, 2)}
    (row,) = [line for line in page.answer(parts).splitlines() if "rank 128, AdamW" in line]
    assert row.startswith("| LoRA, rank 128, AdamW | not run | 1.0000 ± 0.0000 | 2 of 2 seeds diverged |")
    part.chosen["gsm8k_4th", "AdamW, fp32"] = None
    assert "AdamW, all weights, fp32, on 80 of GSM8K: none, as all 2 tried diverged" in page.rates(part)
    assert page.goal(part, "qwen") is None


def test_files_of_one_plan_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    made_up(tmp_path)
    path = tmp_path / "full_or_lora_qwen_lora.json"
    content = json.loads(path.read_text())
    (run,) = content["runs"]
    again = tmp_path / "full_or_lora_qwen_more.json"
    again.write_text(path.read_text())
    assert len(page.read(tmp_path)["qwen"].runs["gsm8k", "LoRA 16, AdamW"]) == 1  # the same twice is no contradiction
    for changed, wrong in (
        ({"runs": [{**run, "device": "CPU"}]}, "gsm8k, LoRA 16, AdamW: two files have seed 1; expected it once"),
        (
            {"runs": [{**run, "seed": 2, "learning_rate": 0.1}]},
            r"got learning rates \[0.1, 0.2\]; expected the chosen",
        ),
        ({"runs": [{**run, "seed": 3, "arm": "AdamW, fp32", "dataset": "gsm8k_4th", "learning_rate": 0.1}]}, "chosen"),
        ({"study": {**content["study"], "seeds": [1, 2, 3]}}, "two files have plans that differ in more than arms"),
    ):
        again.write_text(json.dumps({**content, **changed}))
        with pytest.raises(ValueError, match=wrong):
            page.read(tmp_path)


def test_the_pages_have_the_tables_of_the_results() -> None:
    parts = page.read()
    assert parts, "no results"
    for path, name, text in (
        (page.PAGE, "tables", page.tables(parts)),
        (page.CHOOSING, "full or lora", page.answer(parts)),
    ):
        start, end = (mark.format(name) for mark in page.MARKS)
        assert "\n".join([start, text, end]) in path.read_text(encoding="utf-8")
    for name in (pictures.SIZE_PICTURE, pictures.PEAK_PICTURE):
        assert (page.RESULTS / name).is_file() and name in page.PAGE.read_text(encoding="utf-8")
    assert pictures.SIZE_PICTURE in (ROOT / "README.md").read_text(encoding="utf-8")
