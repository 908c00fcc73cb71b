"""What compares INT8 weights with others: the study's settings, the commands, the tables in int8.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from recipes.benchmarks.quality import instruct_gpu, instruct_run
from recipes.benchmarks.quality import study as quality
from tests.support.instruct_runs import ROOT, load_script, sums, write_jsonl

load_script()

import instruct_arguments  # noqa: E402
import instruct_table  # noqa: E402

PAGE = ROOT / "recipes" / "quantized" / "int8.md"
STUDY = ROOT / "recipes" / "benchmarks" / "quality" / "int8_study.yaml"


def commands(script: str) -> list[list[str]]:
    page = PAGE.read_text(encoding="utf-8")
    lines = re.findall(rf"^python (?:-m )?(\S*\b{script}(?:\.py)? .*)$", page, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_the_arms_of_the_study_differ_in_their_weights(tmp_path: Path) -> None:
    content = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    for dataset in content["datasets"].values():
        write_jsonl(tmp_path / dataset["file"], sums())
    (words,) = commands("instruct_gpu")
    for name, value in (("--study", STUDY), ("--data", tmp_path), ("--out", tmp_path / "out")):
        words[words.index(name) + 1] = str(value)
    options, rest = instruct_gpu.parse(words[1:])
    assert rest == []
    found = {}
    for arm in options.arms:
        job = instruct_gpu.Job(options, rest, "final", "gsm8k", arm, 1e-4, 1)
        recipe, args, _ = instruct_arguments.parse(instruct_run.translate(job.words)[0])
        found[arm["name"]] = (recipe.method, recipe.dtype, "gradient_release" in args.optim_args)
        assert (str(args.optim.value), args.max_grad_norm) == ("foam", 0.0)
        assert args.optim_args.startswith("level=8,scale=0.25")
    assert list(found.values()) == [
        ("full", "float32", False),
        ("int8", "float32", False),
        ("int8", "bfloat16", False),
        ("full", "bfloat16", False),
        ("full", "bfloat16", False),
        ("int8", "bfloat16", True),
    ]
    study = instruct_gpu.Study(options, rest)
    assert len(study.waiting) == 6 * (1 + 2 * 3)  # each arm alone, and three rates on two data sets


def test_glue_is_measured_with_and_without_int8_weights() -> None:
    (words,) = commands("study")
    options = quality.parse(words[1:])
    fp32, int8 = (
        quality.Job(options, "result", "cola", arm, 1e-4, options.seeds[0]).request for arm in options.plan["arms"]
    )
    assert int8["settings"].pop("int8_weights") is True
    assert fp32 == int8


def test_the_table_is_that_of_the_results(tmp_path: Path) -> None:
    (words,) = commands("instruct_table")
    results = [word for word in words[1:] if word.endswith(".json") and (ROOT / word).is_file()]
    copy = tmp_path / "int8.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    instruct_table.main([*(str(ROOT / word) for word in results), "--readme", str(copy)])
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
