"""The GLUE recipe: its metrics, files, arguments and messages, and whole runs on tiny models."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, RobertaConfig, XLNetConfig

import foam_hf
from foam_hf import recipe_kit
from foam_hf.optim_args import foam_options
from foam_hf.recipe_kit import put_between, write_json
from tests.support.recipe_errors import exit_message

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "glue"
sys.path.insert(0, str(RECIPE))

import arguments  # noqa: E402
import data  # noqa: E402
import metrics  # noqa: E402
import table  # noqa: E402
import train  # noqa: E402

from recipes.benchmarks.quality import glue_gpu  # noqa: E402

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "likes", "hears", "small", "big", "red", "old", "man", "not"]
QUICK = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--save_strategy", "no"]
QUICK += ["--eval_strategy", "no", "--use_cpu", "true"]


def sentence(number: int, length: int = 6) -> str:
    """A different sentence of our small vocabulary for each number."""
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(length))


def rows_of(task: str, count: int, start: int = 0) -> list[dict]:
    """Made-up rows in the hub's columns; labels take all values in turn."""
    spec = data.TASKS[task]
    labels = [number % len(spec.labels) if spec.labels else round(number % 11 / 2, 1) for number in range(count)]
    return [
        {**{name: sentence(start + 3 * i + k) for k, name in enumerate(spec.columns)}, "label": labels[i], "idx": i}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All nine tasks, 16 rows each to train on and 8 to validate, in subfolders."""
    root = tmp_path_factory.mktemp("glue")
    for task, spec in data.TASKS.items():
        write_jsonl(root / task / "train.jsonl", rows_of(task, 16))
        for split in spec.validation_sets:
            name = split if split == "validation" else f"validation_{split}"
            write_jsonl(root / task / f"{name}.jsonl", rows_of(task, 8, start=100))
    return root


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with a word-level tokenizer of our vocabulary, saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("tiny-bert")
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch):
    """Offline for every test that does not say otherwise, whatever network the machine has."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = recipe_kit.hub_problem, metrics.hub_metric  # a test may put others in their place
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def flags(tiny_model: Path, glue: Path, tmp_path: Path) -> list[str]:
    """Flags of a two-step run on the tiny model, into tmp_path/out."""
    where = [
        "--model_name_or_path",
        str(tiny_model),
        "--dataset_path",
        str(glue),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    return [*where, *QUICK]


error_of = functools.partial(exit_message, train.main)


# ---- metrics, against values worked out by hand ----

# Classes: 3 true positives, 1 false positive, 1 false negative, 3 true negatives.
PREDICTED = [1, 1, 1, 1, 0, 0, 0, 0]
ACTUAL = [1, 1, 1, 0, 1, 0, 0, 0]


def logits(classes: list[int], count: int = 2) -> np.ndarray:
    return np.eye(count)[classes]


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "expected"),
    [
        # (3*3 - 1*1) / sqrt(4*4*4*4)
        ("cola", logits(PREDICTED), ACTUAL, {"matthews_correlation": 0.5}),
        ("sst2", logits(PREDICTED), ACTUAL, {"accuracy": 0.75}),
        ("mrpc", logits(PREDICTED), ACTUAL, {"f1": 0.75, "accuracy": 0.75}),
        # precision 1/2, recall 1/3, 4 of 8 right
        ("qqp", logits([1, 1, 0, 0]), [1, 0, 1, 1], {"f1": 0.4, "accuracy": 0.25}),
        ("mnli", logits([0, 1, 2, 2], 3), [0, 2, 2, 1], {"accuracy": 0.5}),
        ("rte", logits([0, 1, 0]), [0, 1, 1], {"accuracy": 2 / 3}),
        # deviations of (1, 2, 4) and (1, 3, 2) from their means 7/3 and 2: sum of products 1, sums of squares 14/3, 2
        ("stsb", np.array([[1.0], [2.0], [4.0]]), [1.0, 3.0, 2.0], {"pearson": 1 / (28 / 3) ** 0.5, "spearmanr": 0.5}),
        # degenerate: one class predicted, one class in the labels, a constant prediction, constant labels
        ("cola", logits([1, 1, 1, 1]), [1, 0, 1, 1], {"matthews_correlation": 0.0}),
        ("cola", logits([1, 0, 1, 1]), [1, 1, 1, 1], {"matthews_correlation": 0.0}),
        ("mrpc", logits([0, 0, 0, 0]), [1, 0, 1, 1], {"f1": 0.0, "accuracy": 0.25}),
        ("mrpc", logits([0, 0]), [0, 0], {"f1": 0.0, "accuracy": 1.0}),
        ("stsb", np.array([2.5, 2.5, 2.5]), [1.0, 3.0, 2.0], {"pearson": 0.0, "spearmanr": 0.0}),
        ("stsb", np.array([1.0, 2.0, 4.0]), [3.0, 3.0, 3.0], {"pearson": 0.0, "spearmanr": 0.0}),
    ],
)
def test_metrics_equal_hand_computed_values_without_warnings(task, outputs, labels, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.score(task, outputs, np.array(labels)) == pytest.approx(expected)


def test_metrics_come_from_evaluate_where_the_hub_answers(monkeypatch):
    import evaluate

    asked = []

    class HubMetric:
        def compute(self, predictions, references):
            warnings.warn("constant input", stacklevel=1)
            asked.append((predictions.tolist(), references.tolist()))
            return {"pearson": float("nan"), "spearmanr": np.float64(0.25)}

    monkeypatch.setattr(metrics, "hub_problem", lambda: None)
    monkeypatch.setattr(evaluate, "load", lambda *names: asked.append(names) or HubMetric())
    assert metrics.score("stsb", np.array([[1.0], [1.0]]), np.array([0.0, 5.0])) == {"pearson": 0.0, "spearmanr": 0.25}
    assert asked == [("glue", "stsb"), ([1.0, 1.0], [0.0, 5.0])]


def test_metrics_fall_back_when_evaluate_fails(monkeypatch, capsys):
    import evaluate

    def fail(*names):
        raise ConnectionError("gone")

    monkeypatch.setattr(metrics, "hub_problem", lambda: None)
    monkeypatch.setattr(evaluate, "load", fail)
    assert metrics.score("sst2", logits([1, 0]), np.array([1, 1])) == {"accuracy": 0.5}
    assert "ConnectionError" in capsys.readouterr().out


def test_outputs_that_are_not_finite_are_announced(capsys):
    assert metrics.score("sst2", np.full((2, 2), np.nan), np.array([0, 1])) == {"accuracy": 0.5}
    assert "4 outputs" in capsys.readouterr().out


# ---- data ----

# GLUE's own files: header (None: CoLA has none), one line, what it means.
ORIGINAL = {
    "cola": (None, 'gj04\t0\t*\tHe said "so.', ('He said "so.', None, 0)),
    "sst2": ("sentence\tlabel", 'a "fine film \t1', ('a "fine film ', None, 1)),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tThe "a\tThe b', ('The "a', "The b", 1)),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tf\t2012\t1\tnone\tnone\tA plane.\tA kite.\t4.750",
        ("A plane.", "A kite.", 4.75),
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWhy?\tHow?\t0", ("Why?", "How?", 0)),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tfiction\t( a )\t( b )\t(R a)\t(R b)\tIt rains.\tIt pours.\tneutral\tneutral",
        ("It rains.", "It pours.", 1),
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWho?\tHe.\tnot_entailment", ("Who?", "He.", 1)),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tIt is.\tIs it.\tentailment", ("It is.", "Is it.", 0)),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tI saw it.\tI saw.\t1", ("I saw it.", "I saw.", 1)),
}


