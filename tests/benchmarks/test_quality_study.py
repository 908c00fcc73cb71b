"""The quality study: its plans, its queue, its statistics, the candidate rules, the similarity of updates."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

import foam_hf
from foam_hf.recipe_kit import put_between
from recipes.benchmarks.quality import plan as quality_plan
from recipes.benchmarks.quality import rates as quality_rates
from recipes.benchmarks.quality import run as quality_run
from recipes.benchmarks.quality import study as quality
from recipes.benchmarks.quality import table as quality_table
from recipes.benchmarks.quality import update_similarity
from recipes.benchmarks.quality.before import BEFORE
from recipes.benchmarks.quality.candidates import Candidate
from tests.support.tiny_models import tiny_llama
from tests.support.tolerances import assert_within

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "recipes" / "benchmarks"
QUALITY = BENCHMARKS / "quality"
sys.path.insert(0, str(ROOT / "recipes" / "glue"))

import arguments  # noqa: E402

PLANS = sorted(QUALITY.glob("quality_*.yaml"))
STEPS = {"max_steps": 3, "hidden_size": 16, "intermediate_size": 32, "sequence": 16, "batch": 2, "eval_sequences": 8}
TINY = {
    "model": "tiny",
    "base": "AdamW",
    "settings": STEPS,
    "tuning_seeds": [9],
    "seeds": [1, 2],
    "tasks": {"pydoc": {"runner": "pydoc", "better": "lower"}},
    "arms": [
        {"name": "AdamW", "optim": "adamw_torch", "rates": [0.001, 0.01]},
        {"name": "residual x {residual_scale}", "optim": "candidate", "rates": [0.01, 0.1],
         "optim_args": {"level": 2}, "grid": {"residual_scale": [0.5]}},
        {"name": "FOAM at {times} x", "optim": "foam", "grid": {"times": [4]}},
    ],
}  # fmt: skip


def dumped(plan: dict) -> str:
    return yaml.safe_dump(plan, sort_keys=False)


# ---- plans ----


def test_a_grid_becomes_arms_and_defaults_are_filled_in() -> None:
    plan = copy.deepcopy(TINY)
    plan["tasks"]["cola"] = None
    plan["arms"][1] |= {"grid": {"level": [1, "row"], "settings.adam_beta2": [0.9]}, "tasks": ["cola"]}
    plan["arms"][1]["name"] = "level {level}, beta {adam_beta2}"
    found = quality_plan.expand(plan)
    assert [arm["name"] for arm in found["arms"]] == [
        "AdamW",
        "level 1, beta 0.9",
        "level row, beta 0.9",
        "FOAM at 4 x",
    ]
    one, two = found["arms"][1:3]
    assert (one["optim_args"], two["optim_args"]) == ({"level": 1}, {"level": "row"})
    assert one["settings"] == {"adam_beta2": 0.9} and one["rates"] == {"cola": [0.01, 0.1]}
    assert found["tasks"]["cola"] == {"runner": "glue", "better": "higher", "settings": {}, "tuning": {}}
    assert found["arms"][3]["times"] == 4 and found["arms"][3]["tasks"] == ["pydoc", "cola"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [9, 1]}, "seed 9 is both"),
        ({"tuning_seeds": []}, "tuning_seeds"),
        ({"bases": "x"}, "unknown key 'bases'"),
        ({"base": "adamw"}, "base is 'adamw'"),
        ({"base": "FOAM at 4 x"}, "learning rates of its own"),
        ({"tasks": {"cola": {"runner": "gleu"}}}, "'gleu'"),
        ({"arms": [*TINY["arms"], {"name": "z", "optim": "foam", "rates": [1]}]}, "has 1 learning rates"),
        ({"arms": [*TINY["arms"], TINY["arms"][0]]}, "two arms are called 'AdamW'"),
        ({"arms": [*TINY["arms"], {"name": "z", "optim": "foam"}]}, "either rates or times"),
        ({"arms": [*TINY["arms"], {"name": "z", "optim": "foam", "rate": 1}]}, "unknown key 'rate'"),
        (
            {
                "arms": [
                    *TINY["arms"],
                    {"name": "z", "optim": "foam", "times": 1, "optim_args": {"embedding_scale": 1.0}},
                ]
            },
            "arm 'z': optim_args: got embedding_scale=1.0 without scale, fold_embeddings, fold_head, which",
        ),
    ],
)
def test_a_plan_that_cannot_be_right_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(dumped({**TINY, **change}))
    with pytest.raises(SystemExit, match=message):
        quality_plan.read_plan(path)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_committed_plan_holds_what_the_recipes_know(path: Path, tmp_path: Path) -> None:
    options = quality.parse(["--plan", str(path), "--runs", "r", "--data", "d", "--model", "m"])
    plan = options.plan
    assert not set(plan["tuning_seeds"]) & set(plan["seeds"])
    for arm in plan["arms"]:
        for task in arm["tasks"]:
            job = quality.Job(options, "result", task, arm, 1e-4, plan["seeds"][0])
            if arm["optim"] == "candidate":
                parameter = torch.nn.Parameter(torch.zeros(2, 2))
                Candidate([parameter], **{"total_steps": 9, **arm["optim_args"]})
            if job.request["runner"] == "pydoc":
                assert job.request["settings"].keys() <= quality_run.tiny_language.DEFAULTS.keys()
                continue
            recipe, training, *_ = arguments.parse(quality_run.words_of({**job.request, "folder": str(tmp_path)}))
            assert recipe.task_name == [task]
            training.pop("bf16", None)  # torch refuses it where there is no GPU
            args = arguments.build_training_arguments({**training, "use_cpu": True}, tmp_path, 1)
            if arm["optim"] == "foam":
                before = {name: value for name, value in BEFORE.items() if name not in arm["optim_args"]}
                assert args.optim_args == ",".join(
                    f"{name}={str(value).lower() if isinstance(value, bool) else value}"
                    for name, value in (arm["optim_args"] | before).items()
                )


def test_a_plan_that_takes_the_arms_of_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("[]")
    (tmp_path / "plan.yaml").write_text(dumped({**TINY, "arms": "empty.yaml"}))
    with pytest.raises(SystemExit, match="plan.yaml: arms names empty.yaml, which has none; expected a plan"):
        quality_plan.read_plan(tmp_path / "plan.yaml")


# ---- statistics, by hand ----


def test_a_paired_difference_leaves_out_what_seeds_do_to_both() -> None:
    base = {1: 0.50, 2: 0.60, 3: 0.40, 4: 0.90}
    arm = {1: 0.51, 2: 0.63, 3: 0.42, 5: 0.10}
    # differences 0.01, 0.03, 0.02: mean 0.02, standard deviation 0.01, error 0.01 / sqrt(3)
    count, mean, error = quality_table.paired(arm, base)
    assert (count, mean, error) == (3, pytest.approx(0.02), pytest.approx(0.01 / 3**0.5))
    assert quality_table.paired(arm, {7: 1.0}) is None
    assert quality_table.mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))  # deviation sqrt(2), of two
    assert quality_table.mean_and_error([1.0]) == (1.0, None)


def runs_of(scores: dict[float, dict[int, float | None]]) -> list[dict]:
    return [
        {"rate": rate, "seed": seed, "score": score} for rate, found in scores.items() for seed, score in found.items()
    ]


def test_the_best_rate_is_that_of_the_best_mean_over_shared_seeds() -> None:
    best = quality_table.best_rate
    assert best(runs_of({1e-4: {1: 0.5, 2: 0.7}, 2e-4: {1: 0.9, 2: 0.2}}), "higher") == 1e-4
    assert best(runs_of({1e-4: {1: 0.5, 2: 0.7}, 2e-4: {1: 0.9, 2: 0.2}}), "lower") == 2e-4
    assert best(runs_of({1e-4: {1: 0.5}, 2e-4: {1: 0.4, 2: 0.9}}), "higher") == 1e-4  # seed 2 is of one rate only
    assert best(runs_of({1e-4: {1: 0.5}, 2e-4: {1: None}}), "lower") == 1e-4  # diverged
    assert best(runs_of({2e-4: {1: 0.5}, 1e-4: {1: 0.5}}), "higher") == 1e-4
    assert best(runs_of({1e-4: {1: None}}), "higher") is None and best([], "higher") is None


def test_tuning_runs_have_a_table_of_their_own() -> None:
    plan = {"tasks": {"cola": {"better": "higher"}}, "arms": [{"name": "A"}, {"name": "B"}]}
    scores = {("A", 0.1): [0.5, 0.7], ("A", 0.2): [0.9, None], ("B", 0.1): [0.25]}
    runs = [
        {"part": "tuning", "task": "cola", "arm": arm, "rate": rate, "score": score}
        for (arm, rate), found in scores.items()
        for score in found
    ]
    said = quality_table.tuning_markdown(plan, [*runs, {**runs[0], "part": "result", "rate": 9}])
    assert said.splitlines()[-2:] == ["| A | 60.00 | 0.1: 60.00, 0.2: diverged |", "| B | 25.00 | 0.1: 25.00 |"]


def test_the_average_over_tasks_is_paired_by_seed() -> None:
    plan = quality_plan.expand({
        **TINY, "settings": {}, "tasks": {"cola": {}, "mrpc": {}}, "seeds": [1, 2, 3],
        "arms": [{"name": name, "optim": "foam", "rates": [1.0, 2.0]} for name in ("AdamW", "F")],
    })  # fmt: skip
    table = {
        ("AdamW", "cola"): {1: 0.4, 2: 0.5, 3: 0.3},
        ("AdamW", "mrpc"): {1: 0.8, 2: 0.7, 3: 0.9},
        ("F", "cola"): {1: 0.5, 2: 0.5, 3: 0.9},
        ("F", "mrpc"): {1: 0.7, 2: 0.9},
    }
    runs = [
        {"part": "result", "task": task, "arm": arm, "seed": seed, "rate": 2.0, "score": score, "state_bytes": 5,
         "adamw_state_bytes": 50, "folded_state_share": 0.005}
        for (arm, task), found in table.items() for seed, score in found.items()
    ]  # fmt: skip
    assert quality_table.averages(plan, runs) == {
        "AdamW": {seed: pytest.approx(0.6) for seed in (1, 2, 3)},
        "F": {1: pytest.approx(0.6), 2: pytest.approx(0.7)},
    }
    runs += [
        {"part": "tuning", "task": "cola", "arm": "F", "seed": 9, "rate": rate, "score": rate} for rate in (1.0, 2.0)
    ]
    # At a rate that was chosen before 2 was tried.
    runs.append({**runs[6], "task": "cola", "seed": 4, "rate": 1.0, "score": 0.0})
    said = quality_table.markdown(plan, runs)
    # F - AdamW: 0.0 and 0.1 -> 5.00 ± 5.00 points
    assert "| F | 2 | 65.00 ± 5.00 | +5.00 ± 5.00 | 10.0% | 0.50% |" in said
    assert "| AdamW | 3 | 60.00 ± 0.00 |  | 10.0% | 0.50% |" in said
    assert "| F | 2, the highest tried | 3 |" in said


def test_runs_of_several_plans_are_pooled_by_what_they_ran_not_by_its_name() -> None:
    def plan(*arms: tuple[str, float], tasks: tuple[str, ...] = ("cola", "mrpc"), beta: float = 0.9) -> dict:
        return quality_plan.expand({
            **TINY, "settings": {"adam_beta1": beta}, "tasks": dict.fromkeys(tasks), "base": "AdamW",
            "arms": [{"name": "AdamW", "optim": "adamw", "rates": [1.0, 2.0]},
                     *({"name": name, "optim": "foam", "optim_args": {"scale": scale}, "rates": [1.0, 2.0]}
                       for name, scale in arms)],
        })  # fmt: skip

    def runs(task: str, arm: str, rate: float, *scores: float | None, start: int = 0) -> list[dict]:
        return [
            {"part": ("result", "tuning")[i % 2], "task": task, "arm": arm, "rate": rate, "seed": i, "score": score}
            for i, score in enumerate(scores, start)
        ]

    one, two = plan(("F", 1), ("only here", 0.5)), plan(("scale 1", 1), tasks=("mrpc",))
    first = runs("cola", "AdamW", 1.0, *[0.5, 0.7] * 5) + runs("cola", "AdamW", 2.0, 0.9)  # one run is never the best
    first += runs("cola", "F", 1.0, *[0.4, 0.8, None] * 5) + runs("cola", "only here", 1.0, 0.9)
    first += runs("mrpc", "AdamW", 1.0, *[0.8] * 10) + runs("mrpc", "F", 1.0, *[0.7] * 6)
    second = runs("mrpc", "AdamW", 2.0, *[0.9] * 10) + runs("mrpc", "scale 1", 1.0, *[0.8] * 6, start=6)
    said = quality_rates.markdown([(one, first), (two, second)]).splitlines()
    assert "| AdamW | 60.0 ± 3.3 (10) | 90.0 (1) |" in said  # 0.1 / sqrt(9), of the deviation 0.1 * sqrt(10 / 9)
    assert "| F | 60.0 ± 6.7 (10) |  |" in said and "only here" not in "".join(said)
    assert "| F | 75.0 ± 1.5 (12) |  |" in said  # the other plan's "scale 1"
    # 0.5 * (0.60 + 0.75) - 0.5 * (0.60 + 0.90)
    assert said[-1] == "| F | 22 | 67.5 ± 3.4 | -7.5 ± 3.8 |"
    twice = quality_rates.markdown([(one, first), (two, second), (two, second)])
    assert twice.splitlines() == said  # a seed counts once
    other = [(one, first), (plan(("scale 1", 1), tasks=("mrpc",), beta=0.5), second)]
    assert "scale 1" not in quality_rates.markdown(other) and "75.0" not in quality_rates.markdown(other)


# ---- the launcher ----


def launch(folder: Path, *words: str) -> str:
    """What the launcher prints; its runs are forks of this process, which has imported all they need."""
    command = ["--plan", str(folder / "tiny.yaml"), "--runs", str(folder / "runs.jsonl"), "--threads", "1", *words]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(quality, "warm", lambda script: quality_run)
        quality.main(command)
    return said.getvalue()


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quality")
    (folder / "tiny.yaml").write_text(dumped(TINY))
    return folder, launch(folder, "--jobs", "2")


def test_a_study_tunes_then_runs_its_seeds_and_compares(finished) -> None:
    folder, said = finished
    runs = lines_of(folder)
    assert "are forks" in said and "10 runs, 0 failed, 0 not run" in said
    tuning = {(run["arm"], run["rate"]): run["score"] for run in runs if run["part"] == "tuning"}
    assert {run["seed"] for run in runs if run["part"] == "tuning"} == {9} and len(tuning) == 4
    best = {arm: min((s, r) for (a, r), s in tuning.items() if a == arm)[1] for arm in ("AdamW", "residual x 0.5")}
    results = {(run["arm"], run["seed"]): run for run in runs if run["part"] == "result"}
    assert {key: run["rate"] for key, run in results.items()} == {
        **{("AdamW", seed): best["AdamW"] for seed in (1, 2)},
        **{("residual x 0.5", seed): best["residual x 0.5"] for seed in (1, 2)},
        **{("FOAM at 4 x", seed): 4 * best["AdamW"] for seed in (1, 2)},
    }
    difference = [results["FOAM at 4 x", seed]["score"] - results["AdamW", seed]["score"] for seed in (1, 2)]
    assert f"{sum(difference) / 2:+.4f} ± {abs(difference[0] - difference[1]) / 2:.4f}" in said


def test_a_study_goes_on_where_it_was_cut_off(finished, tmp_path: Path) -> None:
    before = lines_of(finished[0])
    (tmp_path / "tiny.yaml").write_text(dumped(TINY))
    # The last run's line is cut in the middle.
    kept = [json.dumps(run) for run in before[:-1]]
    (tmp_path / "runs.jsonl").write_text("\n".join([*kept, '{"key": "cut']))
    assert "9 runs, 0 failed, 1 not run" in launch(tmp_path, "--budget-s", "0")
    said = launch(tmp_path)
    assert "10 runs, 0 failed, 0 not run" in said and said.count("result pydoc") == 1
    again = quality_table.read_runs([tmp_path / "runs.jsonl"])
    assert len(again) == 10 and again[-1]["score"] == before[-1]["score"]


def test_a_best_rate_at_an_end_is_searched_beyond_as_often_as_the_plan_says(tmp_path: Path) -> None:
    assert quality_plan.next_rate([1e-4, 2e-4, 4e-4], 4e-4) == 8e-4
    assert quality_plan.next_rate([4e-4, 2e-4, 1e-4], 1e-4) == 5e-5
    assert quality_plan.next_rate([2e-3, 6e-3, 2e-2], 2e-2) == 0.067
    assert quality_plan.next_rate([1e-4, 2e-4, 4e-4], 2e-4) is None and quality.next_rate([1e-4], 1e-4) is None
    plan = {**TINY, "widen": 2, "arms": TINY["arms"][:1]}
    (tmp_path / "plan.yaml").write_text(dumped(plan))
    words = ["--plan", str(tmp_path / "plan.yaml"), "--runs", str(tmp_path / "runs.jsonl")]
    for rates, expected in (([0.001, 0.01], 0.1), ([0.1], 1.0), ([1.0], None)):
        study = quality.Study(quality.parse(words))
        assert {job.part for job in study.waiting} == {"tuning"}
        with open(tmp_path / "runs.jsonl", "a", encoding="utf-8") as stream:
            for job in study.waiting:  # the largest rate is the best
                record = {"key": job.key, "part": job.part, "task": job.task, "arm": "AdamW", "rate": job.rate}
                stream.write(json.dumps({**record, "seed": job.seed, "score": 9.0 - job.rate}) + "\n")
        assert [job.rate for job in study.waiting] == rates
        study = quality.Study(quality.parse(words))
        if expected is not None:
            assert [(job.part, job.rate) for job in study.waiting] == [("tuning", expected)]
    assert [(job.part, job.rate, job.seed) for job in study.waiting] == [("result", 1.0, 1), ("result", 1.0, 2)]


def test_one_rate_needs_no_tuning(tmp_path: Path) -> None:
    plan = {**TINY, "arms": [{"name": "AdamW", "optim": "adamw_torch", "rates": [0.01]}]}
    (tmp_path / "plan.yaml").write_text(dumped(plan))
    words = ["--plan", str(tmp_path / "plan.yaml"), "--runs", str(tmp_path / "runs.jsonl")]
    options = quality.parse(words)
    assert quality.count(options) == {"tuning": 0, "result": 2}
    study = quality.Study(options)
    assert [(job.part, job.rate, job.seed) for job in study.waiting] == [("result", 0.01, 1), ("result", 0.01, 2)]


def test_jobs_take_turns_and_a_budget_starts_nothing_that_would_not_end(tmp_path: Path) -> None:
    plan = copy.deepcopy(TINY)
    plan["tasks"]["cola"] = {}
    (tmp_path / "plan.yaml").write_text(dumped(plan))
    runs = tmp_path / "runs.jsonl"
    words = ["--plan", str(tmp_path / "plan.yaml"), "--data", "d", "--model", "m", "--runs", str(runs)]
    study = quality.Study(quality.parse(words))
    assert [(job.task, job.arm["name"]) for job in study.waiting[:4]] == [
        ("pydoc", "AdamW"),
        ("pydoc", "residual x 0.5"),
        ("cola", "AdamW"),
        ("cola", "residual x 0.5"),
    ]
    assert [job.rate for job in study.waiting[:4]] == [0.001, 0.01, 0.001, 0.01]  # the first rate of each
    for job in study.waiting:
        runs.open("a").write(json.dumps({"key": job.key, "rate": job.rate, "seed": 9, "score": job.rate}) + "\n")
    study = quality.Study(quality.parse([*words, "--budget-s", "100"]))
    order = [(job.seed, job.task, job.arm["name"], job.rate) for job in study.waiting]
    names = ["AdamW", "residual x 0.5", "FOAM at 4 x"]
    rates = {"pydoc": [0.001, 0.01, 0.004], "cola": [0.01, 0.1, 0.04]}  # lower is better in the first
    assert order == [
        (seed, task, name, pytest.approx(rate))
        for seed in (1, 2)
        for task in ("pydoc", "cola")
        for name, rate in zip(names, rates[task], strict=True)
    ]
    done = study.waiting.pop(0)
    done.run, done.record = Namespace(), {"wall_s": 99.0}
    study.finished.append(done)
    study.started -= 2
    fits = {job.task: study.fits(job) for job in study.waiting}
    assert fits == {"pydoc": False, "cola": True}  # of cola, nothing is known yet


def test_a_run_that_differs_in_any_setting_is_another(tmp_path: Path) -> None:
    keys = set()
    for change in ({}, {"settings": {**STEPS, "max_steps": 4}}, {"model": "other"}, {"tuning_seeds": [8]}):
        (tmp_path / "plan.yaml").write_text(dumped({**TINY, **change}))
        for model in ("one/folder", "another/folder"):  # where the model lies is no setting
            words = ["--plan", str(tmp_path / "plan.yaml"), "--model", model, "--runs", str(tmp_path / "none")]
            keys.add(quality.Study(quality.parse(words)).waiting[0].key)
    assert len(keys) == 4


def test_a_glue_run_takes_candidates_adapters_and_the_product(tiny_glue, tmp_path: Path) -> None:
    model, data = tiny_glue
    settings = {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 4}
    arms = {
        "product": {"optim": "foam", "optim_args": {"level": 3, "second_moment": "factored"}, "lora": None},
        "candidate": {"optim": "candidate", "optim_args": {"level": 3, "second_moment": "factored"}, "lora": None},
        "late": {"optim": "candidate", "optim_args": {"level": 3, "residual_start": 0}, "lora": None},
        "adapters": {"optim": "adamw_torch", "optim_args": {}, "lora": {"r": 2, "target_modules": "all-linear"}},
    }
    found = {}
    for name, arm in arms.items():
        job = {"runner": "glue", "task": "cola", "model": str(model), "data": str(data), "rate": 0.01, "seed": 1}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps({**job, "settings": settings, "arm": arm, "folder": str(folder)}))
        found[name] = quality_run.main([str(folder / "job.json")])
        assert json.loads((folder / "results.json").read_text()) == found[name]
        assert not list(folder.glob("*.safetensors"))
    assert found["product"]["loss"] == pytest.approx(found["candidate"]["loss"], rel=1e-6)
    assert found["product"]["folded_state_share"] == pytest.approx(found["candidate"]["folded_state_share"], rel=0.05)
    assert 0.05 < found["product"]["folded_state_share"] < 0.2  # level 3: an eighth of one moment, rows, columns
    assert found["late"]["loss"] != found["candidate"]["loss"]
    assert found["adapters"]["folded_state_share"] is None
    assert found["adapters"]["state_bytes"] < found["adapters"]["adamw_state_bytes"] / 5


@pytest.fixture(scope="module")
def tiny_glue(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random BERT of two layers with a word-level tokenizer, and a few made-up rows as CoLA."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "one", "two", "red", "blue", "cat", "dog"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tiny")
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **size)).save_pretrained(folder)
    (folder / "cola").mkdir()
    for split in ("train", "validation"):
        rows = [{"sentence": f"{words[2 + i % 6]} {words[2 + i % 5]}", "label": i % 2} for i in range(12)]
        (folder / "cola" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, folder


# ---- candidates ----


@pytest.mark.parametrize(
    "options",
    [
        {"level": 3},
        {"level": "row", "residual_scale": 0.5},
        {"level": 2, "second_moment": "factored", "residual_scale": 0.5},
        {"level": 8, "second_moment": "factored", "betas": (0.8, 0.95)},
    ],
)
def test_a_candidate_without_switches_is_foam(options: dict) -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    groups = foam_hf.foam_param_groups
    foam = foam_hf.FOAM(groups(ours, weight_decay=0.1, embedding_rule="block"), lr=0.01, scale=0.25, **options)
    candidate = Candidate(groups(theirs, weight_decay=0.1, embedding_rule="block"), lr=0.01, **options)
    for _ in range(10):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        foam.step()
        candidate.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_within(q.detach(), p.detach(), "a candidate without switches against FOAM, 10 steps")


def trajectory(steps: int = 6, **options) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.zeros(8, 16))
    optimizer = Candidate([weight], lr=0.01, **{"level": 2, "second_moment": "factored", **options})
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weight.grad = torch.randn(8, 16, generator=generator)
        optimizer.step()
    return weight.detach()


def test_switches_meet_what_they_generalize() -> None:
    base = trajectory()
    same = [
        {"first_moment_level": 2},
        {"residual_limit": 1e9},
        {"agreement": 0},
        {"residual_start": 1, "total_steps": 6},
        {"residual_in_correction": False},
    ]
    for switches in same:
        torch.testing.assert_close(trajectory(**switches), base, msg=str(switches))
    torch.testing.assert_close(trajectory(first_moment_level="none"), trajectory(betas=(0.0, 0.999)))
    torch.testing.assert_close(trajectory(residual_limit=0), trajectory(residual_scale=0))
    half = trajectory(residual_start=0.5, total_steps=10**9)
    torch.testing.assert_close(half, trajectory(residual_scale=0.5))
    different = [{"two_way": True}, {"own_square": False}, {"residual_in_correction": True}, {"agreement": 1}]
    found = [base, *(trajectory(**switches) for switches in different)]
    assert all(not torch.allclose(a, b, rtol=1e-3) for i, a in enumerate(found) for b in found[:i])


def test_agreement_keeps_the_residual_of_steady_gradients_and_damps_noise() -> None:
    def weight_after(gradients: list[torch.Tensor]) -> float:
        optimizer, state = Candidate([torch.nn.Parameter(torch.zeros(8, 64))], level=4, agreement=1), {}
        for G in gradients:
            optimizer.advance(G, state, optimizer.param_groups[0])
        state["step"] = steps = len(gradients)
        m = state["folded_exp_avg"] / (1 - 0.9**steps)
        return float(optimizer.weight(m, gradients[-1], state, 1 - 0.999**steps))

    steady = torch.randn(8, 64)
    assert weight_after([steady] * 30) == pytest.approx(1.0)
    noise = weight_after([torch.randn(8, 64) for _ in range(200)])
    assert noise == pytest.approx((0.1 / 1.9) ** 0.5, rel=0.4)  # sqrt((1 - b1) / (1 + b1)), as Adam's own update


def test_a_candidate_refuses_what_it_does_not_know() -> None:
    matrix = [torch.nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(ValueError, match="unknown switch, got 'residual_limits'"):
        Candidate(matrix, residual_limits=1)
    with pytest.raises(ValueError, match="total_steps"):
        Candidate(matrix, residual_start=0)
    with pytest.raises(ValueError, match="expected a matrix"):
        Candidate([torch.nn.Parameter(torch.zeros(2, 2, 2))])


# ---- similarity ----


def test_similarity_is_one_at_level_0_and_falls_with_the_level() -> None:
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)

    def loss_of(step: int) -> torch.Tensor:
        batch = torch.randint(3, 64, (4, 12), generator=generator)
        return model(input_ids=batch, labels=batch).loss

    before = copy.deepcopy(model.state_dict())
    watched = update_similarity.watched_weights(model, [1])
    assert len(watched) == 7 and all(".1." in name for name in watched)
    options = Namespace(lr=1e-3, steps=6, every=3)
    named = {"AdamW": {"level": 0}, **update_similarity.variants([1, "row"], extras=False)}
    found = update_similarity.similarities(model, loss_of, watched, named, options)
    assert all(len(values) == 2 for cosines in found["cosines"].values() for values in cosines.values())
    assert all(value == 1.0 for values in found["cosines"]["AdamW"].values() for value in values)
    means = {
        name: sum(update_similarity.late(v) for v in cosines.values()) / 7
        for name, cosines in found["cosines"].items()
    }
    assert 1 > means["block, level 1"] > means["block, level row"] > means["block, level row, no residual"] > 0
    # Only AdamW moved the weights: the same training without shadows ends at the same place.
    alone = tiny_llama()
    alone.load_state_dict(before)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3, weight_decay=0.0)
    generator.manual_seed(0)
    for _ in range(6):
        batch = torch.randint(3, 64, (4, 12), generator=generator)
        alone(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p)


# ---- what is committed ----


def test_the_page_holds_what_the_committed_runs_say() -> None:
    page = (QUALITY / "README.md").read_text(encoding="utf-8")
    for path in sorted((BENCHMARKS / "results").glob("quality_*.jsonl")):
        plan = quality_plan.read_plan(QUALITY / f"{path.stem}.yaml")
        table = quality_table.markdown(plan, quality_table.read_runs([path]))
        assert put_between(page, *quality_table.marks(path.stem), table) == page, path.name
        if f"<!-- table: {path.stem} tuning -->" in page:
            table = quality_table.tuning_markdown(plan, quality_table.read_runs([path]))
            assert put_between(page, *quality_table.marks(f"{path.stem} tuning"), table) == page, path.name
    table = quality_rates.markdown(rates_plans())
    assert put_between(page, *quality_table.marks("rates"), table) == page
    for path in sorted((BENCHMARKS / "results").glob("similarity-*.json")):
        assert update_similarity.markdown(json.loads(path.read_text(encoding="utf-8"))) in page, path.name


def rates_plans() -> list[tuple[dict, list[dict]]]:
    """The plans that the page's command of rates.py names, with their runs."""
    page = (QUALITY / "README.md").read_text(encoding="utf-8")
    (command,) = [line for line in page.splitlines() if "quality.rates " in line]
    return quality_rates.load([word for word in shlex.split(command) if word.startswith("quality_")])


