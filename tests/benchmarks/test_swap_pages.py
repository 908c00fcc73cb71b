"""What the pages say of the swap test is what the results hold."""

import json
from pathlib import Path
from statistics import mean

import yaml

from recipes.benchmarks.quality import swap_page as page
from recipes.benchmarks.quality import swap_table

REPO = Path(__file__).resolve().parents[2]
QUALITY = REPO / "recipes" / "benchmarks" / "quality"
CHOOSING = (REPO / "docs" / "choosing.md").read_text(encoding="utf-8")
SWAP = (QUALITY / "swap.md").read_text(encoding="utf-8")
CHAT_SWAP = (QUALITY / "instruct_swap.md").read_text(encoding="utf-8")


def words(text):
    return " ".join(text.split())


def points(found, digits=2):
    return "{:+.{}f} ± {:.{}f}".format(found[0], digits, found[1], digits)


def test_the_tables_and_the_averages_are_those_of_the_results():
    for name, make in page.TABLES.items():
        start, end = (mark.format(name) for mark in page.MARKS)
        assert "\n".join([start, make(), end]) in CHOOSING
    base, foam, _ = page.encoder_scores(page.SCALE)
    assert len(foam) == len(base) == 6 and all(len(scores) == 8 for scores in foam.values())
    together = points(page.pooled())
    models = "MPNet {}, MiniLM {}".format(*(points(page.pooled(models=(model,))) for model in ("mpnet", "minilm")))
    assert f"The six pairs together are {together}." in words(CHOOSING)
    assert models.replace("MPNet", "MPNet is") in words(CHOOSING)
    assert f"{together} at scale 6, the default, over six pairs of model and task; {models}" in words(SWAP)
    others = [points(page.pooled(scale)) for scale in (2, 4, 8)]
    assert "over the same six pairs, are {} at 2, {} at 4 and {} at 8".format(*others) in words(CHOOSING)
    stuck = [f"{score:.1f}" for score in page.encoder_scores(8)[1]["mpnet", "mrpc"].values() if score < 85]
    assert len(stuck) == 1 and f"one of eight seeds of MPNet stays at {stuck[0]} on MRPC" in words(SWAP)


def test_the_verdict_on_each_pair_of_chat_model_and_data_is_in_the_pages():
    arms = f"FOAM, scale {page.SCALE}, bf16", "AdamW, fp32"
    names = {"SmolLM2": page.CHAT[0], "Qwen2.5-Coder-0.5B": page.CHAT[1]}
    missed = []
    for model, path in names.items():
        for task in ("gsm8k", "alpaca"):
            differences = page.chat_differences(path, task, *arms)
            middle, error = page.with_error(differences)
            verdict = "yes" if middle <= 0 else "no, by less than its error"
            assert len(differences) == 3 and (middle < -6 * error or 0 < middle < error)
            missed += [page.shown(differences, 4)] * (middle > 0)
            assert f"| {model}, {page.TASKS[task]}: {page.shown(differences, 4)} | {verdict} |" in CHAT_SWAP
    assert f"SmolLM2 on Alpaca pairs is {missed[0]}," in words(CHOOSING) and len(missed) == 1


def test_the_rivals_are_those_that_have_finished_and_their_numbers_those_of_the_results():
    runs = [run for run in page.read_runs([page.ENCODERS]) if run["part"] == "result"]
    adamw, _, _ = page.encoder_scores(page.SCALE)
    found = {}
    for run in runs:
        if not run["arm"].startswith(("FOAM", "AdamW")) or run["arm"] == "AdamW, 8 bit":
            scores = zip(run["seeds"], run["scores"], strict=True)
            theirs = adamw[run["model"], run["task"]]
            found.setdefault(run["arm"], {})[run["task"]] = {
                seed: 100 * score - theirs[seed] for seed, score in scores
            }
            assert run["model"] == "minilm"
    assert {arm: sorted(tasks) for arm, tasks in found.items()} == {
        "AdamW, 8 bit": ["cola", "mrpc", "sst2"],
        "LoRA, rank 8, AdamW": ["cola", "mrpc", "sst2"],
        "Adafactor": ["mrpc"],
    }
    averages = {
        arm: points(page.with_error([mean(task[seed] for task in tasks.values()) for seed in range(1, 9)]))
        for arm, tasks in found.items()
    }
    share = {run["arm"]: f"{run['state_bytes'] / run['adamw_state_bytes']:.1%}" for run in runs}
    assert (
        f"8-bit AdamW is {averages['AdamW, 8 bit']} points from AdamW with {share['AdamW, 8 bit']} of its state, "
        f"LoRA (rank 8, AdamW) {averages['LoRA, rank 8, AdamW']} with {share['LoRA, rank 8, AdamW']}; "
        f"`foam`, not tuned, is {points(page.pooled(models=('minilm',)))} with 0.64%. "
        f"Adafactor has finished MRPC ({averages['Adafactor']};"
    ) in words(CHOOSING)


