"""The pretraining recipe: its data and their order, whole runs on tiny models, resuming, and what it refuses."""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from foam_hf import recipe_kit
from foam_hf.planner.model_configs import BUILTIN
from tests.support.pretrain_runs import QUICK, RECIPE, ROOT, SHAPES, TINY, VOCAB, load_script, text, write_jsonl
from tests.support.recipe_errors import exit_message
from tests.support.tolerances import assert_within

pytestmark = pytest.mark.long

train = load_script()

import debian_text  # noqa: E402
import pretrain_arguments  # noqa: E402
import pretrain_data  # noqa: E402
import pretrain_stream  # noqa: E402
import pretrain_tokens  # noqa: E402

CONFIGS = sorted(RECIPE.glob("*.yaml"))
TEXTS = [text(number) for number in range(80)] + [text(3), text(4)]  # two of them twice


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", TEXTS[:50])
    write_jsonl(folder / "b" / "c.jsonl", TEXTS[50:])
    return folder


@pytest.fixture(scope="module")
def tokens(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --prepare_only makes of the corpus, with a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    where = f"--prepare_only true --dataset_path {corpus} --tokens_path {folder} --tokenizer train --eval_share 0.2"
    train.main([*where.split(), *QUICK.split()])
    return folder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch):
    """Offline for every test that does not say otherwise, whatever network the machine has."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe_kit.hub_problem.cache_clear()
    yield
    recipe_kit.hub_problem.cache_clear()


@pytest.fixture
def hub(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Path]]:
    """A hub with one data set, streamed as from the hub: three files to train on, and a validation split."""
    import datasets

    load = datasets.load_dataset
    parts = corpus.parent / "hub"
    files = {"train": [write_jsonl(parts / f"{i}.jsonl", TEXTS[i:60:3]) for i in range(3)]}
    files["validation"] = [write_jsonl(parts / "v.jsonl", [*TEXTS[60:80], TEXTS[7]])]  # the last is also trained on

    def load_dataset(name: str, config: str | None, split: str, streaming: bool):
        assert (name, config, streaming) == ("allenai/c4", "en", True)
        if split not in files:
            raise ValueError(f"Bad split: {split}")
        return load("json", data_files={split: [str(f) for f in files[split]]}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(pretrain_tokens, "hub_problem", lambda: None)
    return files


def run(tmp_path: Path, data: Path | None, *more: str, out: str = "out") -> dict[str, Any]:
    where = ["--dataset_path", str(data)] if data else []
    return train.main([*where, "--output_dir", str(tmp_path / out), *QUICK.split(), *more])


error_of = functools.partial(exit_message, train.main)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- the data ----


def in_tokens(folder: Path, split: str) -> list[str]:
    """The documents of a file of tokens, as text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = np.fromfile(folder / f"{split}.bin", json.loads((folder / "tokens.json").read_text())["dtype"]).tolist()
    assert ids[-1] == tokenizer.eos_token_id
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *ends], ends, strict=False)]


def test_every_document_is_in_the_tokens_once_and_none_is_on_both_sides(tokens: Path) -> None:
    trained, held_out = in_tokens(tokens, "train"), in_tokens(tokens, "held_out")
    assert sorted([*trained, *held_out]) == sorted(TEXTS)
    assert not set(trained) & set(held_out)  # the copies neither
    assert 5 <= len(held_out) <= 30  # about a fifth
    counts = json.loads((tokens / "tokens.json").read_text())["counts"]
    assert counts["train"]["documents"] == len(trained) and counts["held_out"]["documents"] == len(held_out)
    assert counts["train"]["characters"] == sum(map(len, trained))


@pytest.mark.parametrize("length", [5, 16, 1000])
def test_sequences_are_the_tokens_in_order_and_only_the_last_ones_are_dropped(tokens: Path, length: int) -> None:
    stored = np.fromfile(tokens / "train.bin", np.uint16)
    found = pretrain_data.PackedTokens(tokens / "train.bin", "uint16", length)
    assert len(found) == len(stored) // length
    joined = [token for item in found for token in item["input_ids"].tolist()]
    assert joined == stored[: len(found) * length].tolist()
    item = found[0]
    assert item["input_ids"].dtype == torch.int64 and torch.equal(item["labels"], item["input_ids"])


