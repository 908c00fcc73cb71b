"""The study of the pretraining recipe: its YAML, the launcher without a GPU, the table and the pictures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.training_args import OptimizerNames

from foam_hf.optim_args import FOAM_NAMES, foam_options
from foam_hf.recipe_kit import put_between
from recipes.benchmarks.quality import pretrain_gpu, pretrain_report
from tests.support.pretrain_runs import QUICK, RECIPE, ROOT, SHAPES, VOCAB, load_script, write_jsonl
from tests.support.pretrain_runs import text as document

pytestmark = pytest.mark.long

train = load_script()

import pretrain_arguments  # noqa: E402

STUDY = ROOT / "recipes" / "benchmarks" / "quality" / "pretrain_study.yaml"
STUDIES = [STUDY.with_name(f"pretrain_{name}.yaml") for name in ("study", "long", "defaults", "fresh")]
TINY = {
    "settings": {
        "sequence_length": 16,
        "total_batch_size": 4,
        "per_device_train_batch_size": 4,
        "eval_tokens": 64,
        "use_cpu": True,
    },
    "tokens": 640,
    "evaluations": 2,
    "seeds": [1],
    "models": {
        "tiny": {"rank": 4, "settings": {"model": "llama-60m", "config_overrides": f"vocab_size={VOCAB},{SHAPES}"}}
    },
    "arms": [
        {"name": "AdamW", "rates": [1e-2, 1e-3], "settings": {"optim": "adamw_torch"}},
        {"name": "FOAM, level 2", "rates": [2e-2, -1.0], "settings": {"optim": "foam", "optim_args": "level=2"}},
    ],
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    texts = write_jsonl(folder / "text" / "a.jsonl", [document(number) for number in range(60)])
    words = ["--prepare_only", "true", "--dataset_path", str(texts), "--tokens_path", str(folder / "tokens")]
    train.main([*words, "--tokenizer", "train", "--eval_share", "0.2", *QUICK.split()])
    return folder / "tokens"


class Here:
    """A run in this process, instead of in a fork."""

    started: list[str] = []

    def __init__(self, module: Any, words: list[str], log: Path, threads: int, share: float, script: Path) -> None:
        assert script == RECIPE / "train.py" and 0 < share <= 1
        log.parent.mkdir(parents=True, exist_ok=True)
        self.started.append(log.parent.name)
        try:
            train.main(words)
            log.write_text("fine")
        except SystemExit as error:
            log.write_text(str(error.code))

    def poll(self) -> int:
        return 0

    def terminate(self) -> None:
        raise AssertionError("nothing is left running")


@pytest.fixture
def launcher(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(TINY))
    monkeypatch.setattr(pretrain_gpu, "warm", lambda script: None)
    monkeypatch.setattr(pretrain_gpu, "Run", Here)
    monkeypatch.setattr(Here, "started", [])
    places = ["--study", str(tmp_path / "study.yaml"), "--tokens", str(tokens), "--out", str(tmp_path / "runs")]
    return lambda *words: pretrain_gpu.main([*places, "--jobs", "1", *words])


def test_a_study_runs_every_rate_on_the_same_tokens_and_goes_on_where_it_ended(launcher, tmp_path: Path) -> None:
    assert launcher("--budget-s", "0")["unfinished"] == 4 and not Here.started  # it ends, and says what is missing
    content = launcher("--arms", "1")
    assert [run["learning_rate"] for run in content["runs"]] == [1e-2, 1e-3]
    content = launcher("--resume")
    # The first rate of every arm comes first; what the JSON had is not run again.
    assert Here.started == [
        "arm-1-lr-0.01-seed-1",
        "arm-1-lr-0.001-seed-1",
        "arm-2-lr-0.02-seed-1",
        "arm-2-lr--1-seed-1",
    ]
    assert [(run["arm"], run["learning_rate"]) for run in content["runs"]] == [
        ("AdamW", 1e-2),
        ("FOAM, level 2", 2e-2),
        ("AdamW", 1e-3),
    ]
    assert {run["tokens"] for run in content["runs"]} == {640}
    assert [point["tokens"] for point in content["runs"][0]["curve"]] == [320, 640]
    (failed,) = content["failed"]
    assert failed["learning_rate"] == -1.0 and failed["log"] and content["unfinished"] == 0
    assert json.loads((tmp_path / "runs" / "results.json").read_text()) == content
    assert str(tmp_path) not in json.dumps(content)  # no folder of this machine
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    with pytest.raises(SystemExit):
        launcher("--arms", "3")


def test_no_run_is_started_that_would_not_end_in_time(launcher, tmp_path: Path, monkeypatch) -> None:
    content = launcher("--arms", "1")
    content["runs"] = [{**run, "wall_seconds": 100.0} for run in content["runs"]]
    (tmp_path / "runs" / "results.json").write_text(json.dumps(content))
    Here.started.clear()
    assert launcher("--resume", "--budget-s", "90")["unfinished"] == 2 and not Here.started


def test_the_search_goes_on_beyond_an_end_and_resumes(tokens: Path, tmp_path: Path, monkeypatch) -> None:
    """AdamW's best is the lowest of all that may be tried; FOAM's rates have their best inside after one more."""
    scores = {("AdamW", rate): 100 + 1000 * rate for rate in (4e-3, 2e-3, 1e-3, 5e-4)}
    scores |= {("FOAM, level 2", 2e-2): 60, ("FOAM, level 2", 1e-2): 70, ("FOAM, level 2", 4e-2): 65}
    rates = {"AdamW": [4e-3, 2e-3], "FOAM, level 2": [2e-2, 1e-2]}
    content = {**TINY, "widen": 2, "arms": [{**arm, "rates": rates[arm["name"]]} for arm in TINY["arms"]]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    where = ["--study", str(tmp_path / "study.yaml"), "--tokens", str(tokens), "--out", str(tmp_path), "--resume"]
    options, rest = pretrain_gpu.parse(where)
    study = pretrain_gpu.Study(options, rest)
    ran = []
    while study.waiting:
        job = study.waiting.pop(0)
        job.record = {**job.identity, "key": job.key, "perplexity": scores[job.arm, job.rate], "wall_seconds": 1.0}
        study.finished.append(job)
        ran.append((job.arm, job.rate))
        study.ended(job)
    assert ran == [
        *(("AdamW", 4e-3), ("FOAM, level 2", 2e-2), ("AdamW", 2e-3), ("FOAM, level 2", 1e-2)),
        *(("AdamW", 1e-3), ("FOAM, level 2", 4e-2), ("AdamW", 5e-4)),
    ]
    assert len(study.report()["runs"]) == 7
    again = pretrain_gpu.Study(options, rest)
    assert not again.waiting and len(again.finished) == 7 and not again.others


@pytest.mark.parametrize("said", ["CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "mha_graph.execute failed"])
def test_a_run_that_found_no_memory_is_tried_once_more(launcher, monkeypatch, said: str) -> None:
    monkeypatch.setattr(train, "main", lambda words: sys.exit(said))
    content = launcher("--arms", "1")
    assert Here.started == [name for name in ("arm-1-lr-0.01-seed-1", "arm-1-lr-0.001-seed-1") for _ in range(2)]
    assert [run["log"] for run in content["failed"]] == [said] * 2 and content["unfinished"] == 0


def test_the_study_compares_what_the_issue_of_memory_is_about_at_two_rates_each() -> None:
    study = yaml.safe_load(STUDY.read_text())
    names = [arm["name"] for arm in study["arms"]]
    assert len(names) == len(set(names))
    for name in ("AdamW", "FOAM, level 2", "FOAM-Mini", "FOAM-Muon, level 2", "Muon", "GaLore"):
        assert name in names  # those that the report's targets compare
    known = {option.value for option in OptimizerNames} | {*FOAM_NAMES}
    for arm in study["arms"]:
        assert arm["settings"]["optim"] in known | set(pretrain_arguments.OTHERS)
        assert len(arm["rates"]) == 2
    step = study["settings"]["sequence_length"] * study["settings"]["total_batch_size"]
    assert study["tokens"] % step == 0


def test_the_long_study_repeats_arms_of_the_short_one_on_100_million_tokens() -> None:
    short, long = (yaml.safe_load(STUDY.with_name(f"pretrain_{name}.yaml").read_text()) for name in ("study", "long"))
    assert long["settings"] == short["settings"] and long["tokens"] >= 1e8
    known = {arm["name"]: arm["settings"] for arm in short["arms"]}
    assert {arm["name"]: arm["settings"] for arm in long["arms"]}.items() <= known.items()


@pytest.fixture
def plenty(tokens: Path, tmp_path: Path) -> Path:
    """A folder of tokens that says it has as many as any study wants."""
    made = json.loads((tokens / "tokens.json").read_text())
    made["counts"]["train"]["tokens"] = 10**9
    (tmp_path / "plenty").mkdir()
    (tmp_path / "plenty" / "tokens.json").write_text(json.dumps(made))
    return tmp_path / "plenty"


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_a_study_is_accepted_by_the_recipe(study: Path, plenty: Path, tmp_path: Path) -> None:
    models = yaml.safe_load(study.read_text())["models"]
    where = ["--study", str(study), "--tokens", str(plenty), "--out", str(tmp_path / "runs")]
    options, rest = pretrain_gpu.parse([*where, "--models", ",".join(models)])
    jobs, settings = pretrain_gpu.plan(options, rest), options.study["settings"]
    assert len(jobs) == len(models) * sum(len(arm["rates"]) for arm in options.study["arms"])
    # The first rate of every arm comes first.
    assert [(job.arm, job.rate) for job in jobs[: len(options.arms)]] == [
        (arm["name"], arm["rates"][0]) for arm in options.arms
    ]
    for job in jobs:
        recipe, training, optim, _ = pretrain_arguments.parse([*job.words, "--use_cpu", "true"])
        config = train.model_config(recipe)
        assert config.hidden_size == (256 if job.model == "llama-20m" else 512)
        assert training["max_steps"] == options.steps
        assert training["eval_steps"] == options.steps // options.study["evaluations"]
        args = pretrain_arguments.build_training_arguments(recipe, training, optim)
        assert args.train_batch_size * args.gradient_accumulation_steps == settings["total_batch_size"]
        assert "{" not in str(args.optim_args)
        if optim in FOAM_NAMES:
            foam_options(optim, args.optim_args)  # raises where a key or value is none of FOAM's


def test_studies_of_the_paper_keep_embeddings_plain_and_those_of_the_defaults_fold_them() -> None:
    for study in STUDIES:
        for arm in yaml.safe_load(study.read_text())["arms"]:
            if arm["settings"]["optim"] not in FOAM_NAMES:
                continue
            found = foam_options(arm["settings"]["optim"], arm["settings"]["optim_args"])
            plain = study.stem in ("pretrain_study", "pretrain_long") or "embeddings plain" in arm["name"]
            for name in ("fold_embeddings", "fold_head"):
                assert found.get(name) is (False if plain else None)
            assert "scale" in found  # a study says what it ran, whatever the default is later
            if not plain and found.get("second_moment", "block") == "block":  # one curve over rates for all that folds
                assert found.get("embedding_scale") in (None, found["scale"])


def test_a_study_of_fresh_text_does_not_start_where_a_run_would_see_tokens_twice(
    launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = yaml.safe_load((tmp_path / "study.yaml").read_text())
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**study, "fresh": True}))
    assert launcher("--arms", "1", "--rates", "1e-2")["runs"]
    with pytest.raises(SystemExit):
        launcher("--tokens-per-run", "64000")
    assert "expected 64000, as no run may see one twice" in capsys.readouterr().err


def test_rates_of_the_command_line_join_those_that_the_study_had(launcher) -> None:
    launcher("--arms", "1")
    content = launcher("--arms", "1", "--rates", "3e-3,1e-3", "--resume")
    assert Here.started == [f"arm-1-lr-{rate}-seed-1" for rate in ("0.01", "0.001", "0.003")]
    assert sorted(run["learning_rate"] for run in content["runs"]) == [1e-3, 3e-3, 1e-2]
    with pytest.raises(SystemExit):
        launcher("--rates", "fast")


def fabricated() -> dict[str, Any]:
    """A study with three seeds of one arm, a diverged rate, a diverged arm."""

    def runs(arm: str, rate: float, losses: list[float | None], state: int, layers: int) -> list[dict]:
        return [
            {
                "model": "llama-60m",
                "arm": arm,
                "learning_rate": rate,
                "seed": seed,
                "parameters": 58_000_000,
                "perplexity": None if loss is None else math.exp(loss),
                "eval_loss": loss,
                "tokens": 20_000_000,
                "curve": [
                    {"step": n, "tokens": n * 5_000_000, "eval_loss": loss and loss + 4 / n - 1} for n in (1, 2, 4)
                ],
                "optimizer_state_bytes": state,
                "layers_state_bytes": layers,
                "device": "Some GPU",
            }
            for seed, loss in enumerate(losses, 1)
        ]

    found = runs("AdamW", 1e-3, [3.0, 3.1], 464_000_000, 200_000_000) + runs("AdamW", 3e-3, [None, 3.0], 1, 1)
    found += runs("FOAM, level 2", 1e-2, [2.9], 314_000_000, 50_000_000)
    found += runs("FOAM-Mini", 1e-2, [3.2], 264_100_000, 300_000)
    found += runs("GaLore", 1e-2, [3.3], 300_000_000, 45_000_000)
    found += runs("Muon", 1e-3, [2.8], 362_000_000, 100_000_000)
    found += runs("FOAM-Muon, level 2", 1e-3, [2.85], 287_000_000, 25_000_000)
    found += runs("FOAM-Muon", 1e-2, [2.7], 1_300_000, 200_000)
    found += runs("APOLLO", 1e-2, [None], 300_000_000, 45_000_000)
    counts = {"train": {"tokens": 30_000_000}, "held_out": {"tokens": 500_000}}
    data = {"tokenizer": "trained on the data, 32000 tokens", "vocab_size": 32000, "counts": counts}
    return {"benchmark": "pretraining", "data": data, "runs": found, "failed": [], "unfinished": 2}


def test_the_report_gives_the_best_rate_the_others_and_the_targets(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "study.json").write_text(json.dumps(fabricated()))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{pretrain_report.START}\nold\n{pretrain_report.END}\nafter\n")
    pretrain_report.main([str(tmp_path / "results" / "study.json"), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "| 21.14 ± 1.49 | 0.001 | diverged (0.003) | 464.00 MB | 100% | 200.00 MB | 100% |" in rows["AdamW"]
    assert "| 18.17 | 0.01 |  | 314.00 MB | 67.7% | 50.00 MB | 25% |" in rows["FOAM, level 2"]
    assert "| 0.15% |" in rows["FOAM-Mini"] and "| diverged |" in rows["APOLLO"]
    order = [name for name in rows if name in ("Muon", "FOAM, level 2", "AdamW", "GaLore", "APOLLO")]
    assert order == ["Muon", "FOAM, level 2", "AdamW", "GaLore", "APOLLO"]  # the best first
    assert rows["perplexity of FOAM, level 2 / of AdamW"].endswith("| 1 | 0.860 | yes |")
    assert rows["perplexity of FOAM-Muon, level 2 / of Muon"].endswith("| 1.01 | 1.051 | no |")
    assert rows["the layers' state, FOAM-Mini / AdamW"].endswith("| 0.01 | 0.002 | yes |")
    assert rows["the layers' state, FOAM-Muon / Muon"].endswith("| 0.26 | 0.250 | yes |")
    assert rows["perplexity of FOAM-Muon / of AdamW"].endswith("| 1 | 0.704 | yes |")
    assert rows["the whole state, FOAM-Muon / AdamW"].endswith("| 0.01 | 0.003 | yes |")
    assert "2 runs of the study are missing." in text
    pictures = [f"perplexity_{kind}-llama-60m.png" for kind in ("tokens", "state")]
    assert all(f"](results/{name})" in text for name in pictures)
    assert all((tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_tables_in_the_readme_are_those_of_the_results(tmp_path: Path) -> None:
    contents = [json.loads(path.read_text()) for path in sorted((RECIPE / "results").glob("*.json"))]
    copy = tmp_path / "README.md"
    text = "\n\n".join(pretrain_report.section(content, "results") for content in contents)
    copy.write_text(put_between((RECIPE / "README.md").read_text(), pretrain_report.START, pretrain_report.END, text))
    assert copy.read_text() == (RECIPE / "README.md").read_text()


def test_the_pages_perplexities_are_those_of_the_study() -> None:
    content = json.loads((RECIPE / "results" / "study.json").read_text())
    arms = {arm.name: arm for arm in pretrain_report.arms(content, "llama-60m")}
    names = {
        "`foam_muon`, `level=2`": "FOAM-Muon, level 2",
        "Muon": "Muon",
        "GaLore, rank 128": "GaLore",
        "FOAM as in its paper (`level=2`)": "FOAM, level 2",
        "APOLLO, rank 128": "APOLLO",
        "AdamW": "AdamW",
    }
    rows = rows_of_the_page("| optimizer | perplexity | state on the layers |")
    assert [name for name, _, _ in rows] == list(names)
    for name, perplexity, share in rows:
        arm = arms[names[name]]
        assert perplexity == f"{arm.perplexity:.1f}" and share == f"{100 * arm.layers / arms['AdamW'].layers:.3g}%"


def rows_of_the_page(header: str) -> list[list[str]]:
    """Cells of the table of docs/choosing.md that begins so, below its section on training from scratch."""
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").split("## From scratch", 1)[1]
    lines = text.split(header, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [line.strip("| ").split(" | ") for line in lines]


def test_what_the_pages_say_of_fresh_text_is_in_its_results() -> None:
    content = json.loads((RECIPE / "results" / "pretrain_fresh.json").read_text())
    arms = {arm.name: arm for arm in pretrain_report.arms(content, "llama-60m-fresh")}
    muon, adamw = arms["FOAM-Muon"], arms["AdamW"]
    assert content["study"]["fresh"] and content["data"]["counts"]["train"]["tokens"] > content["study"]["tokens"]
    assert (adamw.rate, muon.rate) == (min(adamw.by_rate), max(muon.by_rate))  # neither is at its best for sure
    assert max(run["perplexity"] for run in muon.runs) < adamw.perplexity and muon.state < 0.01 * adamw.state
    rows = []
    for arm, name in ((muon, "`foam_muon`, as it is by default"), (adamw, "AdamW")):
        (other,) = arm.by_rate.keys() - {arm.rate}
        state = f"{pretrain_report.format_bytes(arm.state)}, {100 * arm.state / adamw.state:.3g}%"
        rows.append([name, *(f"{arm.score(rate)} at {rate:g}" for rate in (arm.rate, other)), state])
    header = "| optimizer | perplexity | at the other rate | state of the whole model |"
    assert rows_of_the_page(header) == rows
    said = "`foam_muon` ends at perplexity {:.1f} with {:.2%} of AdamW's state, AdamW at {:.1f}"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert said.format(muon.perplexity, muon.state / adamw.state, adamw.perplexity) in readme
