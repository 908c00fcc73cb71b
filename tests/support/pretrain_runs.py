"""Helpers for tests of the pretraining recipe: its script, the flags of a tiny run, small texts."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from tests.support.recipe_scripts import load_train

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "pretrain"


def load_script() -> ModuleType:
    return load_train(RECIPE, "pretrain_train")


WORDS = ["the", "cat", "saw", "a", "dog", "and", "then", "it", "ran", "home", "to", "eat", "some", "fish", "again"]
VOCAB = 300
SHAPES = "num_hidden_layers=1,hidden_size=32,intermediate_size=48,num_attention_heads=2,num_key_value_heads=2"
TINY = f"vocab_size={VOCAB},{SHAPES}"
QUICK = f"--config_overrides {TINY} --sequence_length 16 --total_batch_size 4 --per_device_train_batch_size 2 "
QUICK += "--per_device_eval_batch_size 4 --eval_tokens 128 --eval_strategy no --save_strategy no --max_steps 2 "
QUICK += "--disable_tqdm true --use_cpu true --logging_steps 1"


def text(number: int) -> str:
    """A different document for each number."""
    return (
        " ".join(WORDS[(number * 7 + i * (number % 6 + 1)) % len(WORDS)] for i in range(20 + number % 9))
        + f" {number}."
    )


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path
