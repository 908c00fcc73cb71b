"""The recipe's arguments beside TrainingArguments, read from a YAML config and the command line over it."""

import dataclasses
import os
from pathlib import Path

import torch
from other_optimizers import OTHERS
from pretrain_data import HUB_DATASET
from transformers import HfArgumentParser, TrainingArguments

from foam_hf.recipe_config import (
    config_values,
    drop_foreign_settings,
    find_config,
    pairs,
    parse_flags,
    read_config,
    replaced_optim_args,
    settle_pairs,
)
from foam_hf.recipe_kit import one_line

HERE = Path(__file__).resolve().parent
PROJECTED = ("galore", "apollo")
EXCLUSIVE = (("warmup_steps", "warmup_ratio"), ("max_steps", "num_train_epochs"), ("dataset_path", "dataset_name"))
LAYERS = r".*\.(self_attn|mlp)\..*"  # what GaLore and APOLLO project in their papers; all-linear has the LM head too


@dataclasses.dataclass
class PretrainArguments:
    """What this recipe adds to TrainingArguments."""

    model: str = dataclasses.field(
        default="llama-60m", metadata={"help": "a name of `foam-hf estimate`, a config.json, a folder, or a hub name"}
    )
    config_overrides: str | None = dataclasses.field(
        default=None, metadata={"help": "over the model's config: hidden_size=256,num_hidden_layers=4"}
    )
    dtype: str = dataclasses.field(default="bfloat16", metadata={"help": "of the weights: bfloat16 or float32"})
    sequence_length: int = dataclasses.field(default=256, metadata={"help": "tokens of a sequence"})
    total_batch_size: int = dataclasses.field(
        default=512, metadata={"help": "sequences of a step, of all processes together"}
    )
    tokenizer: str = dataclasses.field(
        default="google-t5/t5-base", metadata={"help": "hub name or folder; train: a BPE trained on the data"}
    )
    dataset_path: str | None = dataclasses.field(
        default=None, metadata={"help": ".txt, .jsonl or .parquet file, folder of them, or of tokens made before"}
    )
    dataset_name: str = dataclasses.field(default=HUB_DATASET, metadata={"help": "streamed from the hub"})
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "its configuration"})
    text_column: str = dataclasses.field(default="text", metadata={"help": "of .jsonl, .parquet and hub data"})
    eval_share: float = dataclasses.field(
        default=0.005, metadata={"help": "share of the documents that is held out, where there is no validation split"}
    )
    train_share: float = dataclasses.field(default=1.0, metadata={"help": "share of the others that is used"})
    eval_tokens: int = dataclasses.field(default=10_000_000, metadata={"help": "evaluate on so many tokens at most"})
    split_seed: int = dataclasses.field(default=0, metadata={"help": "chooses these documents, whatever the seed"})
    tokens_path: str | None = dataclasses.field(
        default=None, metadata={"help": "folder for tokens and tokenizer (default: tokens in --output_dir)"}
    )
    compile_layers: bool = dataclasses.field(
        default=False,
        metadata={"help": "compile a decoder layer and the loss: seconds, where --torch_compile has a minute"},
    )
    prepare_only: bool = dataclasses.field(default=False, metadata={"help": "make --tokens_path, then stop"})


def parse(argv: list[str]) -> tuple[PretrainArguments, dict, str, list[str]]:
    """This recipe's arguments, those for TrainingArguments, the optimizer's name, and what to tell the user.

    Raises SystemExit for a config that cannot be read, an unknown flag or key, and a value that cannot be right.
    """
    parser = build_parser()
    has_config = bool(argv) and not argv[0].startswith("-")
    path = find_config(Path(argv[0]).expanduser(), HERE) if has_config else HERE / "llama-60m.yaml"
    config = {key: pairs(value) if key == "config_overrides" else value for key, value in read_config(path).items()}
    own = {field.name for field in dataclasses.fields(PretrainArguments)}
    from_config = config_values(config, path, parser, own)
    from_user = parse_flags(parser, argv[has_config:], "train.py")
    notes = []
    optim = from_user.get("optim")
    if optim not in (None, from_config.get("optim")):
        notes += drop_foreign_settings(from_config, from_user, optim, path.name)
    if note := replaced_optim_args(from_user.get("optim_args"), from_config.get("optim_args"), path.name):
        notes.append(note)
    settle_pairs(EXCLUSIVE, from_user, from_config, path)
    if "dataset_name" in from_user:  # another data set's configuration is not this one's
        from_config.pop("dataset_config", None)
    cuda = torch.cuda.is_available() and str(from_user.get("use_cpu", "")).lower() != "true"
    values: dict = {"report_to": "none", "dataloader_pin_memory": cuda, **from_config, **from_user}
    recipe = PretrainArguments(**{name: values.pop(name) for name in own & values.keys()})
    if recipe.dtype == "float32":
        values.setdefault("bf16", cuda and torch.cuda.is_bf16_supported())
    optim = str(values.get("optim", TrainingArguments.optim))
    if optim.startswith(PROJECTED) and "optim_target_modules" not in values:
        values["optim_target_modules"] = LAYERS
        notes.append(f"{optim} projects what {LAYERS} matches; --optim_target_modules takes others.")
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    if "warmup_ratio" in values and "warmup_ratio" not in names:
        values["warmup_steps"] = values.pop("warmup_ratio")  # newer releases read a value below 1 as a ratio
    check(recipe, values)
    return recipe, values, optim, notes


