"""The study of the instruct recipe: its YAML, the launcher on a tiny model, the tables in the READMEs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import pytest
import yaml

from foam_hf import foam_param_groups
from foam_hf.optim_args import FOAM_NAMES, foam_options
from foam_hf.optimizer.groups import grouping_options
from recipes.benchmarks.common import forked
from recipes.benchmarks.quality import before, instruct_gpu, instruct_run
from tests.support.instruct_runs import RECIPE, ROOT, load_script, save_model, sums, write_jsonl
from tests.support.tiny_models import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.long

load_script()

import instruct_arguments  # noqa: E402
import instruct_table  # noqa: E402

QUALITY = ROOT / "recipes" / "benchmarks" / "quality"
STUDIES = {"instruct_study.yaml": 14, "instruct_swap.yaml": 7, "instruct_swap_qwen.yaml": 6}  # arms that are searched
MEASURED = [  # plans that ran before embedding_scale was an option
    *STUDIES,
    *(f"full_or_lora_{model}.yaml" for model in ("qwen", "smollm2", "text")),
    *("int8_study.yaml", "release_study.yaml", "release_spikes.yaml"),
]
TINY = {
    "settings": {
        "per_device_train_batch_size": 2,
        "max_length": 64,
        "eval_samples": 3,
        "train_samples": 4,
        "max_new_tokens": 2,
        "num_train_epochs": 1,
        "eval_before": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
    },
    "search_seed": 9,
    "seeds": [1, 2],
    "datasets": {"sums": {"file": "sums.jsonl", "settings": {"eval_exact_match": True}}},
    "alone": {"dataset": "sums", "settings": {"train_samples": 6}},
    "arms": [
        {
            "name": "LoRA",
            "rates": {"sums": [0.001, 0.01]},
            "last": True,
            "settings": {"method": "lora", "optim": "adamw_torch", "attn_implementation": "eager"},
        },
        {"name": "FOAM", "rates": {"sums": [0.001, -1]}, "settings": {"optim": "foam", "optim_args": "level=3"}},
        {
            "name": "swapped",
            "swap": "FOAM",
            "last": 2,
            "settings": {"optim": "foam_factored_embeddings", "optim_args": "level=3,scale=4"},
        },
    ],
}


COMMAND = ["-m", "recipes.benchmarks.quality.instruct_gpu"]
# The same main() twice in one process, which imports once; what each writes is kept.
TWICE = """
import shutil, sys
from pathlib import Path
from recipes.benchmarks.quality import instruct_gpu
words = sys.argv[1:]
cut = words.index("--then")
instruct_gpu.main(words[:cut])
shutil.copy("runs/results.json", "runs/results-before.json")
print("THEN", flush=True)
instruct_gpu.main([*words[:words.index("--parts")], *words[cut + 1:]])
"""


def study(tmp_path: Path, *words: str, command: list[str] = COMMAND) -> tuple[str, dict]:
    """What instruct_gpu.py prints and writes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    places = ["--study", "tiny.yaml", "--data", ".", "--model", "model", "--label", "tiny", "--out", "runs"]
    done = subprocess.run(
        [sys.executable, *command, *places, "--jobs", "2", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "runs" / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    folder = tmp_path_factory.mktemp("study")
    save_model(folder / "model")
    write_jsonl(folder / "sums.jsonl", sums())
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder, *study(folder)


def test_a_study_goes_on_from_its_json_alone(finished, tmp_path: Path) -> None:
    folder, _, content = finished
    where = ["--study", str(folder / "tiny.yaml"), "--data", str(folder), "--model", "m", "--out", str(tmp_path)]
    (tmp_path / "results.json").write_text(json.dumps(content))
    where += ["--label", "tiny", "--resume"]
    (tmp_path / "runs.jsonl").write_text('{"key": "[]", "rec')  # killed as it was writing
    again = instruct_gpu.Study(*instruct_gpu.parse(where))
    assert [(job.part, job.arm, job.rate) for job in again.waiting] == [
        ("alone", "FOAM", -1),
        ("alone", "swapped", -1),
        ("search", "FOAM", -1),
    ]
    of_lora = [run for run in content["runs"] if run["arm"] == "LoRA"]  # FOAM's seeds wait for its search
    assert len(again.finished) == len(content["alone"]) + len(content["search"]) + len(of_lora)
    assert (tmp_path / "runs.jsonl").read_text() == ""  # the next line stands alone
    with pytest.raises(SystemExit, match="of another study or other settings; expected the same ones"):
        instruct_gpu.Study(*instruct_gpu.parse([*where, "--max_length", "32"]))
    with pytest.raises(SystemExit, match="results.json is of tiny, got other; expected another --json"):
        instruct_gpu.Study(*instruct_gpu.parse([*where, "--label", "other"]))
    # What a command is not asked for stays.
    part = instruct_gpu.Study(*instruct_gpu.parse([*where, "--arms", "1", "--parts", "search,final"]))
    assert [job.arm for job in part.finished] == ["LoRA"] * 4
    saved = part.report()
    for name in ("alone", "search", "runs", "chosen", "failed"):
        assert sorted(map(str, saved[name])) == sorted(map(str, content[name])), name
    # An arm may join; one that has changed makes it another study.
    joined = {"name": "more", "rates": {"sums": [0.02, 0.01]}, "settings": {"optim": "adamw_torch"}}
    where[1] = str(tmp_path / "study.yaml")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**TINY, "arms": [*TINY["arms"], joined]}))
    more = instruct_gpu.Study(*instruct_gpu.parse(where))
    assert len(more.finished) == len(again.finished) and sum(job.arm == "more" for job in more.waiting) == 3
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({**TINY, "arms": [{**TINY["arms"][0], "settings": {}}, joined]})
    )
    with pytest.raises(SystemExit, match="of another study"):
        instruct_gpu.Study(*instruct_gpu.parse(where))
    # One that has no run yet may change, or leave.
    planned = {**content, "study": {**TINY, "arms": [*TINY["arms"], {**joined, "settings": {"optim": "foam"}}]}}
    (tmp_path / "results.json").write_text(json.dumps(planned))
    for arms in (TINY["arms"], [*TINY["arms"], joined]):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({**TINY, "arms": arms}))
        found = instruct_gpu.Study(*instruct_gpu.parse(where))
        assert len(found.finished) == len(again.finished)


