"""The sentences of the pages on every weight against adapters are made of the results again, number by number."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest

from recipes.benchmarks.quality import full_or_lora as page
from recipes.benchmarks.quality import full_or_lora_pictures as pictures
from tests.support.instruct_runs import ROOT

ADAMW, FOAM, PLAIN = "AdamW, fp32", page.continued.FACTORED, page.continued.PLAIN
INT8, BLOCKS = f"{FOAM[:-4]}INT8", "FOAM, bf16"
LORA_16, LORA_128, QLORA = "LoRA 16, AdamW", "LoRA 128, AdamW", "QLoRA 16, AdamW"
GROWING = ("gsm8k_16th", "gsm8k_4th", "gsm8k")
PARTS = page.read()
QWEN, SMALL, TEXT = PARTS["qwen"], PARTS["smollm2"], PARTS["text"]
PAIRS = ((ADAMW, FOAM), (LORA_16, "LoRA 16, FOAM"), (LORA_128, "LoRA 128, FOAM"))  # an optimizer swapped


def mean(part: page.Part, dataset: str, arm: str, value: page.Value = page.loss, digits: int = 4) -> str:
    """Mean and standard error as a sentence gives them."""
    found = part.values(dataset, arm, value)
    assert found, (dataset, arm)
    return page.shown(found, len(found), digits, 0)


def between(part: page.Part, dataset: str, arm: str, other: str) -> list[float]:
    """How far one arm's loss is above another's, of each seed that both have."""
    mine, theirs = part.runs[dataset, arm], part.runs[dataset, other]
    return [page.loss(mine[seed]) - page.loss(theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]


def gap(part: page.Part, dataset: str, arm: str, other: str) -> str:
    found = between(part, dataset, arm, other)
    return page.shown(found, len(found), 4, 0)


def number(part: page.Part, dataset: str, arm: str) -> int:
    return len(part.values(dataset, arm, page.loss))


def text_of(path: Path, start: str, end: str) -> str:
    """What a page says between two of its lines, on one line."""
    return " ".join(path.read_text(encoding="utf-8").split(start)[1].split(end)[0].split())


STUDY = text_of(page.PAGE, "# Every weight or adapters, by size of data", "<!-- tables")
METHOD = text_of(page.PAGE, "## How it was measured", "```bash")
CHOOSING = text_of(page.CHOOSING, "## Every weight or LoRA?", "## From scratch")
README = text_of(ROOT / "README.md", "## Why not LoRA?", "## What it saves")


def says(text: str, *sentences: str) -> None:
    missing = [wanted for sentence in sentences if (wanted := " ".join(sentence.split())) not in text]
    assert not missing, missing


def searched(rate: float, arm: str = ADAMW, file: str = "continued_rates.json") -> str:
    runs = page.continued.content(file)["search"]
    (found,) = [run for run in runs if run["arm"] == arm and run["learning_rate"] == rate]
    return f"{found['after']['eval_loss']:.4f}"


def test_of_continued_pretraining() -> None:
    most, eight = ([mean(TEXT, f"text_{n}m", arm) for arm in (ADAMW, FOAM, LORA_128, LORA_16, QLORA)] for n in (32, 8))
    factored = "FOAM, scale 6, embeddings factored"
    says(
        STUDY,
        f"""On 32 M tokens SmolLM2 ends at {most[0]} with AdamW on all weights (two seeds), at {most[1]} with `foam`,
        at {most[2]} with LoRA of rank 128, at {most[3]} of rank 16, at {most[4]} with QLoRA (one seed each). On 8 M
        they are at {eight[0]}, {eight[1]}, {eight[2]}, {eight[3]} and {eight[4]} (two seeds of QLoRA).""",
        f"""Rank 128 is {gap(TEXT, "text_2m", LORA_128, ADAMW)} behind AdamW on 2 M and
        {gap(TEXT, "text_8m", LORA_128, ADAMW)} on 8 M, seed by seed""",
        f"AdamW on all weights gains from a higher one, {searched(1e-3)} at 1e-3, where `foam` ends at "
        f"{searched(1e-3, factored)} (one seed each)",
    )
    says(CHOOSING, f"gains from a higher one, {searched(1e-3)}, where `foam` ends at {searched(1e-3, factored)}")
    says(
        CHOOSING,
        f"""on 32 M tokens SmolLM2 ends at {most[0]} with AdamW on all weights, at {most[1]} with `foam`, at {most[2]}
        with LoRA of rank 128""",
    )
    says(README, f"held-out loss {most[1]} with `foam`, {most[0]} with AdamW, {most[2]} with LoRA of rank 128")
    assert [number(TEXT, "text_32m", arm) for arm in (ADAMW, FOAM, LORA_128, LORA_16, QLORA)] == [2, 1, 1, 1, 1]
    for dataset in ("text_2m", "text_8m", "text_32m"):
        assert max(between(TEXT, dataset, FOAM, ADAMW)) < 0.002  # level with AdamW, or ahead
        for arm, other in ((LORA_128, ADAMW), (LORA_16, LORA_128), (QLORA, LORA_16)):
            assert min(between(TEXT, dataset, arm, other)) > 0
    grown = [page.fmean(between(TEXT, dataset, LORA_16, ADAMW)) for dataset in ("text_2m", "text_8m", "text_32m")]
    assert grown[0] < 0.5 * grown[1] < 0.4 * grown[2]  # "rank 16 by more with each size"
    ends = TEXT.values("text_8m", LORA_128, page.loss)
    assert round(max(ends) - min(ends), 2) == 0.04


def test_of_all_of_gsm8k() -> None:
    ends = [mean(SMALL, "gsm8k", arm) for arm in (ADAMW, FOAM, LORA_128, LORA_16, "LoRA 128, FOAM")]
    lowest = mean(QWEN, "gsm8k", "LoRA 128, FOAM")
    arms = [arm for arm in page.ran(QWEN) if arm != QLORA]
    answers = [page.fmean(QWEN.values("gsm8k", arm, page.match)) for arm in arms]
    span = f"{min(answers):.1f} to {max(answers):.1f}%"
    says(
        STUDY,
        f"""`foam` is {gap(QWEN, "gsm8k", LORA_128, FOAM)} ahead of LoRA of rank 128 with AdamW on Qwen, and
        {page.fmean(between(QWEN, "gsm8k", FOAM, "LoRA 128, FOAM")):.4f} behind the same LoRA with `foam`, the lowest
        of all, {lowest} (two seeds)""",
        f"The arms but QLoRA answer {span} of the questions",
        f"""SmolLM2 ends at {ends[0]} with AdamW on all weights, at {ends[1]} with `foam`, at {ends[2]} with LoRA of
        rank 128, at {ends[3]} of rank 16, and at {ends[4]} of rank 128 with `foam`.""",
    )
    of_foam, of_lora = mean(QWEN, "gsm8k", FOAM), mean(QWEN, "gsm8k", LORA_128)
    says(
        CHOOSING,
        f"ends at {of_foam} with `foam`, at {of_lora} with LoRA of rank 128, and at {lowest} if `foam` trains the "
        "adapters (two seeds)",
        f"its exact matches, {span} of 500 questions for all arms but QLoRA, cannot be told apart",
        f"SmolLM2 ends at {ends[1]}, {ends[2]} and {ends[4]}",
    )
    says(README, f"({of_foam} with `foam`, {of_lora} with LoRA of rank 128, {lowest} if `foam` trains the adapters)")
    assert page.fmean(QWEN.values("gsm8k", "LoRA 128, FOAM", page.loss)) == min(
        page.fmean(QWEN.values("gsm8k", arm, page.loss)) for arm in page.ran(QWEN)
    )
    for part in (QWEN, SMALL):
        assert all(
            min(between(part, size, QLORA, arm)) > 0 for size in GROWING for arm in page.ran(part) if arm != QLORA
        )


def test_of_few_examples() -> None:
    shares = []  # of what all weights gain from FOAM, LoRA's
    for part in (QWEN, SMALL):
        for size in ("gsm8k_16th", "gsm8k_4th"):
            for arm in (ADAMW, LORA_16, LORA_128):
                found = between(part, size, arm, FOAM)
                assert len(found) == 3 and page.fmean(found) > 5 * page.error(found)
            full, *adapters = (page.fmean(between(part, size, arm, swapped)) for arm, swapped in PAIRS)
            shares += [gain / full for gain in adapters]
    assert min(shares) > 1 / 3 and max(shares) < 0.9
    says(STUDY, "LoRA gains from `foam` a third to nine tenths of what all weights gain")
    pairs = [mean(SMALL, "alpaca", arm) for arm in (FOAM, ADAMW, "LoRA 128, FOAM")]
    says(
        STUDY,
        f"""on SmolLM2 `foam` is level with AdamW on all weights, {pairs[0]} to {pairs[1]}, and LoRA of rank 128 with
        `foam` is ahead of both, {pairs[2]};""",
    )
    qwen = [
        page.fmean(found)
        for arm in page.ran(QWEN)
        if arm != QLORA and (found := QWEN.values("alpaca", arm, page.loss))
    ]
    says(STUDY, f"on Qwen all but QLoRA end at {min(qwen):.3f} to {max(qwen):.3f}.")
    few = [mean(QWEN, "gsm8k_16th", arm) for arm in (FOAM, LORA_16, ADAMW)]
    says(CHOOSING, f"`foam` is ahead of LoRA and of AdamW, {few[0]} to {few[1]} and {few[2]} on 436")
    says(README, f"on 436 examples of it more with `foam`, {few[0]} to {few[1]} with LoRA of rank 16")


def test_of_three_passes() -> None:
    thrice = {arm: found[0] for arm in page.ran(QWEN) if (found := QWEN.values("gsm8k_x3", arm, page.loss))}
    answers = {arm: QWEN.values("gsm8k_x3", arm, page.match)[0] for arm in thrice}
    ends = [mean(QWEN, "gsm8k_x3", arm) for arm in (FOAM, ADAMW, LORA_128, QLORA)]
    says(
        STUDY,
        f"""{ends[0]} with `foam`, {ends[1]} with AdamW on all weights, {ends[2]} with LoRA of rank 128, {ends[3]} with
        QLoRA. All answer more questions than after one pass, {min(answers.values()):.1f} to
        {max(answers.values()):.1f}%.""",
    )
    says(
        CHOOSING,
        f"adapters overfit least by the held-out loss, {ends[2]} to AdamW's {ends[1]} and {ends[0]} of `foam`",
    )
    for arm, value in thrice.items():
        assert number(QWEN, "gsm8k_x3", arm) == 1 and value > page.fmean(QWEN.values("gsm8k", arm, page.loss))
        assert answers[arm] > page.fmean(QWEN.values("gsm8k", arm, page.match))
        assert "LoRA" not in arm or value < thrice[ADAMW] - 0.03 < thrice[FOAM] - 0.06


def test_of_int8_weights() -> None:
    cost = [gap(TEXT, f"text_{n}m", INT8, FOAM) for n in (2, 8, 32)]
    on_all = gap(SMALL, "gsm8k", INT8, FOAM), gap(QWEN, "gsm8k", INT8, FOAM)
    says(
        STUDY,
        f"""{cost[0]} on 2 M tokens, {cost[1]} on 8 M (two seeds), {cost[2]} on 32 M (one), where
        {mean(TEXT, "text_32m", INT8)} is still below LoRA of rank 128; on all of GSM8K {on_all[0]} on SmolLM2,
        {on_all[1]} on Qwen (one seed).""",
    )
    rounded = [f"{page.fmean(between(TEXT, f'text_{n}m', INT8, FOAM)):.3f}" for n in (2, 8, 32)]
    small = f"{page.fmean(between(SMALL, 'gsm8k', INT8, FOAM)):.3f}"
    longer = f"{small} on all of GSM8K, {rounded[0]}, {rounded[1]} and {rounded[2]} on 2, 8 and 32 M tokens of text"
    for path in (page.CHOOSING, ROOT / "README.md"):
        assert longer in " ".join(path.read_text(encoding="utf-8").split())
    assert max(between(TEXT, "text_32m", INT8, LORA_128)) < 0


def test_of_what_diverged() -> None:
    ends = [mean(TEXT, "text_8m", f"LoRA {rank}, FOAM") for rank in (16, 128)]
    (beyond,) = [run for run in json_of("text")["search"] if run["learning_rate"] == 2e-2]
    says(
        STUDY,
        f"both ranks ended above the untrained model on 8 M tokens, at {ends[0]} and {ends[1]}, one seed",
        f"diverged at the next rate tried, 2e-2, where it ended at {beyond['after']['eval_loss']:.2f} on 2 M tokens",
    )
    for arm in ("LoRA 16, FOAM", "LoRA 128, FOAM"):  # named in the picture, not drawn
        (end,) = TEXT.values("text_8m", arm, page.loss)
        assert end > TEXT.before("text_8m", "eval_loss") > TEXT.values("text_2m", arm, page.loss)[0]
        assert pictures.LOOKS[arm][-1] in pictures.diverged(TEXT, ["text_2m", "text_8m"], page.loss)
        assert [size for size, *_ in pictures.curve(TEXT, ["text_2m", "text_8m"], arm, page.loss)] == [2_000_384]


def json_of(name: str) -> dict:
    return json.loads((page.RESULTS / f"full_or_lora_{name}.json").read_text(encoding="utf-8"))


def test_of_forgetting() -> None:
    qwen, small = ([mean(part, "gsm8k", arm, page.other) for arm in (FOAM, ADAMW, LORA_16)] for part in (QWEN, SMALL))
    few = [mean(QWEN, "gsm8k_16th", arm, page.other) for arm in (FOAM, LORA_16)]
    text = [mean(TEXT, "text_32m", arm, page.other) for arm in (ADAMW, FOAM, LORA_16, INT8)]
    untrained = f"{QWEN.before('gsm8k', 'other_loss'):.4f}"
    says(
        STUDY,
        f"""After all of GSM8K the loss on Alpaca pairs is {qwen[0]} with `foam` on Qwen, {qwen[1]} with AdamW on all
        weights, {qwen[2]} with LoRA of rank 16 (untrained {untrained}).""",
        f"it is lowest with `foam`, {few[0]} to LoRA's {few[1]} on 436.",
        f"forgets more of them: {small[0]}, {small[1]} and {small[2]} after all of GSM8K.",
        f"""After 32 M tokens of text AdamW on all weights has forgotten least, {text[0]}, then `foam`, {text[1]}; LoRA
        of rank 16 is at {text[2]}, INT8 weights at {text[3]} (one seed each).""",
    )
    short = [mean(QWEN, "gsm8k", arm, page.other, 3) for arm in (LORA_16, FOAM)]
    says(CHOOSING, f"{short[0]} on Alpaca pairs to {short[1]} with `foam` (untrained {untrained})")
    for part in (QWEN, SMALL):
        after = [page.fmean(part.values("gsm8k", arm, page.other)) for arm in (LORA_16, ADAMW, FOAM, BLOCKS)]
        assert after == sorted(after)
    for size in ("gsm8k_16th", "gsm8k_4th"):
        after = [page.fmean(QWEN.values(size, arm, page.other)) for arm in (FOAM, LORA_16, ADAMW)]
        assert after == sorted(after)
    assert all(
        page.fmean(QWEN.values(size, QLORA, page.other)) > page.fmean(QWEN.values(size, FOAM, page.other))
        for size in GROWING
    )


def test_of_memory_and_speed() -> None:
    peak = {arm: f"{page.gib(run):.2f}" for arm, run in QWEN.memory.items()}
    says(
        STUDY,
        f"""LoRA of rank 16 takes {peak[LORA_16]} GiB for Qwen one example at a time, QLoRA {peak[QLORA]}; every weight
        takes {peak["FOAM, INT8"]} in INT8, {peak[FOAM]} in bf16 and {peak[ADAMW]} with AdamW in fp32. Rank 128 with
        AdamW takes {peak[LORA_128]}""",
    )
    says(
        README,
        f"""{peak[LORA_16]} GiB at rank 16 and {peak[LORA_128]} at 128, every weight {peak[FOAM]} in bf16 and
        {peak["FOAM, INT8"]} in INT8 with embeddings by blocks""",
    )
    speed = {arm: run["tokens_per_second"] for arm, run in TEXT.alone.items()}
    of_qwen = {arm: run["tokens_per_second"] for arm, run in QWEN.alone.items()}
    target = page.goal(TEXT, "text")
    took = {arm: page.seconds_to(TEXT, page.sizes(TEXT, "text"), arm, target) for arm in speed}
    says(
        STUDY,
        f"""`foam` trains all of SmolLM2's weights at {speed[FOAM]:,.0f} tokens/s, by blocks at {speed[BLOCKS]:,.0f},
        AdamW in fp32 at {speed[ADAMW]:,.0f}, INT8 weights at {speed[INT8]:,.0f}, LoRA at {speed[LORA_128]:,.0f} to
        {speed[LORA_16]:,.0f}, QLoRA at {speed[QLORA]:,.0f}. A loss of {target:.3f} takes `foam` {took[FOAM]} seconds
        and AdamW {took[ADAMW]}, on 8 M tokens. LoRA does not reach it on 8 M; on 32 M, in {took[LORA_16]} to
        {took[LORA_128]} seconds, rank 16 just does and rank 128 ends well below; QLoRA does not.""",
        f"""On Qwen `foam`, with embeddings by blocks, trains at {of_qwen[BLOCKS]:,.0f} tokens/s, AdamW at
        {of_qwen[ADAMW]:,.0f}.""",
    )
    assert took[QLORA] == "not reached"
    for arm in (FOAM, ADAMW):
        assert page.fmean(TEXT.values("text_8m", arm, page.loss)) <= target
        assert page.fmean(TEXT.values("text_2m", arm, page.loss)) > target


def test_of_how_embeddings_fold() -> None:
    eight, most = mean(TEXT, "text_8m", BLOCKS), mean(TEXT, "text_32m", BLOCKS)
    steps = [searched(3e-4, arm) for arm in ("FOAM, scale 6", "FOAM, scale 6, embedding_scale 1")]
    steps = [steps[0], steps[1], searched(3e-4, "FOAM, scale 6, embeddings factored")]
    whole = mean(SMALL, "gsm8k", FOAM), mean(SMALL, "gsm8k", BLOCKS)
    says(
        STUDY,
        f"it ends at {eight} on 8 M tokens (two seeds) and at {most} on 32 M, behind LoRA",
        f"""Four fifths of that is the scale: {steps[0]} by blocks at scale 6, {steps[1]} by blocks at scale 1,
        {steps[2]} factored (one seed).""",
        f"on all of it the factored rule is ahead, {whole[0]} to {whole[1]} on SmolLM2",
    )
    numbers = [float(one) for one in steps]
    assert round((numbers[0] - numbers[1]) / (numbers[0] - numbers[2]), 1) == 0.8
    for dataset in ("text_8m", "text_32m"):
        assert min(between(TEXT, dataset, BLOCKS, LORA_16)) > 0


def test_every_number_of_a_loss_is_in_a_table_or_between_two_arms() -> None:
    known = page.tables(PARTS) + page.answer(PARTS) + page.continued.tables(PARTS)
    for part, (arm, other) in itertools.product(PARTS.values(), itertools.permutations(page.ARMS, 2)):
        for dataset in part.datasets():
            if {(dataset, arm), (dataset, other)} <= part.runs.keys():
                known += f" {gap(part, dataset, arm, other)}"
    for text in (STUDY, CHOOSING, README):
        found = re.findall(r"\d+\.\d{4}(?: ± \d+\.\d+)?", text)
        assert len(found) > 5 and [one for one in found if one not in known] == []


COMMANDS = [
    line
    for path in (page.PAGE, page.continued.PAGE)
    for line in path.read_text(encoding="utf-8").splitlines()
    if "quality.instruct_gpu --study" in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_go_on_from_the_results(line: str, tmp_path: Path) -> None:
    from recipes.benchmarks.quality import instruct_gpu

    words = line.split()[3:]
    assert "--resume" in words
    place = {words[i]: i + 1 for i in range(len(words) - 1) if words[i].startswith("--")}
    plan, results = ROOT / words[place["--study"]], ROOT / words[place["--json"]]
    for name, to in (("--study", plan), ("--json", results), ("--data", tmp_path), ("--out", tmp_path / "out")):
        words[place[name]] = str(to)
    for dataset in instruct_gpu.yaml.safe_load(plan.read_text())["datasets"].values():
        (tmp_path / dataset["file"]).parent.mkdir(exist_ok=True)
        (tmp_path / dataset["file"]).touch()
    content = json.loads(results.read_text(encoding="utf-8"))
    words[place["--json"]] = shutil.copy(results, tmp_path)
    study = instruct_gpu.Study(*instruct_gpu.parse(words))
    lists = instruct_gpu.LISTS.values()
    assert len(study.kept) == sum(len(content[name]) for name in lists) and study.finished
    saved = study.report()  # what the command was not asked for stays
    assert {name: len(saved[name]) for name in lists} == {name: len(content[name]) for name in lists}
