"""The recipe's arguments beside TRL's SFTConfig, read from a YAML config and the command line over it."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import torch
from transformers import HfArgumentParser

from foam_hf import recipe_config
from foam_hf.recipe_config import drop_foreign_settings, find_config, nearest, replaced_optim_args, with_optimizer_hint
from foam_hf.recipe_kit import one_line, say

try:
    import datasets  # noqa: F401  # before trl, which hides what it lacks
    from trl import SFTConfig
except ImportError as error:  # before anything is read
    raise SystemExit(f"This recipe needs TRL, PEFT and datasets (pip install trl peft datasets): {error}") from None

HERE = Path(__file__).resolve().parent
WHOLE = ("full", "int8")  # every weight is trained
METHODS = (*WHOLE, "lora", "lora8bit", "qlora")
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass
class InstructArguments:
    """What this recipe adds to SFTConfig."""

    model_name_or_path: str = dataclasses.field(
        default="smollm2-135m", metadata={"help": "hub name, local folder, .gguf file, or smollm2-135m"}
    )
    method: str = dataclasses.field(default="full", metadata={"help": f"what to train: {', '.join(METHODS)}"})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"help": f"of the weights: {', '.join(DTYPES)}"})
    attn_implementation: str | None = dataclasses.field(
        default=None, metadata={"help": "as from_pretrained takes it: sdpa, eager, ...; default: transformers' choice"}
    )
    int8_head: bool = dataclasses.field(
        default=False, metadata={"help": "method int8: an LM head that is not the embedding becomes INT8 too"}
    )
    int8_offload: bool = dataclasses.field(
        default=False,
        metadata={"help": "method int8: weights in host memory, which visit the GPU one layer at a time"},
    )
    lora_r: int = dataclasses.field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: int = dataclasses.field(default=32, metadata={"help": "adapters are scaled by lora_alpha / lora_r"})
    lora_dropout: float = dataclasses.field(default=0.0, metadata={"help": "dropout before the adapters"})
    lora_target_modules: str = dataclasses.field(
        default="all-linear", metadata={"help": "all-linear, or module names with commas between them"}
    )
    dataset_path: str | None = dataclasses.field(
        default=None, metadata={"help": "json, jsonl, csv or parquet file, or a folder of train and validation files"}
    )
    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "data set on the hub"})
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "its configuration"})
    train_samples: int | None = dataclasses.field(default=None, metadata={"help": "train on the first ones only"})
    eval_samples: float = dataclasses.field(
        default=0.05, metadata={"help": "held out: a number of examples, or a share below 1"}
    )
    split_seed: int = dataclasses.field(default=0, metadata={"help": "chooses what is held out, whatever the seed"})
    chat_template_kwargs: str | None = dataclasses.field(
        default=None, metadata={"help": "for the chat template, as '{\"enable_thinking\": false}'"}
    )
    eval_before: bool = dataclasses.field(default=True, metadata={"help": "also evaluate before training"})
    eval_exact_match: bool = dataclasses.field(
        default=False, metadata={"help": "generate answers to held-out prompts and compare their final numbers"}
    )
    exact_match_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "only the first held-out ones"}
    )
    max_new_tokens: int = dataclasses.field(default=256, metadata={"help": "length of generated answers"})
    generation_batch_size: int | None = dataclasses.field(
        default=None, metadata={"help": "answers generated at a time; default: per_device_eval_batch_size"}
    )

    @property
    def template_kwargs(self) -> dict:
        return json.loads(self.chat_template_kwargs or "{}")


def parse(argv: list[str]) -> tuple[InstructArguments, SFTConfig, dict]:
    """This recipe's arguments, TRL's, and every setting that was given (config and command line), for results.json.

    Raises SystemExit for a config that cannot be read, an unknown key, and a value that cannot be right.
    """

    def fail(message: str) -> None:
        raise SystemExit(f"train.py: {with_optimizer_hint(message)}")

    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.error = fail  # one line, instead of a page of usage
    pre.add_argument("--config", type=Path, default=HERE / "smollm2-135m.yaml")
    chosen, flags = pre.parse_known_args(argv)
    if flags and flags[0].endswith((".yaml", ".yml")):  # train.py CONFIG.yaml, as in the GLUE recipe
        chosen.config, flags = Path(flags[0]), flags[1:]
    path = find_config(chosen.config.expanduser(), HERE)
    config = read_config(path)
    parser = build_parser()
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    given = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    for source, names in ((str(path), config), ("train.py", given - {"help", *(f"no_{name}" for name in actions)})):
        unknown = [name for name in names if name not in actions]
        if unknown:
            near = ", ".join(map(repr, nearest(str(unknown[0]), actions)))
            raise SystemExit(f"{source}: unknown key {unknown[0]!r}; nearest: {near}.")
    if "optim" in given and (optim := value_of("--optim", flags)) != config.get("optim"):
        for note in drop_foreign_settings(config, given, optim, path.name):
            say(note)
    use_new_names(config, given, actions)
    if "dataset_path" in given or "dataset_name" in given:  # either replaces the config's
        for name in ("dataset_path", "dataset_name", "dataset_config"):
            config.pop(name, None)
    defaults = {
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    for name, value in {**defaults, **config}.items():
        # As text, argparse converts and checks it like a flag; mappings and lists are taken as they are.
        default = value if value is None or isinstance(value, (dict, list)) else str(value)
        for action in parser._actions:
            if action.dest == name:  # a switch that is on by default has a second action, --no_...
                action.default, action.required = default, False

    parser.error = fail
    try:
        recipe, args, rest = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    except (ValueError, TypeError, ImportError) as error:
        raise SystemExit(f"train.py: {one_line(error)}") from None
    if rest:
        fail(f"unknown argument {rest[0]}; expected --key value.")
    if "optim_args" in given and (note := replaced_optim_args(args.optim_args, config.get("optim_args"), path.name)):
        say(note)
    check(recipe, args)
    settings = {**config, **{name: getattr(recipe, name, getattr(args, name, None)) for name in sorted(given)}}
    settings |= dataclasses.asdict(recipe)
    for secret in ("hub_token", "push_to_hub_token"):
        settings.pop(secret, None)
    return recipe, args, json.loads(json.dumps(settings, default=str))


def build_parser() -> HfArgumentParser:
    return HfArgumentParser((InstructArguments, SFTConfig), allow_abbrev=False)


def value_of(flag: str, flags: list[str]) -> str:
    """What a flag that is given is followed by, or holds behind "="."""
    index = next(i for i, word in enumerate(flags) if word.split("=")[0] == flag)
    _, equals, value = flags[index].partition("=")
    return value if equals else (flags[index + 1 :] or [""])[0]


def read_config(path: Path) -> dict:
    config = recipe_config.read_config(path)
    if isinstance(config.get("chat_template_kwargs"), dict):
        config["chat_template_kwargs"] = json.dumps(config["chat_template_kwargs"])
    return config


def use_new_names(config: dict, given: set[str], actions: dict) -> None:
    """Newer releases of transformers warn of the old name, and then let the new one win over a flag of the old."""
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if new in actions and old in config:
            value = config.pop(old)
            if old not in given:
                config.setdefault(new, value)


def check(recipe: InstructArguments, args: SFTConfig) -> None:
    """SystemExit for values that cannot work."""
    for name, legal in (("method", METHODS), ("dtype", DTYPES)):
        if getattr(recipe, name) not in legal:
            raise SystemExit(f"--{name}: got {getattr(recipe, name)}; expected {', '.join(legal)}.")
    if not recipe.eval_samples > 0 or (recipe.eval_samples >= 1 and recipe.eval_samples != int(recipe.eval_samples)):
        raise SystemExit(f"--eval_samples: got {recipe.eval_samples:g}; expected a whole number, or a share below 1.")
    for name in ("train_samples", "exact_match_samples", "max_new_tokens", "generation_batch_size", "lora_r"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise SystemExit(f"--{name}: got {value}; expected at least 1.")
    for name in ("int8_head", "int8_offload"):
        if getattr(recipe, name) and recipe.method != "int8":
            raise SystemExit(f"--{name} is of --method int8, got --method {recipe.method}.")
    if recipe.int8_offload and "gradient_release=true" not in (args.optim_args or ""):
        raise SystemExit(
            f"--int8_offload needs weights to be updated in the backward pass, got --optim_args {args.optim_args}; "
            "expected gradient_release=true in it."
        )
    try:
        if not isinstance(recipe.template_kwargs, dict):
            raise ValueError("not a mapping")
    except ValueError:
        got = recipe.chat_template_kwargs
        raise SystemExit(
            f"--chat_template_kwargs: got {got}; expected JSON, as '{{\"enable_thinking\": false}}'."
        ) from None
    if not args.output_dir or args.output_dir == "trainer_output":
        raise SystemExit("--output_dir is missing; expected a folder for the model and results.json.")
    if Path(args.output_dir).expanduser().is_file():
        raise SystemExit(f"--output_dir: {args.output_dir} is a file; expected a folder.")
    args.output_dir = os.path.expanduser(args.output_dir)