def test_a_study_searches_then_runs_its_seeds_and_says_what_failed(finished) -> None:
    folder, said, content = finished
    assert "runs are forks" in said
    assert said.index("Rehearsed") < said.index("alone sums")
    assert {run["arm"] for run in content["alone"]} == {"LoRA"}  # FOAM's second rate, -1, is none
    assert [(run["arm"], run["learning_rate"], run["seed"]) for run in content["search"]] == [
        ("FOAM", 0.001, 9),
        ("LoRA", 0.001, 9),
        ("LoRA", 0.01, 9),
    ]
    failed = [(run["part"], run["arm"], run["rate"]) for run in content["failed"]]
    assert failed == [("alone", "FOAM", -1), ("alone", "swapped", -1), ("search", "FOAM", -1)]
    assert "-1" in content["failed"][0]["log"] and content["unfinished"] == 0
    best = min(content["search"][1:], key=lambda run: run["after"]["eval_loss"])
    chosen = {entry["arm"]: entry["learning_rate"] for entry in content["chosen"]}
    assert chosen == {"FOAM": 0.001, "swapped": 0.001, "LoRA": best["learning_rate"]}
    runs = {(run["arm"], run["seed"]): run for run in content["runs"]}
    assert list(runs) == [(arm, seed) for arm in ("FOAM", "LoRA", "swapped") for seed in (1, 2)]  # as `last` says
    rates = [run["learning_rate"] for run in content["runs"]]
    assert rates == [0.001, 0.001, *[best["learning_rate"]] * 2, 0.001, 0.001]
    assert [run["before"] is not None for run in content["runs"]] == [name == ("LoRA", 1) for name in runs]
    of_swapped = runs["swapped", 1]  # an optimizer of the study's own, all folded
    assert of_swapped["optim"] == "foam_factored_embeddings" and of_swapped["steps"] == runs["FOAM", 1]["steps"]
    assert of_swapped["optimizer_state_bytes"] < runs["FOAM", 1]["optimizer_state_bytes"]
    assert {(run["arm"], run["attention"]) for run in content["runs"]} == {
        ("FOAM", "sdpa"),
        ("LoRA", "eager"),
        ("swapped", "sdpa"),
    }
    assert runs["LoRA", 1]["after"]["count"] == 3
    assert content["alone"][0]["tokens_per_second"] > 0 and "tokens_per_second" not in runs["FOAM", 1]
    text = json.dumps(content)
    assert 'samples": [' not in text and str(folder) not in text and "Add 1" not in text
    files = [path.relative_to(folder / "runs") for path in (folder / "runs").rglob("*") if path.is_file()]
    left = [path.name for path in files if path.parts[0] != "prepared"]
    assert set(left) == {"log.txt", "results.json", "runs.jsonl"}


