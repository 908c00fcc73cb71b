"""The instruct recipe: its data, its loss, its scores, its messages, and whole runs on tiny models."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "instruct"
sys.path.insert(0, str(RECIPE))

spec = importlib.util.spec_from_file_location("instruct_train", RECIPE / "train.py")  # "train" is the GLUE recipe's
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

import answers  # noqa: E402

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUICK = "--max_steps 2 --per_device_train_batch_size 2 --per_device_eval_batch_size 4 --eval_samples 3 "
QUICK += "--max_new_tokens 4 --save_strategy no --eval_strategy no --disable_tqdm true --use_cpu true"


def tokenizer_of_bytes():
    """Every byte is a token, and so are ChatML's marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random two-layer models with a tokenizer of bytes, saved."""
    from tests.tiny_models import tiny_llama, tiny_qwen2

    tokenizer = tokenizer_of_bytes()
    folders = {}
    for name, build in (("llama", tiny_llama), ("qwen2", tiny_qwen2)):
        folders[name] = tmp_path_factory.mktemp(name)
        ids = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
        build(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, **ids).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def alpaca(count: int = 12) -> list[dict]:
    return [
        {"instruction": f"Add {i}", "input": f"and {i}" if i % 2 else "", "output": f"Sum.\n#### {2 * i}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in alpaca()), encoding="utf-8")
    return path


def run(model: Path, data: Path, out: Path, *more: str) -> dict:
    where = ["--model_name_or_path", str(model), "--dataset_path", str(data), "--output_dir", str(out)]
    return train.main([*where, *QUICK.split(), *more])


@pytest.mark.parametrize("method", ["full", "lora", "lora8bit", "qlora"])
def test_every_method_trains_two_steps_and_says_what_it_did(method, models, sums, tmp_path):
    results = run(models["llama"], sums, tmp_path, "--method", method, "--eval_exact_match", "true")
    assert results == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["steps"] == 2
    assert results["after"]["count"] == 3 and len(results["after"]["samples"]) == 3
    assert results["after"]["eval_loss"] != results["before"]["eval_loss"]
    assert (tmp_path / ("model.safetensors" if method == "full" else "adapter_model.safetensors")).is_file()
    assert results["peak_bytes"] is None or torch.cuda.is_available()
    assert results["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("#### $ 5", "5"),
        ("#### -3", "-3"),
        ("#### \u22123", "-3"),
        ("#### 10 apples of 12", "10"),
        ("#### 1 no, #### 2", "2"),
        ("The answer is $1,234.50.", "1234.5"),
        ("It took 12 days, then 3.", "3"),
        ("10 - 4 = 6, as 10-4", "4"),
        ("it is -$5", "-5"),
        ("list:\n- 5", "5"),
        ("a list 1,2,3", "3"),
        ("half of it is .5", "0.5"),
        ("20%", "20"),
        ("7.0", "7"),
        ("we have 8 left #### none", "8"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number_of_an_answer(text, number):
    found = answers.final_number(text)
    assert (found is None) == (number is None)
    assert number is None or found == answers.Decimal(number)


def test_exact_match_counts_numbers_and_leaves_out_references_without_one():
    scores = answers.exact_match(["is 4.0", "#### 1,000", "none", "3"], ["#### 4", "1000", "#### 2", "nothing"])
    assert scores == {
        "exact_match": pytest.approx(2 / 3),
        "correct": 2,
        "count": 3,
        "references_without_a_number": 1,
    }
    assert answers.exact_match(["1"], ["one"])["exact_match"] is None