@pytest.mark.parametrize("task", data.TASKS)
def test_glues_own_files_are_read(task, tmp_path):
    header, line, (text, pair, label) = ORIGINAL[task]
    spec = data.TASKS[task]
    folder = tmp_path / spec.folder
    folder.mkdir()
    content = "".join(part + "\n" for part in (header, line, line) if part is not None)
    names = ["dev"] if spec.validation_sets == ("validation",) else [f"dev_{split}" for split in spec.validation_sets]
    for name in ("train", *names):
        (folder / f"{name}.tsv").write_text(content, encoding="utf-8")
    splits = data.load_splits(task, str(tmp_path), several=True)
    assert list(splits) == ["train", *spec.validation_sets]
    for rows in splits.values():
        assert rows == [{"text": text, "text_pair": pair, "label": label}] * 2


def test_mrpc_from_microsofts_files(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    lines = "".join(f'{i % 2}\t{i}\t{i + 50}\tfirst "{i}\tsecond {i}\n' for i in range(4))
    (tmp_path / "msr_paraphrase_train.txt").write_text(header + lines, encoding="utf-8")
    assert "dev_ids.tsv" in error_of(["--task_name", "mrpc", *local(tmp_path)])
    (tmp_path / "dev_ids.tsv").write_text("2\t52\n", encoding="utf-8")
    splits = data.load_splits("mrpc", str(tmp_path))
    assert [row["text"] for row in splits["train"]] == ['first "0', 'first "1', 'first "3']
    assert splits["validation"] == [{"text": 'first "2', "text_pair": "second 2", "label": 0}]


@pytest.mark.parametrize("task", ["cola", "qnli", "stsb"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "tsv", "shards"])
def test_every_file_format_gives_the_same_rows(task, kind, tmp_path):
    splits = {"train": rows_of(task, 7), "validation": rows_of(task, 5, start=30)}
    for name, rows in splits.items():
        if kind == "jsonl":
            write_jsonl(tmp_path / "train.jsonl" if name == "train" else tmp_path / "validation.jsonl", rows)
        elif kind == "json":
            (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        elif kind in ("csv", "tsv"):
            with open(tmp_path / f"{name}.{kind}", "w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]), delimiter="," if kind == "csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
        else:
            import pyarrow
            from pyarrow import parquet

            files = {f"{name}.parquet": rows}
            if kind == "shards":
                files = {f"{name}-00001-of-00002.parquet": rows[3:], f"{name}-00000-of-00002.parquet": rows[:3]}
            for file, part in files.items():
                parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / file)
    columns = data.TASKS[task].columns
    expected = {
        name: [
            {"text": row[columns[0]], "text_pair": row[columns[1]] if columns[1:] else None, "label": row["label"]}
            for row in rows
        ]
        for name, rows in splits.items()
    }
    assert data.load_splits(task, str(tmp_path)) == expected


def local(folder: Path) -> list[str]:
    return ["--dataset_path", str(folder), "--output_dir", str(folder / "out"), "--model_name_or_path", str(folder)]


GOOD = {"sentence": "the cat", "label": 1}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no train file", "train.{jsonl,json,csv,parquet,tsv}"]),
        ({"train.jsonl": [GOOD]}, ["no validation file", "validation.{jsonl", "dev.{jsonl"]),
        ({"train.jsonl": [GOOD], "train.csv": []}, ["several train files", "train.jsonl, train.csv"]),
        ({"train.jsonl": [{"text": "a", "label": 1}]}, ["no column sentence", "found text, label"]),
        ({"train.jsonl": [{"sentence": "a"}]}, ["no column label", "found sentence"]),
        ({"train.jsonl": [GOOD, {**GOOD, "label": -1}]}, ["row 2", "label -1", "0 (unacceptable), 1 (acceptable)"]),
        ({"train.jsonl": [{**GOOD, "label": "good"}]}, ["row 1", "label 'good'", "1 (acceptable)"]),
        ({"train.jsonl": [{**GOOD, "label": 0.5}]}, ["label 0.5"]),
        ({"train.jsonl": [{**GOOD, "label": None}]}, ["label None"]),
        ({"train.jsonl": []}, ["no rows"]),
        ({"train.jsonl": [GOOD], "validation.json": "[1,"}, ["validation.json", "line 1", "not JSON"]),
        ({"train.jsonl": '{"sentence": "a", "label": 1}\n{oops\n'}, ["train.jsonl", "line 2", "not JSON"]),
        ({"train.jsonl": "1\n"}, ["row 1", "expected columns"]),
        ({"train.tsv": "a\tb\n"}, ["line 1", "4 columns", "found 2"]),
        ({"train.parquet": "not parquet"}, ["train.parquet", "not a parquet file"]),
        ({"train.csv": b"sentence,label\n\xff,1\n"}, ["train.csv", "UTF-8"]),
    ],
)
def test_wrong_data_is_named_before_anything_runs(files, words, tmp_path):
    for name, content in files.items():
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if files and not any(name.startswith("validation") for name in files) and "no validation file" not in words:
        write_jsonl(tmp_path / "validation.jsonl", [GOOD])
    message = error_of(["--task_name", "cola", *local(tmp_path)])
    for word in words:
        assert word in message