def test_a_study_goes_on_where_it_was_cut_off(finished) -> None:
    folder, _, before = finished
    lines = (folder / "runs" / "runs.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"final' not in json.loads(line)["key"][:10]]
    (folder / "runs" / "runs.jsonl").write_text("\n".join(kept[:-1]) + "\n")  # one search run and all final ones lost
    first, then = ["--parts", "search", "--budget-s", "0"], ["--parts", "search,final", "--arms", "1"]
    said, content = study(folder, *first, "--then", *then, command=["-c", TWICE])
    cut = json.loads((folder / "runs" / "results-before.json").read_text())
    assert len(cut["search"]) == 2 and cut["unfinished"] > 0 and not cut["runs"]
    said = said.split("THEN\n")[1]
    assert "Rehearsed" not in said and said.count("search sums") == 1 and said.count("final sums") == 2
    losses = [run["after"]["eval_loss"] for run in before["search"] if run["arm"] == "LoRA"]
    assert [run["after"]["eval_loss"] for run in content["search"]] == losses


def test_a_run_that_fails_does_not_take_the_results_of_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit('no results')")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")  # the study was killed before it read them
    run = forked.Run(None, [], tmp_path / "run" / forked.LOG, 1, 1.0, tmp_path / "fails.py")
    assert run.process.wait(60) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [forked.LOG]


@pytest.mark.parametrize("study", STUDIES)
def test_every_setting_of_a_study_is_one_that_the_recipe_knows(study: str, tmp_path: Path) -> None:
    content = yaml.safe_load((QUALITY / study).read_text())
    for dataset in content["datasets"].values():
        write_jsonl(tmp_path / dataset["file"], sums())
    where = ["--data", str(tmp_path), "--model", "model", "--out", str(tmp_path / "out")]
    options, rest = instruct_gpu.parse(["--study", str(QUALITY / study), *where])
    jobs = instruct_gpu.Study(options, rest).waiting
    searched = [arm for arm in content["arms"] if "rates" in arm]
    assert len(searched) == STUDIES[study]
    assert len(jobs) == len(content["arms"]) + sum(len(rates) for arm in searched for rates in arm["rates"].values())
    jobs += [instruct_gpu.Job(options, rest, "final", "gsm8k", arm, 1e-4, 1) for arm in options.arms]
    for job in jobs:
        words, own = instruct_run.translate(job.words)
        recipe, args, _ = instruct_arguments.parse(words)
        arm = next(arm for arm in content["arms"] if arm["name"] == job.arm)
        assert (recipe.method, own.optim or str(args.optim.value), args.learning_rate, args.seed) == (
            arm["settings"]["method"],
            arm["settings"]["optim"],
            job.rate,
            job.seed,
        )
        assert args.adam_beta1 == arm["settings"].get("adam_beta1", 0.9)
        asked = before.as_before(arm["settings"])  # the first studies mean version 0.1.0's FOAM
        assert (own.optim_args if own.optim else args.optim_args) == asked.get("optim_args")
        assert recipe.dtype == arm["settings"]["dtype"]
        matched = study == "instruct_study.yaml" and job.part == "final" and job.dataset == "gsm8k"
        assert recipe.eval_exact_match == matched
        assert recipe.eval_before == (job.part == "final" and job.arm == options.arms[0]["name"])


