"""Helpers for tests of the instruct recipe: its script, tiny models with real chat templates, small data files."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support.recipe_scripts import load_train

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "instruct"
CONFIGS = sorted([*RECIPE.glob("*.yaml"), *(ROOT / "recipes" / "quantized").glob("*.yaml")])
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUICK = "--max_steps 2 --per_device_train_batch_size 2 --per_device_eval_batch_size 4 --eval_samples 3 "
QUICK += "--max_new_tokens 4 --save_strategy no --eval_strategy no --disable_tqdm true --use_cpu true"
# The special tokens of each family: the one that ends an answer, that starts a text, that ends a text, and others.
MARKS = {
    "smollm2": ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    "qwen2.5": ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    "qwen2.5-instruct": ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    "qwen3": ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    "llama": ("<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
}
# Family -> its published chat template, by its file name in TRL.
TEMPLATES = {"qwen2.5": "qwen2_5", "qwen2.5-instruct": "qwen2_5", "qwen3": "qwen3", "llama": "llama3_2"}


def load_script() -> ModuleType:
    return load_train(RECIPE, "instruct_train")


def chat_template(family: str) -> str:
    if family not in TEMPLATES:
        return CHATML
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{TEMPLATES[family]}.jinja").read_text(encoding="utf-8")


def byte_tokenizer(family: str = "smollm2") -> Any:
    """A tokenizer with a token for each byte and the special tokens and chat template of a family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = MARKS[family]
    inner = Tokenizer(
        models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat_template(family))
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    # The end of sequence of Qwen2.5's base models ends a text, not an answer.
    tokenizer.eos_token = marks[2] if family == "qwen2.5" else marks[0]
    tokenizer.pad_token = (
        marks[0] if family == "smollm2" else marks[2]
    )  # SmolLM2 pads with the token that ends an answer
    return tokenizer


def save_model(folder: Path, family: str = "smollm2", **config: Any) -> Path:
    """Save a random LLaMA or Qwen2 of two layers and its tokenizer to `folder`."""
    from tests.support.tiny_models import tiny_llama, tiny_qwen2

    tokenizer = byte_tokenizer(family)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    build = tiny_qwen2 if family.startswith("qwen") else tiny_llama
    build(**sizes, **ids, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sums(count: int = 12) -> list[dict[str, str]]:
    """Made-up examples in Alpaca's columns; their answers end in a number."""
    return [
        {"instruction": f"Add {i}", "input": f"and {i}" if i % 2 else "", "output": f"Sum.\n#### {2 * i}"}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flags(model: Path | str, data: Path | str, out: Path, *more: str) -> list[str]:
    """The flags of a run of two steps on the CPU."""
    where = ["--model_name_or_path", str(model), "--dataset_path", str(data), "--output_dir", str(out)]
    return [*where, *QUICK.split(), *more]