def test_other_wrong_folders_and_labels(tmp_path, glue):
    assert "no folder" in error_of(["--task_name", "cola", *local(tmp_path), "--dataset_path", str(tmp_path / "no")])
    write_jsonl(tmp_path / "cola" / "train.jsonl", [GOOD])
    write_jsonl(tmp_path / "cola" / "validation.jsonl", [GOOD])
    assert "no subfolder sst2 or SST-2" in error_of(["--task_name", "cola,sst2", *local(tmp_path)])
    for label in ("5.5", "nan", "x"):
        write_jsonl(tmp_path / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": label}])
        write_jsonl(tmp_path / "validation.jsonl", [{"sentence1": "a", "sentence2": "b", "label": "1"}])
        assert "a number from 0 to 5" in error_of(["--task_name", "stsb", *local(tmp_path)])
    assert "no folder" in error_of(["--task_name", "cola", *local(glue), "--model_name_or_path", "./nowhere"])


def test_empty_texts_and_broken_lines_are_counted(tmp_path, capsys):
    (tmp_path / "train.tsv").write_text(
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\t\t0\n1\t2\tbroken\n", encoding="utf-8"
    )
    (tmp_path / "dev.jsonl").write_text('{"question1": null, "question2": "b", "label": "duplicate"}\n', "utf-8")
    splits = data.load_splits("qqp", str(tmp_path))
    assert [len(rows) for rows in splits.values()] == [1, 1]
    assert splits["validation"] == [{"text": "", "text_pair": "b", "label": 1}]
    printed = capsys.readouterr().out
    assert "train.tsv: 1 lines without 6 columns were left out" in printed
    assert printed.count("1 of 1 rows have an empty text") == 2


# ---- the hub ----


def test_a_silent_hub_is_noticed_with_the_local_alternative(monkeypatch, tmp_path, glue, tiny_model):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        common = ["--task_name", "cola", "--output_dir", str(tmp_path / "out")]
        message = error_of([*common, "--dataset_path", str(glue), "--model_name_or_path", "someone/unknown-model"])
        assert "does not answer" in message and "--model_name_or_path" in message
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        message = error_of([*common, "--model_name_or_path", str(tiny_model)])
        assert "nyu-mll/glue" in message and "--dataset_path" in message


def test_offline_mode_is_respected_without_a_request(monkeypatch, tmp_path, tiny_model):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "not even an address")
    common = ["--task_name", "cola", "--output_dir", str(tmp_path)]
    message = error_of([*common, "--model_name_or_path", "someone/unknown-model"])
    assert "offline mode is set" in message and "--model_name_or_path" in message
    message = error_of([*common, "--model_name_or_path", str(tiny_model)])
    assert "offline mode is set" in message and "--dataset_path" in message


@pytest.mark.parametrize("task", ["mnli", "stsb"])
def test_the_hubs_dataset_is_used_where_it_answers(task, monkeypatch):
    import datasets

    names = {"stsb": ["train", "validation"], "mnli": ["train", "validation_matched", "validation_mismatched"]}[task]
    hub = {name: datasets.Dataset.from_list(rows_of(task, 3, start)) for start, name in enumerate(names)}
    monkeypatch.setattr(data, "hub_problem", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *words: hub if words == ("nyu-mll/glue", task) else None)
    splits = data.load_splits(task, None)
    assert [(split, [row["text"] for row in rows]) for split, rows in splits.items()] == [
        (name.removeprefix("validation_"), list(hub[name][data.TASKS[task].columns[0]])) for name in names
    ]


# ---- arguments ----


def write_config(folder: Path, text: str) -> str:
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return str(folder / "config.yaml")


def test_command_line_wins_over_config_and_config_over_defaults(tmp_path):
    config = write_config(
        tmp_path,
        "task_name: [cola, rte]\nseeds: 3\nlearning_rate: 2e-4\nnum_train_epochs: 5\nmax_seq_length: 99\n"
        "optim: foam\noptim_args: {level: 2, scale: 0.5}\nbf16: false\noutput_dir: here\n"
        "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 2}\n",
    )
    recipe, training, path, notes = arguments.parse([config, "--num_train_epochs=1", "--task-name", "sst2", "mnli"])
    assert (recipe.task_name, recipe.seeds, recipe.max_seq_length, recipe.max_train_samples) == (
        ["sst2", "mnli"],
        [3],
        99,
        None,
    )
    assert recipe.eval_untrained is False and notes == [] and path == Path(config)
    args = arguments.build_training_arguments(training, tmp_path / "run", 3)
    assert (args.learning_rate, args.num_train_epochs, args.optim_args) == (2e-4, 1.0, "level=2,scale=0.5")
    assert args.lr_scheduler_kwargs == {"num_cycles": 2} and args.report_to == [] and args.seed == 3
    assert args.output_dir == str(tmp_path / "run") and args.push_to_hub is False