BLOCKS = {"embedding_rule": "block"}


@pytest.mark.parametrize(
    ("optim", "given", "meant"),
    [
        ("foam", "level=8", "level=8,scale=0.25,fold_embeddings=false,fold_head=false"),
        ("foam", "scale=6,fold_embeddings=true,fold_head=true", {**BLOCKS, "embedding_scale": "6"}),
        ("foam", "scale=6,fold_embeddings=false,fold_head=True", {**BLOCKS, "embedding_scale": "6"}),
        (
            "foam",
            "fold_embeddings=true",
            "fold_embeddings=true,scale=0.25,fold_head=false,embedding_rule=block,embedding_scale=0.25",
        ),
        ("foam_mini", "scale=4,fold_embeddings=true,fold_head=true", {**BLOCKS, "embedding_scale": "4"}),
        ("foam", "scale=6,fold_embeddings=false,fold_head=false", {}),
        ("foam", "scale=1,second_moment=factored,fold_embeddings=true,fold_head=true", {}),
        ("foam_muon", "scale=1,fold_embeddings=true,fold_head=true", {}),
        ("foam_adam_mini", "scale=2,fold_embeddings=true,fold_head=true", {}),
        ("foam", "scale=6,embedding_scale=1,fold_embeddings=true,fold_head=true", BLOCKS),
        ("foam", "scale=6,embedding_scale=1,embedding_rule=factored,fold_embeddings=true,fold_head=true", {}),
        ("foam_factored_embeddings", "level=8", {}),
        ("galore_adamw", "rank=8", {}),
    ],
)
def test_an_arm_means_what_it_did_when_it_ran(optim: str, given: str, meant: str | dict) -> None:
    expected = meant if isinstance(meant, str) else ",".join([given.lower(), *(f"{k}={v}" for k, v in meant.items())])
    found = before.as_before({"optim": optim, "optim_args": given, "method": "full"})
    assert found == {"optim": optim, "optim_args": expected, "method": "full"}
    if optim in FOAM_NAMES:
        foam_options(optim, expected)  # raises for a key that the rule does not read


@pytest.mark.parametrize("plan", MEASURED)
def test_arms_that_ran_before_embedding_scale_fold_all_matrices_at_one_scale(plan: str) -> None:
    model, folding = tiny_llama(), 0
    for arm in yaml.safe_load((QUALITY / plan).read_text())["arms"]:
        settings = before.as_before(arm["settings"])
        if settings["optim"] not in FOAM_NAMES or "embedding_rule=factored" in settings["optim_args"]:
            continue
        options = foam_options(settings["optim"], settings["optim_args"])
        scale, groups = options["scale"], foam_param_groups(model, **grouping_options(options))
        folded = [group for group in groups if group.get("level") != 0]
        found = {(group.get("second_moment", "block"), group.get("scale", scale)) for group in folded}
        assert found == {(options.get("second_moment", "block"), scale)}
        folding += any(model.model.embed_tokens.weight is p for group in folded for p in group["params"])
    assert folding or plan == "instruct_study.yaml"


