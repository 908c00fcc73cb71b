"""The study of every weight against adapters: its plans, continued pretraining, what is forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from recipes.benchmarks.quality import continued_run, instruct_gpu, instruct_run
from tests.support.instruct_runs import ROOT, load_script, save_model, sums, write_jsonl

pytestmark = pytest.mark.long

load_script()

import instruct_arguments  # noqa: E402

QUALITY = ROOT / "recipes" / "benchmarks" / "quality"
PLANS = ("full_or_lora_qwen.yaml", "full_or_lora_smollm2.yaml", "full_or_lora_text.yaml")
QUICK = "--num_train_epochs 1 --per_device_train_batch_size 2 --eval_strategy no --save_strategy no --use_cpu true "
QUICK += "--disable_tqdm true --learning_rate 1e-3 --eval_before true"


def opened(plan: Path, data: Path, *words: str) -> instruct_gpu.Study:
    """A study of this plan, the files of its data sets stood in for."""
    for dataset in yaml.safe_load(plan.read_text())["datasets"].values():
        write_jsonl(data / dataset["file"], sums())
    where = ["--data", str(data), "--model", "model", "--out", str(data / "out")]
    return instruct_gpu.Study(*instruct_gpu.parse(["--study", str(plan), *where, *words]))


@pytest.mark.parametrize("plan", PLANS)
def test_every_setting_is_known_and_arms_differ_in_what_they_train(plan: str, tmp_path: Path) -> None:
    study = opened(QUALITY / plan, tmp_path)
    content, options = study.options.study, study.options
    translate = continued_run.translate if "runner" in content else instruct_run.translate
    jobs = [*study.waiting]
    of_another = {job.key for job in opened(QUALITY / plan, tmp_path, "--label", "another model").waiting}
    assert not of_another & {job.key for job in jobs}  # one folder of runs does not mix them up
    assert {job.part for job in jobs} == {"alone", "memory", "search"}
    searched = [name for name, given in content["datasets"].items() if "rates_of" not in given]
    assert {job.dataset for job in jobs if job.part == "search"} == set(searched)
    jobs += [job for name in content["datasets"] for job in study.finals(name, options.arms, 1e-4)]
    rules = {}
    for job in jobs:
        words, own = translate(job.words)
        recipe, args, _ = instruct_arguments.parse(words)
        assert (args.learning_rate, args.seed, own.other is not None) == (job.rate, job.seed, job.part == "final")
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert step == content["settings"]["per_device_train_batch_size"]  # whatever the micro-batches
        rank = recipe.lora_r if "lora" in recipe.method else None
        factored = "embedding_scale=1,embedding_rule=factored" in (args.optim_args or "")
        assert factored == ("factored" in job.arm)
        rules[job.arm] = (recipe.method, recipe.dtype, rank, str(args.optim.value), factored)
        if args.optim.value == "foam":  # all is spelt out
            assert "level=8,scale=6," in args.optim_args and "fold_head=true" in args.optim_args
            assert factored or args.optim_args.endswith(",embedding_scale=6")
    assert len(set(rules.values())) == len(content["arms"]) == 10


def test_the_rates_of_one_size_serve_the_others(tmp_path: Path) -> None:
    plan = {
        "settings": {"optim": "adamw_torch"},
        "search_seed": 9,
        "seeds": [1, 2],
        "by_seed": True,
        "datasets": {
            "whole": {"file": "sums.jsonl", "rates_of": "part", "settings": {}},
            "part": {"file": "sums.jsonl", "settings": {}},
            "long": {"file": "sums.jsonl", "rates_of": "part", "last": 1, "seeds": 1, "arms": ["a"], "settings": {}},
        },
        "alone": {"dataset": "part", "settings": {}},
        "arms": [
            {"name": "a", "rates": {"part": [0.1, 0.2]}, "settings": {}},
            {"name": "b", "swap": "a", "settings": {}},
        ],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    words = ["--parts", "search,final"]
    study = opened(tmp_path / "plan.yaml", tmp_path, *words)
    for job in [*study.waiting]:
        job.record = {"after": {"eval_loss": job.rate}, "seconds": 1, "learning_rate": job.rate}
        study.waiting.remove(job)
        study.finished.append(job)
    study.choose()
    first, second = ([(name, arm, 0.1, seed) for name in ("whole", "part") for arm in ("a", "b")] for seed in (1, 2))
    found = [(job.dataset, job.arm, job.rate, job.seed) for job in study.waiting]
    assert found == [*first, ("long", "a", 0.1, 1), *second]  # what is last by one waits for one seed of the others
    untrained = [job.dataset for job in study.waiting if "--eval_before" in job.words]
    assert untrained == ["part"]  # once, as the held-out examples are the same
    assert {(one["dataset"], one["learning_rate"]) for one in study.report()["chosen"]} == {
        (name, 0.1) for name in ("whole", "part", "long")
    }
    with pytest.raises(SystemExit):
        opened(tmp_path / "plan.yaml", tmp_path, *words, "--datasets", "whole")
    with pytest.raises(SystemExit):
        opened(tmp_path / "plan.yaml", tmp_path, "--parts", "memory")  # this study has none


def test_what_ran_out_of_memory_waits_behind_all_others_until_the_gpu_is_free(tmp_path: Path) -> None:
    study = opened(QUALITY / PLANS[2], tmp_path, "--parts", "search,final", "--jobs", "4")
    late = next(job for job in study.waiting if job.arm == "AdamW, fp32")
    study.waiting.remove(late)
    late.tries = 1
    study.put_off(late)
    searched = [job for job in study.waiting if job.arm == "LoRA 16, AdamW"]
    for job in searched:
        job.record = {"after": {"eval_loss": job.rate}}
        study.waiting.remove(job)
        study.finished.append(job)
    study.choose()  # runs join that come with later seeds
    assert max(job.order[1] for job in study.waiting[:-1]) == 5 and study.waiting[-1] is late
    study.waiting = [*study.waiting[:2], late, study.waiting[2]]
    started: list = []
    study.fill(started.append)
    assert len(started) == 2 and late not in started  # there is room for more, but not for all of the memory
    study.running.clear()
    study.fill(started.append)
    assert started[2:] == [late]  # and nothing beside it


def test_no_run_starts_that_the_budget_would_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = opened(QUALITY / PLANS[0], tmp_path, "--parts", "search,final", "--jobs", "9", "--budget-s", "100")
    long, short = (next(job for job in study.waiting if job.dataset == name) for name in ("gsm8k_4th", "alpaca"))
    study.waiting.remove(long)
    study.finished.append(long)
    long.run, long.record = object(), {"seconds": 60}
    monkeypatch.setattr(study, "elapsed", lambda: 50.0)
    started: list = []
    study.fill(started.append)
    assert short in started and {job.dataset for job in started} == {"alpaca"}  # which may be short
    assert {job.dataset for job in study.waiting} == {"gsm8k_4th"}
    monkeypatch.setattr(study, "elapsed", lambda: 30.0)
    study.fill(started.append)
    assert len(started) == 9


def test_continued_pretraining_and_tuning_tell_what_is_forgotten(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", sums(24))
    others = write_jsonl(tmp_path / "others.jsonl", [{"prompt": "a b", "completion": "c d"}] * 210)
    size = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    for split, count in (("train", 1000), ("held_out", 200)):
        (np.arange(count) % size).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    (tmp_path / "tokens.json").write_text(json.dumps({"dtype": "uint16"}))
    rows = continued_run.blocks(tmp_path, "train", 32, 256)
    assert len(rows) == 8 and rows[1]["input_ids"] == rows[1]["labels"]
    assert rows[1]["input_ids"] == [i % size for i in range(96, 128)]  # of 31 blocks, every fourth or so
    with pytest.raises(SystemExit, match="got 1000 tokens, 31 blocks; expected 32 or more"):
        continued_run.blocks(tmp_path, "train", 32, 1024)
    common = ["--model_name_or_path", str(tmp_path / "model"), "--other", str(others), *QUICK.split()]
    text = [
        "--dataset_path",
        str(tmp_path / "tokens.json"),
        "--tokens",
        "512",
        "--block",
        "32",
        "--eval_tokens",
        "128",
    ]
    continued = continued_run.main([*common, *text, "--output_dir", str(tmp_path / "text"), "--method", "lora"])
    assert (continued["steps"], continued["data"]["train"]["tokens"]) == (8, 512)
    assert continued["after"]["eval_loss"] < continued["before"]["eval_loss"]
    asked = ["--dataset_path", str(pairs), "--eval_samples", "4", "--max_new_tokens", "1", "--output_dir"]
    tuned = instruct_run.main([*common, *asked, str(tmp_path / "pairs")])
    # Both score the same 200 pairs, by their answers alone.
    assert tuned["before"]["other_loss"] == pytest.approx(continued["before"]["other_loss"], rel=1e-5)
    assert tuned["after"]["other_loss"] != tuned["before"]["other_loss"]
    assert json.loads((tmp_path / "text" / "results.json").read_text())["after"] == continued["after"]
    assert not [*(tmp_path / "text").glob("*.safetensors")]