def test_a_limit_spreads_the_sequences_over_the_file(tokens: Path) -> None:
    everything = pretrain_data.PackedTokens(tokens / "train.bin", "uint16", 8)
    few = pretrain_data.PackedTokens(tokens / "train.bin", "uint16", 8, limit=4)
    assert len(few) == 4
    expected = [everything[i * len(everything) // 4]["input_ids"].tolist() for i in range(4)]
    assert [item["input_ids"].tolist() for item in few] == expected


@pytest.mark.parametrize("kind", ["txt", "one txt", "jsonl.gz", "parquet"])
def test_documents_come_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    import gzip

    texts, column = TEXTS[:5], "text"
    path = tmp_path / "data"
    path.mkdir()
    if kind == "txt":
        for i, document in enumerate(texts):
            (path / f"{i}.txt").write_text(document + "\n\nand on.")
        texts = [document + "\n\nand on." for document in texts]
    elif kind == "one txt":
        path = path / "all.txt"
        path.write_text("\n\n".join(texts))
    elif kind == "jsonl.gz":
        column = "body"
        plain = write_jsonl(tmp_path / "plain.jsonl", [*texts[:2], "  ", *texts[2:]], column)
        (path / "x.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": list(range(5))}), path / "x.parquet")
    assert list(pretrain_data.local_documents(path, column)) == texts


def test_a_trained_tokenizer_gives_every_text_back(tokens: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokens)
    assert 257 < len(tokenizer) <= VOCAB
    odd = "  Two  spaces, a\ttab,\n\n\nlines , don't 'quote' . Ünïcode 東京 🙂 \u200b \r\n end "
    for document in [odd, *TEXTS[:3]]:
        assert tokenizer.decode(tokenizer(document, add_special_tokens=False)["input_ids"]) == document
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0])


def test_without_a_hub_the_tokenizer_is_trained_on_the_data_and_the_user_is_told(capsys) -> None:
    tokenizer = pretrain_tokens.get_tokenizer("google-t5/t5-base", VOCAB, lambda: TEXTS)
    assert "No tokenizer google-t5/t5-base (offline mode" in capsys.readouterr().out
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"]) == TEXTS[0]