def page_rows(title: str) -> dict[str, list[str]]:
    """First cell -> the others, of the first table behind `title` in docs/choosing.md."""
    text = (BENCHMARKS.parent.parent / "docs" / "choosing.md").read_text(encoding="utf-8").split(title, 1)[1]
    lines = text[text.index("| ---") :].split("\n\n", 1)[0].splitlines()[1:]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_the_rivals_quality_is_that_of_the_studies() -> None:
    plan = quality_plan.read_plan(QUALITY / "quality_main.yaml")
    runs = quality_table.current(plan, quality_table.read_runs([BENCHMARKS / "results" / "quality_main.jsonl"]))
    averages = quality_table.averages(plan, runs)
    chats = json.loads((BENCHMARKS.parent / "instruct" / "results" / "smollm2-135m.json").read_text())["runs"]
    arms = {  # of the page: of the GLUE study, of the chat study
        "AdamW": ("AdamW", "AdamW, fp32"),
        "Adafactor": ("Adafactor", None),
        "8-bit AdamW": ("AdamW, 8 bit", "8-bit AdamW, bf16"),
        "LoRA, AdamW": ("LoRA, rank 8, AdamW", "LoRA, AdamW"),
        "Adam-mini": ("Adam-mini", None),
        "APOLLO, rank 8": ("APOLLO, rank 8", None),
        "GaLore, rank 8": ("GaLore, rank 8", None),
        "FOAM as in its paper": ("FOAM, block, level 8, scale 0.25", "FOAM, block, bf16"),
    }
    rows = page_rows("**Rivals**")
    assert rows.keys() == arms.keys()
    for name, (glue, chat) in arms.items():
        pair = quality_table.paired(averages[glue], averages["AdamW"])
        assert pair is not None
        said = "" if glue == "AdamW" else quality_table.shown(*pair[1:], 100, 1, "+")
        losses = [
            [run["after"]["eval_loss"] for run in chats if (run["dataset"], run["arm"]) == (dataset, chat)]
            for dataset in ("gsm8k", "alpaca")
        ]
        means = ", ".join(f"{sum(found) / len(found):.3f}" for found in losses if found)
        assert rows[name] == [said, means, quality_table._state(runs, glue)[1]], name


def test_the_pages_commands_are_accepted_and_its_counts_true(capsys) -> None:
    page = (QUALITY / "README.md").read_text(encoding="utf-8")
    script = "python -m recipes.benchmarks.quality.study "
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith(script)]
    assert len(commands) >= 2
    for words in commands:
        options = quality.parse(words[3:])
        assert options.runs.stem == options.plan_name
    for path in PLANS:
        numbers = quality.count(quality.parse(["--plan", str(path), "--runs", "r", "--count"]))
        row = next(line for line in page.splitlines() if line.startswith(f"| [{path.name}]"))
        assert row.endswith(f"| {numbers['tuning']} + {numbers['result']} |")
