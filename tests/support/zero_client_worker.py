"""Runs as users start them, for tests/zero/test_clients.py: configs of `accelerate launch`, the Trainer, and TRL.

The processes are forked with the environment that `accelerate launch` would give them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
import trl
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from transformers import Trainer, TrainingArguments

from foam_hf import FOAM
from tests.support.tiny_models import language_data, tiny_llama
from tests.support.torchrun import launch

deepspeed.ops.__compatible_ops__.clear()  # else every test run compiles C++ for collectives over shared memory
WORLD, STEPS = 2, 3
RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
OF_TRL = Path(trl.__file__).parent / "accelerate_configs"  # `trl sft --accelerate_config zero2` takes them from there
TEXTS = ["the mean of a block", "two moments a row", "a rank holds a part", "no weight moves far"]


def environment_of(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file config` adds to the environment of each process."""
    options = launch_command_parser().parse_args(["--config_file", str(config), "--num_processes", "2", "train.py"])
    options, defaults, _ = _validate_launch_command(options)
    options.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    found = prepare_deepspeed_cmd_env(options)[1]
    return {key: value for key, value in found.items() if key.startswith("ACCELERATE_")}


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)


SETTINGS: dict[str, Any] = {
    "optim": "foam",
    "learning_rate": 5e-3,
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def finish(trainer: Any, folder: Path) -> dict[str, Any]:
    """Train, save the model, and say what happened."""
    trainer.train()
    trainer.save_model(str(folder))
    wrapped = trainer.optimizer
    while not isinstance(wrapped, FOAM) and hasattr(wrapped, "optimizer"):
        wrapped = wrapped.optimizer
    engine = trainer.model_wrapped
    return {
        "stage": engine.zero_optimization_stage(),
        "optimizer": type(wrapped).__name__,
        "dtype": str(next(engine.module.parameters()).dtype),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def by_recipe(stage: int, folder: Path) -> dict[str, Any]:
    """The Trainer under a config of recipes/accelerate."""
    with environment(environment_of(RECIPES / f"zero{stage}.yaml")):
        args = TrainingArguments(str(folder), **SETTINGS, bf16=True)
        return finish(Trainer(model=tiny_llama(), args=args, train_dataset=language_data(32)), folder)


def by_trl(stage: int, folder: Path, model: Path, tokenizer: Any) -> dict[str, Any]:
    """TRL's SFTTrainer under TRL's own config, with accumulation."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with environment(environment_of(OF_TRL / f"zero{stage}.yaml")):
        args = SFTConfig(str(folder), **SETTINGS, bf16=True, gradient_accumulation_steps=2, max_length=32)
        data = Dataset.from_dict({"text": TEXTS * 8})
        trainer = SFTTrainer(model=str(model), args=args, train_dataset=data, processing_class=tokenizer)
        return finish(trainer, folder)


def tokenizer_of(texts: list[str]) -> Any:
    """One token a character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted({character for text in texts for character in text})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def as_one_rank(folder: Path) -> None:
    """The function that every process of the launcher runs."""
    torch.set_num_threads(1)
    tokenizer = tokenizer_of(TEXTS)
    found: dict[str, Any] = {}
    for stage in (1, 2, 3):
        found[f"recipe {stage}"] = by_recipe(stage, folder / f"recipe {stage}")
    for stage in (2, 3):
        found[f"trl {stage}"] = by_trl(stage, folder / f"trl {stage}", folder / "model", tokenizer)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    tiny_llama().save_pretrained(Path(sys.argv[1]) / "model")
    launch(WORLD, as_one_rank, Path(sys.argv[1]))