class Source:
    """A stream of documents that counts what was read."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.at = texts, 0

    def state(self) -> dict:
        return {"at": self.at}

    def restore(self, state: dict) -> None:
        self.at = state["at"]

    def __iter__(self):
        while self.at < len(self.texts):
            self.at += 1
            yield self.texts[self.at - 1]


def letters(texts: list[str]) -> np.ndarray:
    """A token for each letter, and 0 at the end of each text."""
    return np.array([token for text in texts for token in [*map(ord, text), 0]], dtype=np.uint16)


@pytest.mark.parametrize("length", [7, 40, 30000])  # within a document, about one, longer than a chunk
def test_a_stream_loses_and_doubles_no_token_and_goes_on_from_every_step(length: int) -> None:
    texts = [text(number) for number in range(500)]
    banned = {texts[5], texts[400]}
    expected = letters([text for text in texts if text not in banned])
    expected = np.concatenate([expected] * (1 + 6 * length // len(expected)))  # it starts again at its end

    def stream() -> pretrain_stream.PackedStream:
        encode: Any = letters
        encode.dtype = np.dtype(np.uint16)
        return pretrain_stream.PackedStream(
            lambda: Source(texts), encode, length, every=2, keep=lambda text: text not in banned
        )

    def take(stream: pretrain_stream.PackedStream, count: int) -> list[list[int]]:
        return [item["input_ids"].tolist() for item, _ in zip(stream, range(count), strict=False)]

    first = stream()
    found = take(first, 6)
    assert [token for piece in found for token in piece] == expected[: 6 * length].tolist()
    for steps in (0, 1, 2):
        read_ahead = stream()
        take(read_ahead, 5)
        position = json.loads(json.dumps(read_ahead.position(2 * steps)))  # as a checkpoint holds it
        again = stream()
        again.go_on(2 * steps, position)
        assert take(again, 6 - 2 * steps) == found[2 * steps :]
        assert again.position(4) is not None


def test_processes_share_a_stream_without_gaps(hub) -> None:
    shares = [
        list(pretrain_stream.HubStream("allenai/c4", "en", "train", "text", rank=rank, world=2)) for rank in (0, 1)
    ]
    assert sorted([*shares[0], *shares[1]]) == sorted(TEXTS[:60])
    assert min(map(len, shares)) > 10


# ---- whole runs ----


def config_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_and_the_papers_settings_have_files_of_their_own(
    config: Path, tokens: Path, tmp_path: Path
) -> None:
    settings, paper = config_of(config), config.stem.endswith("-paper")
    assert settings["model"] in BUILTIN and settings["model"] == config.stem.removesuffix("-paper")
    expected = {
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_ratio": 0.1,
        "sequence_length": 256,
        "total_batch_size": 512,
        "dtype": "bfloat16",
    }
    if paper:
        expected |= {"optim": "foam", "learning_rate": 1e-2}
        expected["optim_args"] = "level=2,scale=0.25,fold_embeddings=false,fold_head=false"
        ours = config_of(config.with_name(f"{settings['model']}.yaml"))
        assert {name for name in settings if settings[name] != ours[name]} <= {"optim", "optim_args", "learning_rate"}
    else:
        expected |= {"optim": "foam_muon", "optim_args": "level=8,scale=1.0"}
        assert config.with_name(f"{config.stem}-paper.yaml") in CONFIGS
        # The rate of the study's 512-wide model, inversely with the width.
        assert settings["learning_rate"] == pytest.approx(1e-2 * 512 / BUILTIN[config.stem]["hidden_size"], rel=0.03)
    assert {name: settings[name] for name in expected} == expected
    quick = QUICK.split()
    results = train.main([str(config), "--dataset_path", str(tokens), "--output_dir", str(tmp_path / "out"), *quick])
    assert results["steps"] == 2 and results["tokens"] == 2 * 4 * 16
    assert math.isfinite(results["eval_loss"])
    assert {weight.dtype for weight in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_compiled_layers_share_a_graph_and_leave_names_and_losses(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph for each layer, and the compiler gives up beyond eight of them."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_layers = train.compile_layers
    monkeypatch.setattr(train, "compile_layers", lambda model: compile_layers(model, backend))
    deep = ["--config_overrides", TINY.replace("num_hidden_layers=1", "num_hidden_layers=3"), "--dtype", "float32"]
    plain = run(tmp_path / "plain", tokens, *deep)
    assert not graphs
    compiled = run(tmp_path / "compiled", tokens, *deep, "--compile_layers", "true")
    assert len(graphs) == 4  # a layer and the loss, of training and of evaluation
    assert compiled["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert weights(tmp_path / "compiled" / "out").keys() == weights(tmp_path / "plain" / "out").keys()


@pytest.fixture(scope="module")
def finished(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Twelve steps in bf16 with evaluations and checkpoints every six."""
    folder = tmp_path_factory.mktemp("run")
    every = "--max_steps 12 --eval_strategy steps --eval_steps 6 --save_strategy steps --save_steps 6 --seed 5"
    return folder, run(folder, tokens, *every.split())


def test_perplexity_is_that_of_the_held_out_tokens_at_every_interval(finished, tokens: Path) -> None:
    folder, results = finished
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [6, 12]
    for entry, point in zip(logged, results["curve"], strict=True):
        assert entry["eval_perplexity"] == math.exp(entry["eval_loss"])
        assert point == {"step": entry["step"], "tokens": entry["step"] * 64, "eval_loss": entry["eval_loss"]}
    assert results["perplexity"] == math.exp(results["eval_loss"]) == logged[-1]["eval_perplexity"]
    assert results["curve"][1]["eval_loss"] < results["curve"][0]["eval_loss"] < math.log(VOCAB) + 0.5

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.bfloat16).eval()
    held_out = pretrain_data.PackedTokens(tokens / "held_out.bin", "uint16", 16, 8)
    ids = torch.stack([item["input_ids"] for item in held_out])
    with torch.no_grad():
        logits = model(ids).logits.float()
    # Not in batches of four, as the run had them: bf16 matrices may round otherwise.
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_within(loss, torch.tensor(results["eval_loss"]), "evaluation against one batch, bfloat16 weights")


