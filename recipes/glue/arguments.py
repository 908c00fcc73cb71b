"""The recipe's arguments: dataclasses, a YAML config, and the command line over both."""

import dataclasses
import os
import typing
from argparse import Namespace
from pathlib import Path

import torch
import yaml
from data import TASKS, one_line
from transformers import HfArgumentParser, TrainingArguments

from foam_hf.recipe_kit import find_config, nearest, replaced_optim_args, said_optimizer

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


def say(*words: object) -> None:
    """Print on the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*words, flush=True)


def parse(argv: list[str]) -> tuple[GlueArguments, dict, Path, list[str]]:
    """This recipe's arguments, those for TrainingArguments, the config's path, and what to tell the user about them.

    Raises SystemExit for a config that cannot be read, an unknown flag or key, and a value that cannot be right.
    """
    parser = build_parser()
    has_config = bool(argv) and not argv[0].startswith("-")
    path = find_config(Path(argv[0]).expanduser(), HERE) if has_config else HERE / "roberta-base.yaml"
    from_config = read_config(path, parser)
    from_user = parse_flags(parser, argv[has_config:], "train.py")

    notes = []
    optim, config_optim = from_user.get("optim"), from_config.get("optim")
    if optim not in (None, config_optim) and "optim_args" in from_config:
        dropped = from_config.pop("optim_args")  # they belong to the optimizer beside which they are written
        if "optim_args" not in from_user:
            notes.append(f"optim_args {dropped} of {path.name} are for {config_optim}: dropped for {optim}.")
        if "learning_rate" not in from_user:
            notes.append(
                f"learning_rate {from_config.get('learning_rate')} of {path.name} is for {config_optim}: kept."
            )
    if note := replaced_optim_args(from_user.get("optim_args"), from_config.get("optim_args"), path.name):
        notes.append(note)
    for first, second in (("warmup_steps", "warmup_ratio"), ("seeds", "seed")):
        for source, where in ((from_user, "train.py"), (from_config, path)):
            if first in source and second in source:
                raise SystemExit(f"{where}: got both {first} and {second}; expected one of them.")
        if first in from_user or second in from_user:  # either wins over both of the config
            from_config.pop(first, None)
            from_config.pop(second, None)
    defaults = {"report_to": "none", "dataloader_pin_memory": torch.cuda.is_available()}
    values = {**defaults, **from_config, **from_user}
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    if "warmup_ratio" in values and "warmup_ratio" not in names:
        values["warmup_steps"] = values.pop("warmup_ratio")  # newer releases read a value below 1 as a ratio
    if "overwrite_output_dir" not in names:
        values.pop("overwrite_output_dir", None)  # newer releases always do
    own = [field.name for field in dataclasses.fields(GlueArguments) if field.name in values]
    recipe = GlueArguments(**{name: values.pop(name) for name in own})
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


def parse_flags(parser: HfArgumentParser, flags: list[str], source: str) -> dict:
    """The flags that are given, without defaults: argparse adds none to a namespace that already holds None."""

    def fail(message: str) -> None:
        raise SystemExit(f"{source}: {said_optimizer(message)}")

    parser.error = fail  # one line, instead of a page of usage
    names = {action.dest for action in parser._actions} - {"help"}
    found, unknown = parser.parse_known_args(flags, Namespace(**dict.fromkeys(names)))
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        fail(f"unknown argument {unknown[0]}; nearest: --{', --'.join(nearest(name, names))}.")
    return {name: value for name, value in vars(found).items() if value is not None}


def read_config(path: Path, parser: HfArgumentParser) -> dict:
    """A YAML config's values, checked and converted as the flags of the same names."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"Cannot read the config {path}: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise SystemExit(f"{path}: expected lines of 'key: value', got {type(config).__name__}.")
    names = {action.dest for action in parser._actions} - {"help"}
    own = {field.name for field in dataclasses.fields(GlueArguments)}
    structured = {
        a.dest for a in parser._actions if a.type is str or a.nargs == "+" or typing.get_origin(a.type)
    } - own
    flags, unconverted = [], {}
    for key, value in config.items():
        if key not in names:
            near = ", ".join(map(repr, nearest(str(key), names)))
            raise SystemExit(f"{path}: unknown key {key!r}; nearest: {near}.")
        if key == "optim_args" and isinstance(value, dict):
            value = ",".join(f"{name}={setting}" for name, setting in value.items())
        if key in ("task_name", "seeds"):
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        elif isinstance(value, (dict, list)):
            if key not in structured:
                raise SystemExit(f"{path}: {key}: got {value}; expected one value.")
            unconverted[key] = value  # as lr_scheduler_kwargs: TrainingArguments takes it as it is
        elif value is not None:
            flags += [f"--{key}={value}"]
    return {**parse_flags(parser, flags, str(path)), **unconverted}


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


def resumes_newest(training: dict) -> bool:
    """Whether --resume_from_checkpoint asks for each run's newest checkpoint, rather than none or a named one."""
    return str(training.get("resume_from_checkpoint", "")).lower() in ("true", "1", "yes")


def build_training_arguments(training: dict, output_dir: Path, seed: int) -> TrainingArguments:
    """TrainingArguments of one run; the seed is also the data's, unless data_seed is set."""
    try:
        return TrainingArguments(**{**training, "output_dir": str(output_dir), "seed": seed})
    except (ValueError, TypeError, ImportError) as error:
        raise SystemExit(f"train.py: {one_line(error)}") from None