def test_the_scale_of_the_page_is_the_default():
    from foam_hf.optim_args import SCALES

    assert SCALES["block"] == page.SCALE


def test_what_is_said_of_lora_int8_rows_and_embeddings_is_in_the_results():
    smollm2, qwen = page.CHAT
    pairs = [(path, task) for path in page.CHAT for task in ("gsm8k", "alpaca")]

    def differences(arm, other):
        found = [page.chat_differences(*pair, arm, other) for pair in pairs]
        return [values for values in found if values]

    def level_or_ahead(values):
        return mean(values) <= 0 or mean(values) < page.with_error(values)[1]

    at_4, at_8 = (differences(f"LoRA, FOAM, scale {scale}", "LoRA, AdamW") for scale in (4, 8))
    assert len(at_4) == len(at_8) == 4 and [len(values) for values in at_4] == [3, 3, 2, 2]
    assert all(map(level_or_ahead, at_4)) and all(max(values) < 0 for values in at_8)
    for scale in (4, 8):
        costs = differences(f"FOAM, scale {scale}, INT8", f"FOAM, scale {scale}, bf16")
        assert all(0.0005 < mean(values) < 0.0045 for values in costs)  # "0.001 to 0.004"
        rows = differences(f"FOAM, level row, scale {scale}, bf16", f"FOAM, scale {scale}, bf16")
        assert len(rows) == 4 and all(abs(mean(values)) < 0.0005 for values in rows)
    ran = {arm for path in page.CHAT for arm in arms_of(path)}
    assert not {"LoRA, FOAM, scale 6", "FOAM, scale 6, INT8"} & ran
    smollm2_int8 = [
        page.chat_differences(smollm2, task, "FOAM, scale 8, INT8", "AdamW, fp32") for _, task in pairs[:2]
    ]
    assert all(map(level_or_ahead, smollm2_int8))
    arms = [f"FOAM, scale 4, {kind}bf16" for kind in ("embeddings factored at scale 1, ", "")]
    embeddings = [mean(page.chat_losses(qwen, arm)[0]["gsm8k"].values()) for arm in arms]
    assert "({:.4f} and {:.4f} on Qwen)".format(*embeddings) in words(CHOOSING)


def test_how_much_of_the_lead_is_the_dtypes_is_said():
    arms = "FOAM, scale 4, fp32", "FOAM, scale 4, bf16"
    alpaca, gsm8k = (page.chat_differences(page.CHAT[1], task, *arms) for task in ("alpaca", "gsm8k"))
    said = f"ends {mean(alpaca):.4f} above itself in bf16 on Alpaca pairs and {mean(gsm8k):.4f} on GSM8K"
    assert len(alpaca) == len(gsm8k) == 2 and said in words(CHOOSING) and said in words(CHAT_SWAP)
    assert not {"AdamW, bf16", "FOAM, scale 6, fp32"} & arms_of(page.CHAT[1])


def arms_of(path):
    return {run["arm"] for run in json.loads(path.read_text(encoding="utf-8"))["runs"]}


def test_tables_of_every_arm_are_those_of_the_results():
    plan = yaml.safe_load((QUALITY / "swap_encoders.yaml").read_text(encoding="utf-8"))
    table = swap_table.markdown(plan, swap_table.read_runs([page.ENCODERS]))
    assert f"<!-- table: swap_encoders -->\n{table}\n<!-- end of swap_encoders -->" in SWAP


def test_the_readmes_numbers_are_those_of_the_results():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    larger, smaller = (points(page.pooled(models=(model,)), 1) for model in ("mpnet", "minilm"))
    said = f"{points(page.pooled(), 1)} points on average, eight seeds"
    assert f"{said} ({larger} on the larger one, {smaller} on the smaller)" in words(readme)
    for name, arm in (("AdamW", "AdamW, fp32"), ("`foam`", f"FOAM, scale {page.SCALE}, bf16")):
        losses = [mean(found.values()) for path in page.CHAT for found in page.chat_losses(path, arm)[0].values()]
        assert f"| {name} | {' | '.join(f'{loss:.4f}' for loss in losses)} |" in readme