def test_results_say_what_the_run_was_and_what_its_state_costs(finished) -> None:
    folder, results = finished
    assert json.loads((folder / "out" / "results.json").read_text()) == results
    assert (results["optim"], results["optim_args"], results["seed"]) == ("foam_muon", "level=8,scale=1.0", 5)
    # 4 matrices of 32 x 32, two of 48 x 32, one of 32 x 48: a row is one block, with one fp32 momentum.
    assert results["layers_state_bytes"] == 4 * (4 * 32 + 2 * 48 + 32)
    tables = 2 * (VOCAB + VOCAB + 32)  # embedding and head: a moment a row, means of rows and columns
    assert results["optimizer_state_bytes"] == results["layers_state_bytes"] + 4 * tables + 8 * 3 * 32  # and norms
    assert results["data"]["train"]["documents"] > 0 and results["tokens_per_second"] > 0


def test_the_schedule_warms_up_for_a_tenth_and_ends_at_a_tenth_of_the_peak(finished) -> None:
    folder, _ = finished
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert len(rates) == 12 and rates[:3] == pytest.approx([0, 5e-3, 1e-2])  # a tenth of 12 steps, rounded up
    assert rates[2:] == sorted(rates[2:], reverse=True)
    after = torch.load(folder / "out" / "checkpoint-12" / "scheduler.pt", weights_only=True)["_last_lr"]
    assert after == pytest.approx([1e-3] * len(after))


def resume(tmp_path: Path, checkpoint: Path, data: Path | None, *more: str) -> dict[str, Any]:
    return run(tmp_path, data, "--resume_from_checkpoint", str(checkpoint), *more, out="resumed")


def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(finished, tokens: Path, tmp_path: Path) -> None:
    folder, results = finished
    more = ["--max_steps", "12", "--seed", "5", "--eval_strategy", "steps", "--eval_steps", "6"]
    again = resume(tmp_path, folder / "out" / "checkpoint-6", tokens, *more)
    assert_equal_weights(folder / "out", tmp_path / "resumed")
    assert again["eval_loss"] == results["eval_loss"] and again["curve"] == results["curve"]


def test_a_checkpoint_of_other_data_or_settings_is_refused(finished, tokens: Path, tmp_path: Path) -> None:
    folder, _ = finished
    words = ["--dataset_path", str(tokens), "--output_dir", str(tmp_path / "x"), *QUICK.split(), "--max_steps", "12"]
    words += ["--resume_from_checkpoint", str(folder / "out" / "checkpoint-6")]
    assert "another seed: 5; this run has 6" in error_of([*words, "--seed", "6"])
    assert "another total_batch_size: 4; this run has 8" in error_of(
        [*words, "--seed", "5", "--total_batch_size", "8"]
    )
    assert "another sequence_length" in error_of([*words, "--seed", "5", "--sequence_length", "8"])
    assert "no folder nowhere" in error_of([*words, "--resume_from_checkpoint", "nowhere"])


def test_a_streamed_run_resumes_with_the_bits_of_the_uninterrupted_one(hub, tmp_path: Path, capsys) -> None:
    steps = ["--max_steps", "8", "--save_strategy", "steps", "--save_steps", "4", "--tokenizer", "train"]
    results = run(tmp_path, None, *steps)
    said = capsys.readouterr().out
    assert "held_out: 5 documents" in said and "of the validation split" in said
    assert results["data"]["streamed"] and results["data"]["tokenizer"].startswith("trained")
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert json.loads((checkpoint / "pretrain-0.json").read_text())["position"]["state"]
    again = resume(
        tmp_path, checkpoint, None, *steps[:2], *steps[6:], "--tokens_path", str(tmp_path / "out" / "tokens")
    )
    assert_equal_weights(tmp_path / "out", tmp_path / "resumed")
    assert again["eval_loss"] == results["eval_loss"]
    words = ["--output_dir", str(tmp_path / "out"), *QUICK.split(), "--tokenizer", "train"]
    assert "--max_steps" in error_of([*words, "--max_steps", "-1"])
    assert "--dataloader_num_workers" in error_of([*words, "--dataloader_num_workers", "2"])
    assert "made with another vocab_size" in error_of(
        [*words, "--config_overrides", TINY.replace(f"vocab_size={VOCAB}", "vocab_size=299")]
    )