def test_a_flag_wins_over_the_configs_other_word_for_the_same(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("warmup_steps: 7\nseeds: [1, 2]\nlr_scheduler_kwargs: {num_cycles: 0.5}\n")
    common = [str(config), "--task_name", "cola", "--output_dir", "x"]
    recipe, training, *_ = arguments.parse([*common, "--resume_from_checkpoint", "false"])
    assert recipe.seeds == [1, 2] and training["warmup_steps"] == 7
    assert training["lr_scheduler_kwargs"] == {"num_cycles": 0.5} and "resume_from_checkpoint" not in training
    recipe, training, *_ = arguments.parse([*common, "--warmup_ratio", "0.2", "--seed", "3"])
    assert recipe.seeds == [] and training["seed"] == 3
    assert 0.2 in (training.get("warmup_ratio"), training.get("warmup_steps")) and 7 not in training.values()


@pytest.mark.parametrize("given", [["--task_name", "cola,mrpc"], ["--task_name", "cola", "--task_name", "mrpc"]])
def test_several_tasks_in_every_spelling(given):
    recipe, *_ = arguments.parse([*given, "--seeds", "1", "2,3", "--output_dir", "x"])
    assert recipe.task_name == ["cola", "mrpc"] and recipe.seeds == [1, 2, 3]


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        ("learning_rat: 1\n", [], ["unknown key 'learning_rat'", "nearest: 'learning_rate'"]),
        ("learning_rate: fast\n", [], ["config.yaml", "--learning_rate", "fast"]),
        ("- a\n", [], ["key: value", "list"]),
        ("a: [1\n", [], ["Cannot read the config"]),
        ("", ["--learnin_rate", "1"], ["--learnin_rate", "nearest: --learning_rate"]),
        ("", ["--optim", "foamy"], ["--optim", "foamy", "foam"]),
        ("", ["--task_name", "colla"], ["colla", "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli"]),
        ("", ["--task_name"], ["--task_name"]),
        ("", ["--seeds", "one"], ["--seeds", "one", "1,2,3"]),
        ("", ["--seeds", "-1"], ["--seeds", "-1", "from 0 to 4294967295"]),
        ("", ["--seeds", "1", "--seed", "2"], ["both seeds and seed"]),
        ("warmup_ratio: 0.1\nwarmup_steps: 5\n", [], ["config.yaml", "both warmup_steps and warmup_ratio"]),
        ("learning_rate: [1e-4]\n", [], ["config.yaml", "learning_rate", "one value"]),
        ("max_seq_length: {a: 1}\n", [], ["config.yaml", "max_seq_length", "one value"]),
        ("", ["--do_train", "false"], ["--do_train", "always trains"]),
        ("", ["--do_eval", "false"], ["--do_eval", "always trains, then evaluates"]),
        ("", ["--max_train_samples", "0"], ["--max_train_samples", "0", "at least 1"]),
        ("", ["--dtype", "int8"], ["int8", "float32, bfloat16 or float16"]),
        ("", ["--do_predict"], ["--do_predict"]),
        ("", ["--learning_rate", "x"], ["--learning_rate", "x"]),
        (
            "",
            ["--eval_strategy", "steps", "--load_best_model_at_end", "--save_strategy", "epoch"],
            ["load_best_model"],
        ),
        ("", ["--resume_from_checkpoint", "nowhere"], ["nowhere"]),
        ("", ["--optim_args", "levl=3"], ["levl", "level"]),
        ("", ["--optim_target_modules", "nothing_like_it"], ["nothing_like_it"]),
        ("", ["--optim", "galore_adamw"], ["optim_target_modules"]),
    ],
)
def test_wrong_arguments_are_one_line(config, flags, words, tmp_path, tiny_model, glue):
    path = write_config(tmp_path, config if config.startswith("-") else "optim: foam\n" + config)
    task = [] if "--task_name" in flags else ["--task_name", "cola"]
    message = error_of([path, *local(glue), "--model_name_or_path", str(tiny_model), *task, *QUICK, *flags])
    for word in words:
        assert word in message


def test_missing_task_and_output_dir(tmp_path):
    assert "--task_name" in error_of(["--output_dir", str(tmp_path)])
    assert "--output_dir" in error_of(["--task_name", "cola"])
    assert "nowhere.yaml" in error_of(["nowhere.yaml", "--task_name", "cola"])


def test_foams_settings_do_not_reach_another_optimizer():
    common = [str(RECIPE / "roberta-base-paper.yaml"), "--task_name", "cola", "--output_dir", "x"]
    _, training, _, notes = arguments.parse([*common, "--optim", "adamw_torch"])
    assert "optim_args" not in training and training["learning_rate"] == 2e-4
    assert "level=8,scale=0.25" in notes[0] and "0.0002" in notes[1]
    _, training, _, notes = arguments.parse([*common, "--optim", "adamw_torch", "--learning_rate", "2e-5"])
    assert len(notes) == 1 and training["learning_rate"] == 2e-5
    _, training, _, notes = arguments.parse([*common, "--optim", "foam_mini"])  # its level is another, too
    assert "optim_args" not in training
    _, training, _, notes = arguments.parse([*common, "--optim", "foam_mini", "--optim_args", "scale=0.5"])
    assert training["optim_args"] == "scale=0.5"


def test_warm_up_is_a_share_of_the_steps_in_every_release():
    common = ["--task_name", "cola", "--output_dir", "x", "--use_cpu", "true"]

    def steps(*flags: str) -> int:
        _, training, _, _ = arguments.parse([*common, *flags])
        return arguments.build_training_arguments(training, Path("x"), 1).get_warmup_steps(200)

    assert steps() == 20
    assert steps("--warmup_ratio", "0.2") == 40
    assert steps("--warmup_steps", "7") == 7
    assert steps("--warmup_steps", "0") == 0


@pytest.mark.parametrize("config", sorted(path.name for path in RECIPE.glob("*.yaml")))
def test_every_config_says_which_settings_it_has_and_trains(config, flags):
    _, training, _, _ = arguments.parse([str(RECIPE / config), "--task_name", "cola", "--output_dir", "x"])
    args = arguments.build_training_arguments(training, Path("x"), 1)
    name, papers = config.removesuffix(".yaml").removesuffix("-paper"), "-paper" in config
    rate = 2e-4 if papers else {"roberta-base": 2e-5, "roberta-large": 1e-5}[name]  # AdamW's, as published
    given = "level=8,scale=0.25,fold_embeddings=false,fold_head=false" if papers else None
    assert (args.optim, args.optim_args, args.learning_rate) == ("foam", given, rate)
    assert (args.lr_scheduler_type, args.get_warmup_steps(100), args.num_train_epochs) == ("cosine", 10, 3)
    assert (args.per_device_train_batch_size, args.report_to, args.push_to_hub) == (32, [], False)
    recipe, *_ = arguments.parse([str(RECIPE / config), "--task_name", "cola", "--output_dir", "x"])
    assert recipe.max_seq_length == 256
    assert recipe.model_name_or_path == name
    results = train.main([str(RECIPE / config), "--task_name", "cola", *flags])
    assert results["steps"] == 2 and results["settings"]["max_seq_length"] == 256


