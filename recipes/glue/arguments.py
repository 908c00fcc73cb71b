"""The recipe's arguments: dataclasses, a YAML config, and the command line over both."""

import dataclasses
from pathlib import Path

import torch
from data import TASKS
from transformers import HfArgumentParser, TrainingArguments

from foam_hf.recipe_config import (
    config_values,
    drop_foreign_settings,
    find_config,
    parse_flags,
    read_config,
    replaced_optim_args,
    settle_pairs,
)
from foam_hf.recipe_kit import one_line

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass
class GlueArguments:
    """What this recipe adds to TrainingArguments."""

    task_name: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": f"one or more of {', '.join(TASKS)}: cola,sst2 or cola sst2", "action": "extend"},
    )
    seeds: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "one run for each: 1,2,3 (default: the one --seed)", "action": "extend"}
    )
    model_name_or_path: str = dataclasses.field(default="roberta-base", metadata={"help": "hub name or local folder"})
    dataset_path: str | None = dataclasses.field(
        default=None,
        metadata={"help": "folder of train/validation files (or of one subfolder a task) instead of the hub"},
    )
    max_seq_length: int = dataclasses.field(default=256, metadata={"help": "longer texts are cut"})
    max_train_samples: int | None = dataclasses.field(default=None, metadata={"help": "use the first rows only"})
    max_eval_samples: int | None = dataclasses.field(default=None, metadata={"help": "use the first rows only"})
    dtype: str = dataclasses.field(default="float32", metadata={"help": "of the weights: float32, bfloat16, float16"})
    int8_weights: bool = dataclasses.field(
        default=False, metadata={"help": "train INT8 weights (foam_hf.Int8Config); --dtype is that of the others"}
    )
    eval_untrained: bool = dataclasses.field(default=False, metadata={"help": "also evaluate before training"})
    ignore_mismatched_sizes: bool = dataclasses.field(
        default=False, metadata={"help": "start a classifier of other labels anew, as in RTE from an MNLI model"}
    )


def parse(argv: list[str]) -> tuple[GlueArguments, dict, Path, list[str]]:
    """This recipe's arguments, those for TrainingArguments, the config's path, and what to tell the user about them.

    Raises SystemExit for a config that cannot be read, an unknown flag or key, and a value that cannot be right.
    """
    parser = build_parser()
    has_config = bool(argv) and not argv[0].startswith("-")
    path = find_config(Path(argv[0]).expanduser(), HERE) if has_config else HERE / "roberta-base.yaml"
    own = [field.name for field in dataclasses.fields(GlueArguments)]
    from_config = config_values(read_config(path), path, parser, own, lists=("task_name", "seeds"))
    from_user = parse_flags(parser, argv[has_config:], "train.py")

    notes = []
    optim = from_user.get("optim")
    if optim not in (None, from_config.get("optim")) and "optim_args" in from_config:
        notes += drop_foreign_settings(from_config, from_user, optim, path.name)
    if note := replaced_optim_args(from_user.get("optim_args"), from_config.get("optim_args"), path.name):
        notes.append(note)
    settle_pairs((("warmup_steps", "warmup_ratio"), ("seeds", "seed")), from_user, from_config, path)
    defaults = {"report_to": "none", "dataloader_pin_memory": torch.cuda.is_available()}
    values = {**defaults, **from_config, **from_user}
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    if "warmup_ratio" in values and "warmup_ratio" not in names:
        values["warmup_steps"] = values.pop("warmup_ratio")  # newer releases read a value below 1 as a ratio
    if "overwrite_output_dir" not in names:
        values.pop("overwrite_output_dir", None)  # newer releases always do
    recipe = GlueArguments(**{name: values.pop(name) for name in own if name in values})
    check(recipe, values)
    return recipe, values, path, notes


def build_parser() -> HfArgumentParser:
    """A parser of both dataclasses, and of two flags that newer releases of transformers dropped."""
    parser = HfArgumentParser((GlueArguments, TrainingArguments), allow_abbrev=False)
    names = {action.dest for action in parser._actions}
    if "warmup_ratio" not in names:
        parser.add_argument("--warmup_ratio", type=float)
    if "overwrite_output_dir" not in names:
        parser.add_argument("--overwrite_output_dir", nargs="?", const="true")
    return parser


def check(recipe: GlueArguments, training: dict) -> None:
    """Resolve the lists of tasks and seeds in place; SystemExit for what cannot work."""
    tasks = [name for text in recipe.task_name or [] for name in text.lower().split(",") if name]
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks:
        raise SystemExit(f"--task_name: got {unknown[0] if unknown else 'none'}; expected some of {', '.join(TASKS)}.")
    try:
        seeds = [int(seed) for text in recipe.seeds or [] for seed in text.split(",") if seed]
    except ValueError:
        raise SystemExit(f"--seeds: got {' '.join(recipe.seeds)}; expected whole numbers, as in 1,2,3.") from None
    recipe.task_name, recipe.seeds = list(dict.fromkeys(tasks)), list(dict.fromkeys(seeds))
    wrong = [seed for seed in (*recipe.seeds, training.get("seed", 0)) if not 0 <= seed < 2**32]
    if wrong:
        raise SystemExit(f"--seeds: got {wrong[0]}; expected numbers from 0 to {2**32 - 1}.")
    if not training.get("output_dir"):
        raise SystemExit("--output_dir is missing; expected a folder for the model, checkpoints and results.json.")
    if Path(training["output_dir"]).expanduser().is_file():
        raise SystemExit(f"--output_dir: {training['output_dir']} is a file; expected a folder.")
    if recipe.dtype not in ("float32", "bfloat16", "float16"):
        raise SystemExit(f"--dtype: got {recipe.dtype}; expected float32, bfloat16 or float16.")
    for name in ("max_seq_length", "max_train_samples", "max_eval_samples"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise SystemExit(f"--{name}: got {value}; expected at least 1.")
    if str(training.get("resume_from_checkpoint")).lower() in ("false", "0", "no"):
        del training["resume_from_checkpoint"]
    for name in ("do_train", "do_eval"):
        if not training.get(name, True):
            raise SystemExit(f"--{name} false: this recipe always trains, then evaluates.")
    if training.pop("do_predict", False):
        raise SystemExit("--do_predict: this recipe trains and evaluates; load the saved model to predict.")


def build_training_arguments(training: dict, output_dir: Path, seed: int) -> TrainingArguments:
    """TrainingArguments of one run; the seed is also the data's, unless data_seed is set."""
    try:
        return TrainingArguments(**{**training, "output_dir": str(output_dir), "seed": seed})
    except (ValueError, TypeError, ImportError) as error:
        raise SystemExit(f"train.py: {one_line(error)}") from None
