"""What the pages say of the swap test is what the results hold."""

import json
from pathlib import Path
from statistics import mean

import yaml

from recipes.benchmarks.common.folders import RESULTS
from recipes.benchmarks.quality import swap_page as page
from recipes.benchmarks.quality import swap_table

REPO = Path(__file__).resolve().parents[2]
QUALITY = REPO / "recipes" / "benchmarks" / "quality"
CHOOSING = (REPO / "docs" / "choosing.md").read_text(encoding="utf-8")
SWAP = (QUALITY / "swap.md").read_text(encoding="utf-8")


def words(text):
    return " ".join(text.split())


def test_the_table_and_the_averages_are_those_of_the_results():
    assert f"{page.START}\n{page.table()}\n{page.END}" in CHOOSING
    together, minilm = (
        "{:+.2f} ± {:.2f}".format(*found) for found in (page.pooled(), page.pooled(models=("minilm",)))
    )
    assert f"five pairs together: {together} points" in words(CHOOSING) and together in SWAP
    assert f"MiniLM alone is {minilm}" in words(CHOOSING)
    base, foam, _ = page.encoder_scores(page.SCALE)
    assert len(foam) == 5 and len(base) == 6
    base, foam, _ = page.encoder_scores(4)
    sst2 = page.with_error([foam["mpnet", "sst2"][s] - base["mpnet", "sst2"][s] for s in base["mpnet", "sst2"]])
    assert "ran at scale 4 alone ({:+.1f} ± {:.1f})".format(*sst2) in words(CHOOSING)


def test_the_scale_of_the_page_is_the_default():
    from foam_hf.optim_args import SCALES

    assert SCALES["block"] == page.SCALE


def test_what_is_said_of_lora_int8_and_embeddings_is_in_the_results():
    smollm2, qwen = page.CHAT

    def loss(path, arm):
        losses, _ = page.chat_losses(path, arm)
        return mean(losses["gsm8k"].values())

    lora = [loss(smollm2, arm) for arm in ("LoRA, FOAM, scale 4", "LoRA, AdamW", "LoRA, FOAM, scale 8")]
    assert "at scale 4 ({:.3f} against {:.3f}) and ahead at 8 ({:.3f})".format(*lora) in words(CHOOSING)
    for scale in (4, 8):
        bf16 = page.chat_losses(smollm2, f"FOAM, scale {scale}, bf16")[0]["gsm8k"]
        int8 = page.chat_losses(smollm2, f"FOAM, scale {scale}, INT8")[0]["gsm8k"]
        assert all(abs(int8[seed] - bf16[seed]) < 0.002 for seed in int8)
    embeddings = [loss(qwen, f"FOAM, scale 4, {kind}bf16") for kind in ("embeddings factored at scale 1, ", "")]
    assert "({:.4f} and {:.4f} on Qwen)".format(*embeddings) in words(CHOOSING)
    row = [loss(qwen, f"FOAM, level row, scale {scale}, bf16") for scale in (4, 8)]
    assert "({:.4f} and {:.4f} at scales 4 and 8)".format(*row) in words(CHOOSING)


def test_tables_of_every_arm_are_those_of_the_results():
    plan = yaml.safe_load((QUALITY / "swap_encoders.yaml").read_text(encoding="utf-8"))
    table = swap_table.markdown(plan, swap_table.read_runs([page.ENCODERS]))
    assert f"<!-- table: swap_encoders -->\n{table}\n<!-- end of swap_encoders -->" in SWAP


def test_adamw_on_fresh_text_is_what_the_page_says():
    runs = json.loads((RESULTS / "pretrain_fresh_unfinished.json").read_text(encoding="utf-8"))["runs"]
    perplexities = {run["learning_rate"]: run["perplexity"] for run in runs}
    said = f"AdamW ends at {perplexities[1.3e-3]:.1f} and {perplexities[2.5e-3]:.1f} (1.3e-3 and 2.5e-3)"
    assert said in words(CHOOSING)


def test_the_readmes_numbers_are_those_of_the_results():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert "{:+.1f} ± {:.1f} points, eight seeds".format(*page.pooled()) in words(readme)
    for name, arm in (("AdamW", "AdamW, fp32"), ("`foam`", f"FOAM, scale {page.SCALE}, bf16")):
        losses = [mean(found.values()) for path in page.CHAT for found in page.chat_losses(path, arm)[0].values()]
        assert f"| {name} | {' | '.join(f'{loss:.4f}' for loss in losses)} |" in readme