# ---- whole runs ----


@pytest.mark.parametrize("task", data.TASKS)
def test_every_task_trains_evaluates_and_saves(task, flags, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    results = train.main(["--task_name", task, *flags, "--eval_untrained", "--bf16", "true"])
    spec = data.TASKS[task]
    prefixes = [""] if spec.validation_sets == ("validation",) else [f"{split}_" for split in spec.validation_sets]
    names = {prefix + name for prefix in prefixes for name in (*spec.metrics, "loss")}
    assert results["scores"].keys() == results["untrained"].keys() == names
    assert results["scores"] != results["untrained"], "two steps change at least the loss"
    assert results["main_score"] == pytest.approx(np.mean([results["scores"][name] for name in spec.main]))
    assert 0 < results["optimizer_state_bytes"] < results["adamw_state_bytes"]
    assert (results["task"], results["optim"], results["optim_args"]) == (task, "foam", None)
    assert results["versions"]["foam_hf"] == foam_hf.__version__ and results["seconds"]["train"] > 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == (len(spec.labels) if spec.labels else 1)
    if spec.labels:
        assert tuple(model.config.id2label.values()) == spec.labels
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"] == [2, 4, 6, 3]
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("optim/state_bytes" in entry for entry in logged)
    printed = capsys.readouterr().out
    assert printed.startswith(f"GLUE {task} | model ") and "| optimizer foam, lr 2e-05 |" in printed.split("\n")[0]
    assert "AutoModelForSequenceClassification.from_pretrained" in printed


@pytest.mark.parametrize(
    ("optim", "more"),
    [
        ("foam_mini", []),
        ("adamw_torch", []),
        ("adamw_8bit", []),
        ("galore_adamw", ["--optim_target_modules", "all-linear", "--optim_args", "rank=4"]),
    ],
)
def test_other_optimizers_run_through_the_same_script(optim, more, flags):
    results = train.main(["--task_name", "cola", *flags, "--optim", optim, "--learning_rate", "1e-4", *more])
    assert results["optim"] == optim and results["optimizer_state_bytes"] > 0
    if optim == "adamw_torch":
        assert results["optimizer_state_bytes"] == results["adamw_state_bytes"]


def test_int8_weights_train_are_saved_and_loaded_again(flags, tmp_path, capsys):
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    results = train.main(["--task_name", "cola", *flags, "--int8_weights", "true", "--bf16", "true"])
    assert results["settings"]["int8_weights"] and results["steps"] == 2
    held = load_file(tmp_path / "out" / "model.safetensors")
    codes = {name for name in held if name.endswith("weight_codes")}
    assert len(codes) == 2 * 6 + 1 and "classifier.weight" in held  # the layers' and the pooler's
    assert "import foam_hf; AutoModelForSequenceClassification.from_pretrained" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.bert.pooler.dense.weight.codes.equal(held["bert.pooler.dense.weight_codes"])
    assert "on INT8 weights" in table.text_table([results])
    again = ["--task_name", "cola", *flags, "--int8_weights", "true", "--optim", "adamw_torch"]
    assert "cannot train INT8 weights" in error_of(again)


def test_tasks_and_seeds_in_one_command_and_again(flags, tmp_path, capsys, monkeypatch):
    command = ["--task_name", "cola,stsb", "--seeds", "1,2", *flags]
    results = train.main(command)
    folders = [f"{task}/seed-{seed}" for task in ("cola", "stsb") for seed in (1, 2)]
    assert [f"{run['task']}/seed-{run['seed']}" for run in results["runs"]] == folders
    for folder, run in zip(folders, results["runs"], strict=True):
        assert json.loads((tmp_path / "out" / folder / "results.json").read_text()) == run
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    losses = [run["train_loss"] for run in results["runs"]]
    assert losses[0] != losses[1], "seeds differ"

    pearson = [100 * run["scores"]["pearson"] for run in results["runs"][2:]]
    expected = f"{sum(pearson) / 2:.2f} ± {statistics.stdev(pearson):.2f}"
    final_table = capsys.readouterr().out.split("\ntask ")[-1]
    assert re.search(rf"stsb .* pearson +{re.escape(expected)} +2 ", final_table)

    # Again: one run's results are lost, so that run alone is made again.
    shutil.rmtree(tmp_path / "out" / "stsb" / "seed-1")
    made = []
    original = train.build_trainer
    monkeypatch.setattr(train, "build_trainer", lambda *words: made.append(words[2]) or original(*words))
    again = train.main([*command, "--resume_from_checkpoint", "true"])
    assert made == ["stsb"]
    assert [run["train_loss"] for run in again["runs"]] == losses
    assert [run["scores"] for run in again["runs"]] == [run["scores"] for run in results["runs"]]

    changed = [*command, "--resume_from_checkpoint", "true", "--learning_rate", "0.5"]
    message = error_of(changed)
    assert "learning_rate" in message and "--output_dir" in message
    assert "true" in error_of([*command, "--resume_from_checkpoint", str(tmp_path)])


def test_an_interrupted_run_goes_on_from_its_newest_checkpoint(flags, tmp_path, capsys, monkeypatch):
    from transformers import TrainerCallback

    command = ["--task_name", "mrpc", *flags, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1"]
    whole = train.main([*command, "--output_dir", str(tmp_path / "whole")])

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    original = train.build_trainer

    def interrupted(*words):
        trainer = original(*words)
        trainer.add_callback(Interrupt())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(train, "build_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.main(command)
    assert not (tmp_path / "out" / "results.json").exists()
    resumed = train.main([*command, "--resume_from_checkpoint", "true"])
    assert resumed["resumed_from"].endswith("checkpoint-3") and "checkpoint-3" in capsys.readouterr().out
    assert resumed["scores"] == whole["scores"]

    from safetensors.torch import load_file

    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "out")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_that_diverged_still_writes_its_results(flags, tmp_path):
    results = train.main(["--task_name", "cola", *flags, "--optim", "adamw_torch", "--learning_rate", "1e30"])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert results["scores"] == {"loss": None, "matthews_correlation": 0.0}


def test_resuming_one_run_in_the_folder_of_many_is_refused(flags):
    train.main(["--task_name", "cola", "--seeds", "1", *flags])
    again = ["--task_name", "cola", *flags, "--resume_from_checkpoint", "true"]
    assert "results.json is not of one run" in error_of(again)


def test_output_folder_that_is_a_file(flags, tmp_path):
    (tmp_path / "out").touch()
    assert "out is a file; expected a folder" in error_of(["--task_name", "cola", *flags])


def test_limits_and_dtype_are_used(flags, tmp_path, capsys):
    from safetensors.torch import load_file

    limits = ["--max_train_samples", "5", "--max_eval_samples", "3", "--max_seq_length", "4", "--dtype", "bfloat16"]
    results = train.main(["--task_name", "mnli", *flags, *limits])
    assert "mnli: 5 train, 3 matched, 3 mismatched examples, cut at 4 tokens" in capsys.readouterr().out
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert results["settings"]["max_train_samples"] == 5


def test_gradient_accumulation_does_not_scale_the_loss(flags):
    accumulated = train.main(["--task_name", "sst2", *flags, "--gradient_accumulation_steps", "4"])
    assert accumulated["train_loss"] == pytest.approx(np.log(2), rel=0.3)  # of a classifier that knows nothing


def test_a_classifier_of_other_labels_needs_the_flag(flags, tmp_path):
    train.main(["--task_name", "mnli", *flags])
    onward = ["--task_name", "rte", *flags, "--model_name_or_path", str(tmp_path / "out")]
    onward += ["--output_dir", str(tmp_path / "rte")]
    assert "--ignore_mismatched_sizes" in error_of(onward)
    assert train.main([*onward, "--ignore_mismatched_sizes"])["steps"] == 2


def test_a_copied_recipe_runs_as_a_script(tmp_path, tiny_model):
    """As a user does: another folder, a process of its own, the real CoLA where this machine has it.

    The model is one that the hub gave earlier; now the hub does not answer.
    """
    cached = tmp_path / "home" / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_model, cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    copy = tmp_path / "somewhere" / "my recipe"
    shutil.copytree(RECIPE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    cola = tmp_path / "cola"
    write_jsonl(cola / "train.jsonl", rows_of("cola", 64))
    write_jsonl(cola / "validation.jsonl", rows_of("cola", 32))
    command = [sys.executable, str(copy / "train.py"), str(copy / "roberta-large.yaml"), "--task_name", "cola"]
    command += ["--model_name_or_path", "someone/tiny", "--dataset_path", str(cola), "--output_dir", "out dir"]
    command += ["--max_steps", "20", "--eval_strategy", "no", "--max_eval_samples", "64"]
    search_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": search_path, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GLUE cola | model ")
    assert done.stderr.count("FOAM: folded (level 8, scale 6,") == 1
    assert re.search(r"^cola  foam .* matthews_correlation", done.stdout, re.MULTILINE)
    assert f"To compare runs of several optimizers: python {copy / 'table.py'}" in done.stdout
    assert json.loads((tmp_path / "out dir" / "results.json").read_text())["steps"] == 20
    assert (tmp_path / "out dir" / "checkpoint-20" / "optimizer.pt").is_file()


# ---- tables, README, the launcher ----


def fake_run(task: str, optim: str, seed: int, score: float, rate: float = 1e-4) -> dict:
    spec = data.TASKS[task]
    return {
        "task": task,
        "seed": seed,
        "model": "/models/tiny",
        "optim": optim,
        "optim_args": "level=8" if optim == "foam" else None,
        "learning_rate": rate,
        "main_score": score,
        "scores": {**dict.fromkeys(spec.metrics, score), "loss": 1.0},
        "untrained": None,
        "optimizer_state_bytes": 1_500_000 if optim == "foam" else 9_000_000,
        "adamw_state_bytes": 9_000_000,
        "seconds": {"train": 10.0, "eval": 1.0},
        "versions": {"device": "a GPU"},
    }


def test_the_markdown_table_and_its_place_in_a_readme(tmp_path, capsys):
    runs = [fake_run("cola", optim, seed, 0.5 + seed / 100) for optim in ("adamw_torch", "foam") for seed in (1, 2, 3)]
    runs += [fake_run("mrpc", "foam", 1, 0.8, 2e-4)]
    write_json(tmp_path / "many.json", {"runs": runs[:-1], "search": [fake_run("rte", "foam", 1, 0.1)]})
    write_json(tmp_path / "one.json", runs[-1])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    table.main([str(tmp_path / "many.json"), str(tmp_path / "one.json"), "--readme", str(readme)])
    lines = readme.read_text().split("\n")
    assert lines[:2] == ["before", table.START] and lines[-3:] == [table.END, "after", ""]
    assert lines[2] == "tiny, 1 to 3 seeds, on a GPU; mean ± standard deviation, in percent:"
    assert lines[4:10] == [
        "| task | metric | adamw_torch | foam (level=8) |",
        "| --- | --- | --- | --- |",
        "| cola | matthews_correlation | 52.00 ± 1.00 (lr 0.0001) | 52.00 ± 1.00 (lr 0.0001) |",
        "| mrpc | f1 | - | 80.00 (lr 0.0002) |",
        "| mrpc | accuracy | - | 80.00 (lr 0.0002) |",
        "|  | optimizer state | 9.00 MB | 1.50 MB |",
    ]
    runs = [
        fake_run(task, "foam", seed, seed / 10 + (task == "rte") / 50) for task in ("cola", "rte") for seed in (1, 2)
    ]
    assert "| average | of main scores | 16.00 ± 7.07 |" in table.markdown_table(runs)
    assert "average" not in table.markdown_table(runs[:-1])
    other = [{**run, "optim": "adamw_torch", "optim_args": None} for run in runs]
    assert "| average | of main scores | - | 16.00 ± 7.07 |" in table.markdown_table([*runs[:-1], *other])
    with pytest.raises(SystemExit, match="README with markers"):
        readme.write_text("no markers")
        table.main([str(tmp_path / "one.json"), "--readme", str(readme)])


def test_the_readmes_table_is_what_the_committed_results_give():
    readme = (RECIPE / "README.md").read_text(encoding="utf-8")
    runs = table.read_runs(sorted((RECIPE / "results").glob("*.json")))
    assert put_between(readme, table.START, table.END, table.markdown_table(runs)) == readme


def test_the_readmes_commands_are_accepted(tmp_path):
    pages = RECIPE / "README.md", ROOT / "recipes" / "benchmarks" / "quality" / "continued.md"
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    commands = [
        shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.split("\n")
    ]
    seen = 0
    for words in commands:
        if words[:2] == ["python", "recipes/glue/train.py"]:
            argv = [str(ROOT / word) if word.endswith(".yaml") else word for word in words[2:]]
            if "--bf16" in argv:
                argv += ["--use_cpu", "true"]
            recipe, training, *_ = arguments.parse([*argv, "--output_dir", str(tmp_path)])
            arguments.build_training_arguments(training, tmp_path, 1)
            seen += 1
        elif words[:3] == ["python", "-m", "recipes.benchmarks.quality.glue_gpu"]:
            options, rest = glue_gpu.parse(words[3:])
            assert rest == ["--bf16", "true"]
            foam = foam_options("foam", options.optimizer[1][2])  # of version 0.1.0, as the table
            assert (foam["scale"], foam["fold_embeddings"], foam["fold_head"]) == (0.25, False, False)
            seen += 1
    assert seen >= 9


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """The launcher with a stand-in for train.py, whose score is best at lr 2e-5; lr 1e-4 fails."""
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "train.py").write_text(
        "import json, sys\n"
        "values = dict(zip((word[2:] for word in sys.argv[2::2]), sys.argv[3::2]))\n"
        "if values['learning_rate'] == '1e-4': sys.exit('too fast')\n"
        "score = {'2e-5': 0.9, '5e-5': 0.8}[values['learning_rate']]\n"
        "run = {'main_score': score, 'seed': int(values['seed']), 'task': values['task_name'], 'settings': values}\n"
        "open(values['output_dir'] + '/model.safetensors', 'w').write('x')\n"
        "json.dump(run, open(values['output_dir'] + '/results.json', 'w'))\n"
    )
    monkeypatch.setattr(glue_gpu, "GLUE", recipe)
    command = ["--data", "d", "--model", "m", "--label", "M", "--out", str(tmp_path / "out"), "--tasks", "cola,sst2"]
    command += ["--optimizer", "adamw_torch", "2e-5,5e-5,1e-4", "--optimizer", "foam", "5e-5,2e-5", "level=8"]
    return [*command, "--jobs", "2", "--search-train-samples", "sst2=9", "--bf16", "true"]


def test_the_launcher_searches_then_reports_and_goes_on(grid, tmp_path):
    nothing = glue_gpu.main([*grid, "--budget-s", "0"])
    assert nothing["runs"] == nothing["search"] == [] and nothing["unfinished"] == 10
    content = glue_gpu.main(grid)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == content
    assert (len(content["search"]), len(content["runs"]), content["unfinished"]) == (8, 12, 0)
    assert sorted((run["task"], run["settings"]["optim"], run["seed"]) for run in content["runs"]) == [
        (task, optim, seed) for task in ("cola", "sst2") for optim in ("adamw_torch", "foam") for seed in (1, 2, 3)
    ]
    assert {run["settings"]["learning_rate"] for run in content["runs"]} == {"2e-5"}
    assert {run["seed"] for run in content["search"]} == {100}
    assert {chosen["learning_rate"] for chosen in content["chosen"]} == {"2e-5"} and len(content["chosen"]) == 4
    assert len(content["failed"]) == 2 and "too fast" in content["failed"][0]["log"]
    for run in content["search"] + content["runs"]:
        assert run["model"] == "M" and run["settings"]["bf16"] == "true"
        assert "dataset_path" not in run["settings"]
        limited = run["task"] == "sst2" and run in content["search"]
        assert run["settings"].get("max_train_samples") == ("9" if limited else None)
    assert not list((tmp_path / "out").rglob("*.safetensors"))

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*/results.json")}
    again = glue_gpu.main(grid)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*/results.json")}
    assert again["runs"] and len(again["runs"]) == 12


def test_the_launcher_compares_int8_weights_with_others(grid, tmp_path):
    optimizers = ["--optimizer", "foam", "2e-5", "level=8", "--optimizer", "foam", "2e-5", "level=8", "int8"]
    start, end = grid.index("--optimizer"), grid.index("--jobs")
    content = glue_gpu.main([*grid[:start], *optimizers, *grid[end:], "--seeds", "1", "--tasks", "cola"])
    assert sorted(run["settings"].get("int8_weights", "") for run in content["runs"]) == ["", "true"]
    assert {tuple(chosen["of"]) for chosen in content["chosen"]} == {
        ("cola", "foam", "level=8"),
        ("cola", "foam", "level=8", "int8"),
    }


def test_the_launcher_refuses_unknown_tasks(grid, capsys):
    with pytest.raises(SystemExit):
        glue_gpu.main([*grid, "--tasks", "colla"])
    assert "unknown task colla" in capsys.readouterr().err


def test_texts_are_cut_at_the_models_positions_where_its_tokenizer_knows_no_limit(tiny_model: Path, flags, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    glue = flags[flags.index("--dataset_path") + 1]
    long = tmp_path / "glue"
    shutil.copytree(Path(glue) / "cola", long / "cola")
    row = json.loads((long / "cola" / "train.jsonl").read_text().splitlines()[0])
    row["sentence"] = " ".join([row["sentence"]] * 100)
    with open(long / "cola" / "train.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    places = {"--model_name_or_path": str(folder), "--dataset_path": str(long)}
    words = [places.get(before, word) for before, word in zip(["", *flags], flags, strict=False)]
    assert train.main([*words, "--task_name", "cola"])["steps"] == 2
    roberta = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert (train.positions(roberta), train.positions(BertConfig())) == (512, 512)
    assert train.positions(XLNetConfig()) == math.inf


# ---- what stands in a file ----


def test_a_long_text_and_a_carriage_return_stay_one_text(tmp_path):
    text = "word " * 40_000 + "a\rb"
    files = {
        "tsv": f"sentence\tlabel\r\n{text}\t1\r\nshort\t0\r\n",
        "csv": f'sentence,label\r\n"{text}",1\r\nshort,0\r\n',
        "jsonl": json.dumps({"sentence": text, "label": 1}) + "\n" + json.dumps({"sentence": "short", "label": 0}),
    }
    for kind, content in files.items():
        (tmp_path / f"train.{kind}").write_bytes(content.encode())
        rows = list(data.read_rows(tmp_path / f"train.{kind}", "sst2"))
        assert [(row["sentence"], str(row["label"])) for row in rows] == [(text, "1"), ("short", "0")], kind
    (tmp_path / "train.csv").write_bytes(b"label,sentence\n1,This is\rcut\n")
    with pytest.raises(SystemExit, match="train.csv, line 2: not CSV .*carriage return in it needs quotes"):
        list(data.read_rows(tmp_path / "train.csv", "sst2"))
    (tmp_path / "train.csv").write_bytes(b"label,sentence\n1,a, b\n")
    with pytest.raises(SystemExit, match="train.csv, line 2: 3 cells, and the header has 2"):
        list(data.read_rows(tmp_path / "train.csv", "sst2"))


def test_colas_own_file_keeps_a_carriage_return_and_the_label(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"gj04\t1\t\tThis is\rone\n\ngj04\t0\t*\tTwo\n")
    rows = list(data.read_rows(tmp_path / "train.tsv", "cola"))
    assert rows == [{"label": "1", "sentence": "This is\rone"}, {"label": "0", "sentence": "Two"}]


@pytest.mark.parametrize("label", ["1.0", 1.0, " 1", "acceptable"])
def test_labels_as_other_programs_write_them(label):
    assert data._label(label, data.TASKS["cola"], "here") == 1
    with pytest.raises(SystemExit, match="label '1.5'; expected 0 "):
        data._label("1.5", data.TASKS["cola"], "here")


def test_blank_lines_before_a_json_list(tmp_path):
    (tmp_path / "train.json").write_text('\n  \n[{"sentence": "a", "label": 1}]\n')
    assert list(data.read_rows(tmp_path / "train.json", "cola")) == [{"sentence": "a", "label": 1}]


def test_predictions_of_one_class_are_noted(capsys):
    metrics.score("cola", np.array([[0.0, 1.0]] * 4), np.array([0, 1, 0, 1]))
    assert "cola: the model predicts the class acceptable for all 4 rows" in capsys.readouterr().out
    assert "acceptable" in metrics.last_note()
    metrics.score("cola", np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0, 1]))
    assert capsys.readouterr().out == "" and metrics.last_note() == ""


def test_what_a_second_run_in_a_folder_replaces_is_said_and_kept(flags, tmp_path, capsys):
    folder = tmp_path / "out"
    steps = ["--save_strategy", "steps", "--save_steps", "1"]
    first = train.main([*flags, "--task_name", "rte", *steps, "--output_dir", str(folder)])
    capsys.readouterr()
    train.main([*flags, "--task_name", "rte", *steps, "--output_dir", str(folder), "--learning_rate", "3e-4"])
    said = capsys.readouterr().out
    assert "its results.json is now results-1.json" in said
    assert "the newest of step 2: this one starts at step 0; --resume_from_checkpoint true goes on" in said
    assert json.loads((folder / "results-1.json").read_text()) == json.loads(json.dumps(first))
    table.main([str(folder), str(folder / "results-1.json")])
    assert "(lr 0.0003)" in capsys.readouterr().out


def test_a_resumed_run_says_which_settings_are_the_checkpoints(flags, tmp_path, capsys):
    folder = tmp_path / "out"
    steps = ["--save_strategy", "steps", "--save_steps", "1", "--output_dir", str(folder)]
    train.main([*flags, "--task_name", "rte", *steps, "--optim_args", "level=8,scale=0.25"])
    again = ["--optim_args", "level=8,scale=2", "--learning_rate", "3e-4", "--max_steps", "3"]
    train.main(
        [*flags, "--task_name", "rte", *steps, *again, "--resume_from_checkpoint", str(folder / "checkpoint-2")]
    )
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("Resumed at step 2"))
    assert "scale=0.25 (not 2.0)" in line and "(not 0.0003)" in line