def build_parser() -> HfArgumentParser:
    """A parser of both dataclasses; it knows `warmup_ratio` in any release, and leaves --optim to what follows."""
    parser = HfArgumentParser((PretrainArguments, TrainingArguments), allow_abbrev=False)
    actions = {action.dest: action for action in parser._actions}
    if "warmup_ratio" not in actions:
        parser.add_argument("--warmup_ratio", type=float)
    actions["optim"].type, actions["optim"].choices = str, None
    return parser


def check(recipe: PretrainArguments, training: dict) -> None:
    """SystemExit for what cannot work; resolves --output_dir and --tokens_path in place."""
    if recipe.dtype not in ("bfloat16", "float32"):
        raise SystemExit(f"--dtype: got {recipe.dtype}; expected bfloat16 or float32.")
    for name in ("sequence_length", "total_batch_size", "eval_tokens"):
        if getattr(recipe, name) < (2 if name == "sequence_length" else 1):
            raise SystemExit(
                f"--{name}: got {getattr(recipe, name)}; expected a whole number, 1 or more (2: a length)."
            )
    if not 0 < recipe.eval_share < 1:
        raise SystemExit(f"--eval_share: got {recipe.eval_share:g}; expected a number between 0 and 1.")
    if not 0 < recipe.train_share <= 1:
        raise SystemExit(f"--train_share: got {recipe.train_share:g}; expected a number above 0, at most 1.")
    if training.get("gradient_accumulation_steps") not in (None, 1):
        raise SystemExit(
            f"--gradient_accumulation_steps: got {training['gradient_accumulation_steps']}; this recipe computes it "
            f"from --total_batch_size ({recipe.total_batch_size}) and --per_device_train_batch_size."
        )
    if recipe.prepare_only:
        if not (recipe.tokens_path and recipe.dataset_path):
            raise SystemExit("--prepare_only needs --dataset_path to read from and --tokens_path to write to.")
        training.setdefault("output_dir", recipe.tokens_path)
    if not training.get("output_dir"):
        raise SystemExit("--output_dir is missing; expected a folder for the model, checkpoints and results.json.")
    training["output_dir"] = os.path.expanduser(training["output_dir"])
    if Path(training["output_dir"]).is_file():
        raise SystemExit(f"--output_dir: {training['output_dir']} is a file; expected a folder.")
    recipe.tokens_path = os.path.expanduser(recipe.tokens_path or os.path.join(training["output_dir"], "tokens"))
    if str(training.get("resume_from_checkpoint")).lower() in ("false", "0", "no"):
        del training["resume_from_checkpoint"]
    for name in ("do_train", "do_eval"):
        if not training.get(name, True):
            raise SystemExit(f"--{name} false: this recipe always trains, then evaluates.")


def build_training_arguments(recipe: PretrainArguments, training: dict, optim: str) -> TrainingArguments:
    """TrainingArguments whose accumulation makes --total_batch_size of what the processes take at a time."""
    values = {**training, "optim": OTHERS.get(optim, optim), "gradient_accumulation_steps": 1}
    try:
        args = TrainingArguments(**values)
        together = args.train_batch_size * args.world_size
        if recipe.total_batch_size % together:
            near = [size for size in range(1, args.train_batch_size + 1) if not recipe.total_batch_size % size]
            raise SystemExit(
                f"--total_batch_size: {recipe.total_batch_size} is no multiple of {together}: {args.world_size} "
                f"processes of {args.train_batch_size} at a time; expected, for example, "
                f"--per_device_train_batch_size {near[-1]}, or another number of processes."
            )
        if recipe.total_batch_size != together:
            args = TrainingArguments(**{**values, "gradient_accumulation_steps": recipe.total_batch_size // together})
    except (ValueError, TypeError, ImportError) as error:
        also = f" (or {', '.join(OTHERS)}, of this recipe)" if "OptimizerNames" in str(error) else ""
        raise SystemExit(f"train.py: {one_line(error)}{also}") from None
    return args