def test_without_a_validation_split_the_first_documents_are_held_out_and_never_trained_on(hub, tmp_path: Path) -> None:
    del hub["validation"]
    recipe = pretrain_arguments.PretrainArguments(
        tokenizer="train", sequence_length=16, eval_tokens=64, tokens_path=str(tmp_path / "tokens")
    )
    data = pretrain_tokens.prepare(recipe, VOCAB, every=1)
    held_out = in_tokens(tmp_path / "tokens", "held_out")
    assert held_out == TEXTS[0:60:3][: len(held_out)]
    seen = data.tokenizer.decode(
        [t for item, _ in zip(data.train, range(400), strict=False) for t in item["input_ids"]]
    )
    assert not [document for document in held_out if document in seen]
    assert all(document in seen for document in TEXTS[:60] if document not in held_out)


@pytest.mark.parametrize("optim", ["muon", "adam_mini"])
def test_optimizers_without_a_name_in_trainer_train_and_resume(optim: str, tokens: Path, tmp_path: Path) -> None:
    words = f"--optim {optim} --learning_rate 0.01 --dtype float32 --weight_decay 0.1 --max_steps 6".split()
    if optim == "muon" and not hasattr(torch.optim, "Muon"):
        assert "torch.optim.Muon" in error_of(
            ["--dataset_path", str(tokens), "--output_dir", str(tmp_path / "out"), *QUICK.split(), *words]
        )
        return
    results = run(tmp_path, tokens, *words, "--save_strategy", "steps", "--save_steps", "3")
    matrices = 4 * 32 * 32 + 3 * 48 * 32
    blocks = 0 if optim == "muon" else 2 * 2 + 2 * 32 + 2 * 48 + 32  # heads of query and key; rows of the others
    assert results["layers_state_bytes"] == 4 * (matrices + blocks)
    assert results["optim"] == optim and results["curve"][-1]["eval_loss"] < math.log(VOCAB) + 0.5
    resume(tmp_path, tmp_path / "out" / "checkpoint-3", tokens, *words)
    assert_equal_weights(tmp_path / "out", tmp_path / "resumed")


def test_projected_optimizers_leave_embedding_and_head_alone(tokens: Path, tmp_path: Path, capsys) -> None:
    results = run(tmp_path, tokens, "--optim", "galore_adamw", "--optim_args", "rank=4", "--dtype", "float32")
    assert "galore_adamw projects what" in capsys.readouterr().out
    plain = 2 * VOCAB * 32 + 3 * 32
    assert results["optimizer_state_bytes"] - results["layers_state_bytes"] == plain * 8
    assert results["layers_state_bytes"] < results["adamw_state_bytes"] - plain * 8


@pytest.mark.parametrize(("size", "processes", "times"), [(2, 1, 4), (8, 1, 1), (2, 4, 1), (1, 2, 4)])
def test_the_global_batch_is_kept_by_accumulation(size, processes, times, tmp_path: Path, monkeypatch) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: processes))
    words = ["--output_dir", str(tmp_path), "--total_batch_size", "8", "--use_cpu", "true"]
    recipe, training, optim, _ = pretrain_arguments.parse([*words, "--per_device_train_batch_size", str(size)])
    args = pretrain_arguments.build_training_arguments(recipe, training, optim)
    assert args.gradient_accumulation_steps == times
    recipe.total_batch_size = 9
    if size * processes > 1 and 9 % (size * processes):
        with pytest.raises(SystemExit, match=f"--total_batch_size: 9 is no multiple of {size * processes}"):
            pretrain_arguments.build_training_arguments(recipe, training, optim)


def test_long_sequences_get_their_positions(tmp_path: Path) -> None:
    for length, positions in ((4096, 4096), (1024, 1024), (256, 1024)):
        recipe, *_ = pretrain_arguments.parse(["--output_dir", str(tmp_path), "--sequence_length", str(length)])
        assert train.model_config(recipe).max_position_embeddings == positions


# ---- what is refused ----