def test_positions_have_the_scale_of_an_arm_whose_embeddings_are_factored() -> None:
    model = tiny_gpt2()
    args = SimpleNamespace(
        weight_decay=0.0, learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8, seed=1
    )
    optimizer = instruct_run.factored_embeddings(SimpleNamespace(args=args, model=model), "level=3,scale=4")
    found = {
        id(p): (group["second_moment"], group["scale"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert found[id(model.transformer.wte.weight)] == ("factored", 1.0)
    assert (
        found[id(model.transformer.wpe.weight)] == found[id(model.transformer.h[0].mlp.c_fc.weight)] == ("block", 4.0)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("scale=6,embedding_scale=1", "got embedding_scale=1 without fold_embeddings, fold_head, which"),
        ("scale=6,embedding_scale=1,fold_embeddings=true", "got embedding_scale=1 without fold_head, which"),
        ("embedding_scale=1,fold_embeddings=true,fold_head=true", "got embedding_scale=1 without scale, which"),
        (
            "scale=6,embedding_rule=factored,fold_embeddings=true,fold_head=true",
            "got embedding_rule=factored without embedding_scale, which",
        ),
        ("level", "is not of the form key=value"),
    ],
)
def test_a_new_arm_that_leaves_its_embeddings_to_an_earlier_version_is_an_error(
    given: str, message: str, tmp_path: Path, capsys
) -> None:
    arm = {"name": "new", "rates": {"sums": [0.001, 0.01]}, "settings": {"optim": "foam", "optim_args": given}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "arms": [*TINY["arms"], arm]}))
    write_jsonl(tmp_path / "sums.jsonl", sums())
    where = ["--study", str(tmp_path / "tiny.yaml"), "--data", str(tmp_path), "--model", "m", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        instruct_gpu.parse(where)
    said = capsys.readouterr().err
    assert "the arm 'new': optim_args: " in said and message in said
    assert instruct_gpu.parse([*where, "--arms", "1,2,3"])


def test_an_arm_that_takes_the_rates_of_one_left_out_is_an_error(tmp_path: Path, capsys) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    write_jsonl(tmp_path / "sums.jsonl", sums())
    where = ["--study", str(tmp_path / "tiny.yaml"), "--data", str(tmp_path), "--model", "m", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        instruct_gpu.parse([*where, "--arms", "1,3"])
    assert "'swapped' takes the rates of 'FOAM'; expected that one too" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        instruct_gpu.parse([*where, "--jobs", "60", "--memory", "0.5"])
    assert "--memory: got 0.5" in capsys.readouterr().err


def test_gefen_gets_names_rates_and_decay_from_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    from tests.support.tiny_models import tiny_llama

    built: dict = {}
    fake = ModuleType("gefen")
    fake.Gefen = lambda groups, **options: built.update(groups=groups, **options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gefen", fake)
    args = TrainingArguments(str(tmp_path), learning_rate=3e-4, weight_decay=0.1, use_cpu=True, report_to="none")
    model = tiny_llama()
    instruct_run.gefen_x(Trainer(model, args), "deterministic=true")
    assert (built["lr"], built["fused"], built["deterministic"]) == (3e-4, False, True)
    decaying, others = built["groups"]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in name and isinstance(p, torch.Tensor) for name, p in others["params"])
    named = dict(decaying["params"] + others["params"])
    assert named.keys() == dict(model.named_parameters()).keys()


def test_what_many_runs_prepare_is_made_once_and_is_the_same(tmp_path: Path) -> None:
    made = []

    def lengths(rows, *_):
        made.append(len(rows))
        return {"longest": len(rows), "too_long": 0}

    counting = instruct_run.counting(tmp_path / "prepared", lengths)
    tokenizer = SimpleNamespace(name_or_path="model", chat_template="{{ messages }}")
    rows = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    answers = [counting(rows, tokenizer, 8, {}), counting(rows, tokenizer, 8, {}), counting(rows, tokenizer, 9, {})]
    answers.append(counting(rows.select([0]), tokenizer, 8, {}))
    assert made == [2, 2, 1] and [answer["longest"] for answer in answers] == [2, 2, 2, 1]


def test_tables_have_means_standard_errors_and_rates(finished, tmp_path: Path) -> None:
    _, _, content = finished
    content = json.loads(json.dumps(content))
    losses, matches = (1.0, 2.0, 0.5, None, 0.5, 1.25), (0.25, 0.75, 0.5, 0.5, 0.5, 0.5)
    for run, loss, match in zip(content["runs"], losses, matches, strict=True):
        run["after"] |= {"eval_loss": loss, "exact_match": match}
    content["alone"][0]["peak_bytes"] = {
        "total": 5e9, "weights": 1e9, "gradients": 1e9, "optimizer_state": 2e9, "rest": 1e9
    }  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{instruct_table.START}\nold\n{instruct_table.END}\nafter\n")
    instruct_table.main([str(tmp_path / "r.json"), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| FOAM | 0.001, the highest tried | 1.5000 ± 0.5000 | 50.0 ± 25.0 | 2 |" in text
    assert "| LoRA | " in text and "| diverged | 50.0 ± 0.0 | 2 |" in text
    assert "| swapped | 0.001, not tuned | 0.8750 ± 0.3750 | 50.0 ± 0.0 | 2 |" in text
    assert "| untrained |  | " in text
    assert re.search(r"\| LoRA \| [\d,]+ \| 5.00 \| 1.00 \| 1.00 \| 2.00 \| 1.00 \|", text)
    instruct_table.main([str(tmp_path / "r.json"), "--arms", "2", "--readme", str(readme)])
    assert "LoRA" not in readme.read_text()
    other = {**content, "model": "other", "runs": content["runs"][:1] + content["runs"][2:5]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    instruct_table.main([str(tmp_path / "r.json"), str(tmp_path / "other.json"), "--swap", "--readme", str(readme)])
    text = readme.read_text()
    assert "|  | tiny, sums | other, sums | state over AdamW's, tiny and other |" in text
    two = r"0.8750 ± 0.3750 \(-0.6250 ± 0.1250\)"
    swapped = rf"\| swapped \| {two} \| 0.5000 \(-0.5000\), 1 of 2 seeds \| [\d.]+%, [\d.]+% \|"
    assert re.search(swapped, text)
    assert re.search(r"\| LoRA \| diverged \| diverged \| 10\d\.\d+%, 10\d\.\d+% \|", text)  # its step counters too
    assert "FOAM on tiny, sums: 0.001, the highest tried" in text


@pytest.mark.parametrize("recipe", ["instruct", "quantized"])
def test_tables_in_the_readmes_are_those_of_the_results(recipe: str, tmp_path: Path) -> None:
    commands = re.findall(
        r"^python (recipes/instruct/instruct_table\.py .*)$", (RECIPE / "README.md").read_text(), re.M
    )
    (words,) = [shlex.split(line) for line in commands if f"recipes/{recipe}/README.md" in line]
    results = sorted((RECIPE / "results").glob("*.json"))
    arms = words[words.index("--arms") : words.index("--arms") + 2] if "--arms" in words else []
    readme = ROOT / "recipes" / recipe / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text())
    instruct_table.main([*map(str, results), *arms, "--readme", str(copy)])
    assert copy.read_text() == readme.read_text()


def test_the_swap_table_is_that_of_the_results(tmp_path: Path) -> None:
    page = QUALITY / "instruct_swap.md"
    (words,) = [shlex.split(line) for line in re.findall(r"^python (\S+table\.py .*)$", page.read_text(), re.M)]
    results = [str(ROOT / word) for word in words if word.endswith(".json") and (ROOT / word).is_file()]
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    instruct_table.main(["--swap", *results, "--readme", str(copy)])
    assert copy.read_text() == page.read_text()
    for line in re.findall(r"^python -m (\S+gpu .*)$", page.read_text(), re.M):
        given = shlex.split(line)
        assert given[given.index("--json") + 1] in words and given[given.index("--study") + 1].endswith(tuple(STUDIES))