def test_a_run_that_folds_other_weights_than_its_checkpoint_is_told_the_option(flags, tmp_path):
    folder = tmp_path / "out"
    words = [*flags, "--task_name", "rte", "--save_strategy", "steps", "--save_steps", "1"]
    words += ["--output_dir", str(folder)]
    train.main([*words, "--optim_args", "fold_embeddings=false"])
    resume = ["--max_steps", "3", "--resume_from_checkpoint", str(folder / "checkpoint-2"), "--optim_args"]
    with pytest.raises((ValueError, SystemExit), match="optim_args='fold_embeddings=false'"):
        train.main([*words, *resume, "level=8"])
    assert train.main([*words, *resume, "fold_embeddings=false"])["steps"] == 3


def test_optim_args_that_drop_the_configs_are_said(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("optim: foam\noptim_args: level=8,gradient_release=true\n")
    notes = arguments.parse([str(config), "--task_name", "cola", "--output_dir", "x", "--optim_args", "level=2"])[3]
    assert notes == [
        "--optim_args level=2 replaces all optim_args of mine.yaml: without gradient_release=true from now on."
    ]


def test_a_config_is_found_beside_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arguments.parse(["roberta-large.yaml", "--task_name", "cola", "--output_dir", "x"])[2].name == (
        "roberta-large.yaml"
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--dataset", "x"], "nearest: --dataset_path"),
        (["--optim", "FOAM"], "did you mean 'foam'?"),
        (["--optim", "Foam-Mini"], "did you mean 'foam_mini'?"),
    ],
)
def test_hints_lead_to_what_was_meant(wrong, words):
    with pytest.raises(SystemExit) as caught:
        arguments.parse(["--task_name", "cola", "--output_dir", "x", *wrong])
    assert words in caught.value.code