REFUSED = {
    "no folder": ("--dataset_path nowhere", "no file or folder nowhere; expected a .txt"),
    "an empty folder": ("--dataset_path EMPTY", "does not hold, .txt, .jsonl"),
    "another column": (
        "--dataset_path CORPUS --text_column body",
        "no column 'body'; expected --text_column to be one",
    ),
    "no hub for the data": ("", "allenai/c4 cannot be streamed: offline mode is set"),
    "no hub names the way out": ("", "give text of your own by --dataset_path (a .txt, .jsonl or .parquet file"),
    "too little held out": ("--dataset_path CORPUS --tokenizer train --sequence_length 9000", "larger --eval_share"),
    "too little text": ("--dataset_path TOKENS --total_batch_size 4096", "fewer than a step's 4096"),
    "a vocabulary too small": ("--dataset_path TOKENS --config_overrides vocab_size=280", "vocabulary of 300"),
    "no byte-level vocabulary": ("--dataset_path CORPUS --tokenizer train --config_overrides vocab_size=99", "257"),
    "no such tokenizer": ("--dataset_path CORPUS --tokenizer ./nowhere", "no folder ./nowhere"),
    "an unknown flag": ("--dataset_path CORPUS --sequence_lenght 9", "nearest: --sequence_length"),
    "accumulation by hand": ("--gradient_accumulation_steps 3", "computes it from --total_batch_size"),
    "an unknown optimizer": ("--dataset_path CORPUS --optim nonsense", "muon, adam_mini"),
    "a misspelt optimizer": ("--dataset_path CORPUS --optim FOAM", "did you mean 'foam'?"),
    "options of another": ("--dataset_path TOKENS --optim adam_mini --optim_args level=2", "adam_mini has none"),
    "an unknown FOAM option": ("--dataset_path TOKENS --optim foam --optim_args levle=2", "Did you mean 'level'"),
    "an unknown model": ("--dataset_path TOKENS --model llama-61m", "or a built-in name: llama-60m"),
    "an unknown override": ("--dataset_path TOKENS --config_overrides hiden_size=2", "hidden_size"),
    "an override's type": ("--dataset_path TOKENS --config_overrides hidden_size=big", "hidden_size is now"),
    "a share": ("--dataset_path TOKENS --eval_share 1.5", "--eval_share: got 1.5"),
    "a dtype": ("--dataset_path TOKENS --dtype float16", "--dtype: got float16"),
    "two data sets": ("--dataset_path TOKENS --dataset_name x", "got both dataset_path and dataset_name"),
    "preparing a stream": ("--prepare_only true", "--prepare_only needs --dataset_path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(case: str, corpus: Path, tokens: Path, tmp_path: Path) -> None:
    flags, expected = REFUSED[case]
    (tmp_path / "empty").mkdir()
    for name, path in (("CORPUS", corpus), ("TOKENS", tokens), ("EMPTY", tmp_path / "empty")):
        flags = flags.replace(name, str(path))
    quick = QUICK
    if "--config_overrides" in flags and "vocab_size" in flags:
        flags += f",{SHAPES}"
    assert expected in error_of(["--output_dir", str(tmp_path / "out"), *quick.split(), *flags.split()])


def test_an_unknown_key_of_a_config_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: llama-60m\nsequence_len: 4\n")
    assert "unknown key 'sequence_len'; nearest: 'sequence_length'" in error_of([str(config), "--output_dir", "x"])


def test_a_hub_that_keeps_silent_is_given_up_within_seconds(monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: (_ for _ in ()).throw(ConnectionError("refused")))
    assert re.search(r"does not answer \(ConnectionError\)", recipe_kit.hub_problem())
    assert constants.HF_HUB_OFFLINE  # nothing else tries again


def test_tokens_of_other_settings_are_not_used_by_accident(corpus: Path, tokens: Path, tmp_path: Path) -> None:
    words = [
        "--dataset_path",
        str(corpus),
        "--tokens_path",
        str(tokens),
        "--output_dir",
        str(tmp_path),
        *QUICK.split(),
    ]
    assert "made with another eval_share" in error_of([*words, "--tokenizer", "train", "--eval_share", "0.3"])


# ---- text from Debian packages ----


def test_prose_is_kept_and_markup_code_and_copies_are_not(tmp_path: Path) -> None:
    prose = "This is a sentence of the manual, and it says what the program does with the files that it is given. "
    page = f"<html><head><title>T</title></head><body><nav>Next the page of it all is in here</nav><p>{prose * 3}</p>"
    page += (
        "<pre>int main(void) { return the_of_and_to; }</pre><p>Das ist ein Satz auf Deutsch, und er bleibt weg.</p>"
    )
    page += "<p>It&#39;s the <b>last</b> of the paragraphs, and it is as good as the first one was.</p></body></html>"
    files = {
        "doc/a.html": page,
        "doc/b.html": page,
        "doc/c.pod": f"=head1 NAME\n\nC<perl> {prose * 4}\n\n  my $x = 1;\n",
    }
    files["man/man1/x.1"] = (
        f'.TH X 1\n.SH NAME\n\\fBx\\fR is the program of this page. {prose * 3}\n.PP\n.B "bold"\nof it\n'
    )
    files["src/x.c"] = (
        f"/* {prose * 2}\n *\n * @x: it is\n */\nint the_of_and; // {prose}\n// and to it {prose}\nx = 1;"
    )
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = {document["source"]: document["text"] for document in debian_text.documents(tmp_path, set())}
    assert list(found) == ["doc/a.html", "doc/c.pod", "man/man1/x.1", "src/x.c"]  # b is a copy of a
    assert found["doc/a.html"].startswith(prose) and found["doc/a.html"].count("\n\n") == 1
    assert "It's the last of the paragraphs" in found["doc/a.html"]
    assert found["doc/c.pod"].startswith("perl This is") and "my $x" not in found["doc/c.pod"]
    assert found["man/man1/x.1"].startswith("x is the program of this page.")
    assert found["src/x.c"] == f"{prose * 2}".strip() + f"\n\n{prose}and to it {prose}".rstrip()  # its comments alone


# ---- the README ----


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", (RECIPE / "README.md").read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if "recipes/pretrain/train.py" in line]


def test_every_command_of_the_readme_parses() -> None:
    assert len(commands()) >= 6
    for words in commands():
        flags = words[words.index("recipes/pretrain/train.py") + 1 :]
        if flags[0].endswith(".yaml"):
            assert (ROOT / flags[0]).is_file()
            flags[0] = str(ROOT / flags[0])
        pretrain_arguments.parse(flags)


def test_the_readme_names_every_config_and_flag() -> None:
    readme = (RECIPE / "README.md").read_text()
    for config in CONFIGS:
        assert f"`{config.name}`" in readme
    for field in pretrain_arguments.dataclasses.fields(pretrain_arguments.PretrainArguments):
        assert f"`--{field.name}`" in readme, field.name


def test_a_finished_run_is_kept_and_no_step_is_taken_beyond_the_last(tokens: Path, tmp_path: Path, capsys) -> None:
    words = ["--max_steps", "4", "--save_steps", "2", "--save_strategy", "steps", "--hub_token", "hf_secret"]
    results = run(tmp_path, tokens, *words)
    file = tmp_path / "out" / "results.json"
    before = file.read_bytes()
    assert b"hf_secret" not in before
    assert run(tmp_path, tokens, *words, "--resume_from_checkpoint", "true") == results
    assert "is finished: its results are kept" in capsys.readouterr().out and file.read_bytes() == before
    file.unlink()
    with pytest.raises(SystemExit, match="checkpoint-4 is at step 4 of --max_steps 4; expected more steps"):
        run(tmp_path, tokens, *words, "--resume_from_checkpoint", "true")


def test_what_is_replaced_and_whose_settings_hold_is_said(tokens: Path, tmp_path: Path, capsys) -> None:
    words = ["--max_steps", "2", "--save_steps", "1", "--save_strategy", "steps"]
    first = run(tmp_path, tokens, *words)
    capsys.readouterr()
    run(tmp_path, tokens, *words)
    said = capsys.readouterr().out
    assert "its results.json is now results-1.json" in said and "newest of step 2: this one starts at step 0" in said
    assert json.loads((tmp_path / "out" / "results-1.json").read_text()) == json.loads(json.dumps(first))
    again = ["--learning_rate", "0.5", "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    run(tmp_path, tokens, *words, *again)
    said = capsys.readouterr().out
    assert re.search(r"Resumed at step 1 with the checkpoint's learning_rate=\S+ \(not 0.5\)", said), said


def test_the_last_step_of_an_epoch_is_counted_as_what_it_is() -> None:
    recipe = SimpleNamespace(total_batch_size=128, sequence_length=16)
    counted = train.Tokens(recipe, SimpleNamespace(train=[None] * 317))
    assert [counted.at(step) for step in (1, 2, 3, 4, 6)] == [128 * 16, 256 * 16, 317 * 16, 445 * 16, 634 * 16]
