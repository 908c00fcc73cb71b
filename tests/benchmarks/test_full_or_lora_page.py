"""The pages on every weight against adapters hold the numbers of the results, and say what has not run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

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
    of_int8 = f"{FOAM[:-4]}INT8"
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


def said(path: Path, start: str, end: str) -> str:
    """What a page says between two of its lines."""
    return path.read_text(encoding="utf-8").split(start)[1].split(end)[0]


def test_every_number_that_the_texts_give_is_in_the_tables() -> None:
    parts = page.read()
    tables = page.tables(parts) + page.answer(parts)
    (beyond,) = [run for run in json_of("text")["search"] if run["learning_rate"] == 2e-2]
    tables += f" {beyond['after']['eval_loss']:.2f}"  # LoRA's next rate
    texts = [
        said(page.PAGE, "# Every weight or adapters, by size of data", "<!-- tables"),
        said(page.CHOOSING, "## Every weight or LoRA?", "## From scratch"),
        said(ROOT / "README.md", "## Why not LoRA?", "## What it saves"),
    ]
    for text in texts:
        found = re.findall(r"\d+\.\d{2,}(?: ± \d+\.\d+)?", text.replace("0.009", ""))
        assert len(found) > 5 and [number for number in found if number not in tables] == []


def json_of(name: str) -> dict:
    return json.loads((page.RESULTS / f"full_or_lora_{name}.json").read_text(encoding="utf-8"))


def of(part: page.Part, dataset: str, value: page.Value = page.loss) -> dict[str, list[float]]:
    """The arms that have run, and their seeds."""
    found = {arm: part.values(dataset, arm, value) for arm in page.ARMS}
    return {arm: values for arm, values in found.items() if values}


def means(part: page.Part, dataset: str, value: page.Value = page.loss) -> dict[str, float]:
    return {arm: fmean(values) for arm, values in of(part, dataset, value).items()}


def test_what_the_texts_say_of_gsm8k_is_so() -> None:
    parts = page.read()
    qwen, small = parts["qwen"], parts["smollm2"]
    whole, matches = of(qwen, "gsm8k"), of(qwen, "gsm8k", page.match)
    ends = [fmean(values) for arm, values in whole.items() if arm != "QLoRA 16, AdamW"]
    assert max(ends) - min(ends) <= 0.009
    answered = [fmean(values) for arm, values in matches.items() if arm != "QLoRA 16, AdamW"]
    texts = [said(page.PAGE, "# Every", "<!-- tables"), said(page.CHOOSING, "## Every weight or LoRA?", "<!-- full")]
    assert all(f"{min(answered):.1f} to {max(answered):.1f}%" in " ".join(text.split()) for text in texts)
    thrice, answered_then = means(qwen, "gsm8k_x3"), means(qwen, "gsm8k_x3", page.match)
    assert len(thrice) == 7 and all(len(values) == 1 for values in of(qwen, "gsm8k_x3").values())
    for arm, value in thrice.items():  # three passes overfit, adapters least, and answer more
        assert value > fmean(whole[arm]) and answered_then[arm] > fmean(matches[arm])
        assert "LoRA" not in arm or value < thrice["AdamW, fp32"] - 0.03 < thrice[FOAM] - 0.06
    assert f"{min(answered_then.values()):.1f} to {max(answered_then.values()):.1f}%" in " ".join(texts[0].split())
    shares = []  # of what all weights gain from FOAM, LoRA's
    for part in (qwen, small):
        assert all(max(found := means(part, size), key=found.__getitem__) == "QLoRA 16, AdamW" for size in GROWING)
        for size in ("gsm8k_16th", "gsm8k_4th"):  # FOAM ahead where examples are few
            few, errors = means(part, size), page.error(of(part, size)[FOAM])
            for arm in ("AdamW, fp32", "LoRA 16, AdamW", "LoRA 128, AdamW"):
                assert few[FOAM] < few[arm] - 5 * errors
            full, *adapters = (few[arm] - few[foam] for arm, foam in PAIRS)
            shares += [gain / full for gain in adapters]
    assert min(shares) > 1 / 3 and max(shares) < 0.9
    all_of_it = means(small, "gsm8k")
    assert all_of_it["AdamW, fp32"] < all_of_it[FOAM] < all_of_it["LoRA 128, AdamW"] - 0.01
    for part in (qwen, small):
        forgotten = means(part, "gsm8k", page.other)
        assert forgotten["LoRA 16, AdamW"] < forgotten["AdamW, fp32"] < forgotten[FOAM] < forgotten["FOAM, bf16"]


def test_what_the_texts_say_of_continued_pretraining_is_so() -> None:
    text = page.read()["text"]
    two, eight, most = (means(text, f"text_{size}m") for size in (2, 8, 32))
    forgotten = means(text, "text_32m", page.other)
    for found in (two, eight, most):  # level with AdamW, and ahead of all adapters
        assert -0.004 < found[FOAM] - found["AdamW, fp32"] < 0.001
        ranked = ["AdamW, fp32", "LoRA 128, AdamW", "LoRA 16, AdamW", "QLoRA 16, AdamW"]
        assert sorted(ranked, key=found.__getitem__) == ranked
    gaps = [found["LoRA 128, AdamW"] - found["AdamW, fp32"] for found in (two, eight, most)]
    assert round(gaps[0], 3) == 0.009 and gaps == sorted(gaps)
    assert eight["LoRA 16, AdamW"] < eight["FOAM, bf16"] and most["LoRA 16, AdamW"] < most["FOAM, bf16"]
    kept = ["AdamW, fp32", FOAM, "LoRA 16, AdamW"]
    assert sorted(kept, key=forgotten.__getitem__) == kept and min(forgotten, key=forgotten.__getitem__) == kept[0]
    assert {arm: len(values) for arm, values in of(text, "text_32m").items() if len(values) > 1} == {"AdamW, fp32": 2}
    for arm in ("LoRA 16, FOAM", "LoRA 128, FOAM"):  # above the untrained model: named, not drawn
        assert eight[arm] > text.before("text_8m", "eval_loss") > two[arm]
        assert pictures.LOOKS[arm][-1] in pictures.diverged(text, ["text_2m", "text_8m"], page.loss)
        assert [size for size, *_ in pictures.curve(text, ["text_2m", "text_8m"], arm, page.loss)] == [2_000_384]


def test_what_the_texts_say_of_memory_and_speed_is_so() -> None:
    parts = page.read()
    peaks = {arm: page.gib(run) for arm, run in parts["qwen"].memory.items()}
    assert peaks["LoRA 16, AdamW"] < peaks["FOAM, INT8"] < peaks["LoRA 128, AdamW"] < peaks[FOAM]
    text, qwen = parts["text"], parts["qwen"].alone
    speed = {arm: run["tokens_per_second"] for arm, run in text.alone.items()}
    lora = sorted(speed[arm] for arm in speed if arm.startswith("LoRA"))
    target = page.goal(text, "text")
    took = {arm: page.seconds_to(text, page.sizes(text, "text"), arm, target) for arm in speed}
    adapters = sorted(int(took[arm]) for arm in took if arm.startswith("LoRA"))
    expected = f"""`foam` trains all of SmolLM2's weights at {speed[FOAM]:,.0f} tokens/s, AdamW in fp32 at
        {speed["AdamW, fp32"]:,.0f}, INT8 weights at {speed[f"{FOAM[:-4]}INT8"]:,.0f}, LoRA at {lora[0]:,.0f} to
        {lora[-1]:,.0f}, QLoRA at {speed["QLoRA 16, AdamW"]:,.0f}. A loss of {target:.3f} takes `foam` {took[FOAM]}
        seconds and AdamW {took["AdamW, fp32"]}, on 8 M tokens; LoRA needs 32 M, and {adapters[0]} to {adapters[-1]}
        seconds; QLoRA does not reach it."""
    said_there = " ".join(page.PAGE.read_text(encoding="utf-8").split())
    assert " ".join(expected.split()) in said_there and took["QLoRA 16, AdamW"] == "not reached"
    for arm in (FOAM, "AdamW, fp32"):
        assert fmean(text.values("text_8m", arm, page.loss)) <= target < fmean(text.values("text_2m", arm, page.loss))
    words = f"""On Qwen `foam`, with embeddings by blocks, trains at {qwen["FOAM, bf16"]["tokens_per_second"]:,.0f}
        tokens/s, AdamW at {qwen["AdamW, fp32"]["tokens_per_second"]:,.0f}."""
    assert " ".join(words.split()) in said_there


FOAM, GROWING = page.continued.FACTORED, ("gsm8k_16th", "gsm8k_4th", "gsm8k")
PAIRS = (
    ("AdamW, fp32", FOAM),
    ("LoRA 16, AdamW", "LoRA 16, FOAM"),
    ("LoRA 128, AdamW", "LoRA 128, FOAM"),
)  # an optimizer swapped
